//! Weight matrices in the order in which the fast kernels consume them: the layout "tiles" of `kernels/packed.cuh`.
//!
//! A *unit* is a pair of weight rows that one epilogue needs together, `half` 0 and 1 ([`Pairing`]). Tile `t` holds
//! the units `8t .. 8t+7` as 16 rows: row `g` is half 0 of unit `8t + g`, row `g + 8` its half 1; missing rows are
//! zero. K is cut into steps of 32. The steps of a tile follow one another, and the tiles: one linear stream of
//! 1024-byte steps, of which any number of SMs can take equal shares. Element `k` of `half` of unit `u` lies at
//!
//! ```text
//! ((u / 8 * K/32 + k / 32) * 2 + k % 8 / 4) * 256 + (u % 8 * 4 + k % 32 / 8) * 8 + (k % 4 / 2 * 2 + half) * 2 + k % 2
//! ```
//!
//! so that a lane reads its operand of one `mma.m16n8k16` by one 16-byte load, and a warp 512 contiguous bytes.
//! Nothing else than this permutation happens to the weights: they are bf16 before and after.

use crate::error::{Error, Result};

/// Units of a tile.
pub const TILE_UNITS: usize = 8;
/// Elements of K in a step.
pub const STEP: usize = 32;
/// Bytes of a step: 16 rows of 32 bf16.
pub const STEP_BYTES: usize = 1024;

/// Which rows of a matrix make a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Rows `2u` and `2u + 1`; the last unit of an odd matrix has one row.
    Neighbours,
    /// Rows `j` and `j + head_dim / 2` of a head: what a rotation needs together.
    Rotary {
        /// Rows of a head, even.
        head_dim: usize,
    },
    /// Row `u` of the upper and of the lower half of the matrix: gate and up, stacked.
    Stacked,
}

/// A matrix `[rows, inner]` to be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    rows: usize,
    inner: usize,
    pairing: Pairing,
}

impl Tiles {
    /// Refuses shapes that do not divide: `inner` by 32, `rows` as the pairing needs.
    pub fn new(rows: usize, inner: usize, pairing: Pairing) -> Result<Tiles> {
        let unit_rows = match pairing {
            Pairing::Neighbours => 1,
            Pairing::Rotary { head_dim } if head_dim.is_multiple_of(2) => head_dim,
            Pairing::Rotary { .. } => 0,
            Pairing::Stacked => 2,
        };
        let fits = rows > 0 && inner > 0 && rows.is_multiple_of(unit_rows) && inner.is_multiple_of(STEP);
        let bytes = rows.checked_add(15).and_then(|r| r.checked_mul(inner)).and_then(|n| n.checked_mul(2));
        if !fits || bytes.is_none() {
            return Err(Error::Internal(format!("a matrix [{rows}, {inner}] does not pack as {pairing:?}")));
        }
        Ok(Tiles { rows, inner, pairing })
    }

    /// Units of the matrix.
    pub fn units(&self) -> usize {
        self.rows.div_ceil(2)
    }

    /// Tiles of the matrix.
    pub fn tiles(&self) -> usize {
        self.units().div_ceil(TILE_UNITS)
    }

    /// Bytes of a tile.
    pub fn tile_bytes(&self) -> usize {
        self.inner / STEP * STEP_BYTES
    }

    /// Bytes of the packed matrix.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
    }

    /// The row that is `half` (0 or 1) of `unit`, if there is one.
    pub fn row(&self, unit: usize, half: usize) -> Option<usize> {
        let row = match self.pairing {
            Pairing::Neighbours => unit * 2 + half,
            Pairing::Rotary { head_dim } => {
                let pairs = head_dim / 2;
                unit / pairs * head_dim + unit % pairs + half * pairs
            }
            Pairing::Stacked => half * (self.rows / 2) + unit,
        };
        (unit < self.units() && row < self.rows).then_some(row)
    }

    /// Where element `k` of `half` of `unit` lies in the packed matrix, in elements.
    pub fn index(&self, unit: usize, half: usize, k: usize) -> usize {
        let step = unit / TILE_UNITS * (self.inner / STEP) + k / STEP;
        let lane = unit % TILE_UNITS * 4 + k % STEP / 8;
        (step * 2 + k % 8 / 4) * 256 + lane * 8 + (k % 4 / 2 * 2 + half) * 2 + k % 2
    }

    /// Packs tile `tile` into `out` (of [`Tiles::tile_bytes`]). `read` writes a row, `inner` bf16, to where it is told.
    pub fn write_tile(
        &self,
        tile: usize,
        mut read: impl FnMut(usize, &mut [u8]) -> Result<()>,
        out: &mut [u8],
    ) -> Result<()> {
        if tile >= self.tiles() || out.len() != self.tile_bytes() {
            return Err(Error::Internal(format!("tile {tile} of {self:?} into {} bytes", out.len())));
        }
        let mut rows = [vec![0u8; self.inner * 2], vec![0u8; self.inner * 2]];
        for g in 0..TILE_UNITS {
            for (half, bytes) in rows.iter_mut().enumerate() {
                match self.row(tile * TILE_UNITS + g, half) {
                    Some(row) => read(row, bytes)?,
                    None => bytes.fill(0),
                }
            }
            self.interleave(g, &rows, out);
        }
        Ok(())
    }

    /// Writes both rows of unit `g` of a tile.
    fn interleave(&self, g: usize, rows: &[Vec<u8>; 2], out: &mut [u8]) {
        // Eight bytes of each row make the 16 bytes of one lane for one multiplication.
        let pieces = rows[0].as_chunks::<8>().0.iter().zip(rows[1].as_chunks::<8>().0);
        for (i, (first, second)) in pieces.enumerate() {
            let (step, lane, low) = (i / 8, g * 4 + i % 8 / 2, i % 2);
            let to = &mut out[step * STEP_BYTES + low * (STEP_BYTES / 2) + lane * 16..][..16];
            to[..4].copy_from_slice(&first[..4]);
            to[4..8].copy_from_slice(&second[..4]);
            to[8..12].copy_from_slice(&first[4..]);
            to[12..].copy_from_slice(&second[4..]);
        }
    }

    /// The whole packed matrix of `values`, bf16 as bytes.
    pub fn pack(&self, values: &[u8]) -> Result<Vec<u8>> {
        let row_bytes = self.inner * 2;
        if values.len() != self.rows * row_bytes {
            return Err(Error::Internal(format!("{} bytes for {self:?}", values.len())));
        }
        let mut out = vec![0; self.bytes()];
        for (tile, out) in out.chunks_exact_mut(self.tile_bytes()).enumerate() {
            let read = |row: usize, to: &mut [u8]| {
                to.copy_from_slice(&values[row * row_bytes..][..row_bytes]);
                Ok(())
            };
            self.write_tile(tile, read, out)?;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element of a matrix of distinct values is where the formula says, and every other is zero.
    fn check(rows: usize, inner: usize, pairing: Pairing) {
        let tiles = Tiles::new(rows, inner, pairing).unwrap();
        let values: Vec<u16> = (0..rows * inner).map(|i| i as u16 + 1).collect();
        let packed = tiles.pack(bytemuck::cast_slice(&values)).unwrap();
        let packed: Vec<u16> = packed.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        let mut seen = vec![false; rows];
        for unit in 0..tiles.tiles() * TILE_UNITS {
            for half in 0..2 {
                let row = tiles.row(unit, half);
                if let Some(row) = row {
                    assert!(!std::mem::replace(&mut seen[row], true), "row {row} twice");
                }
                for k in 0..inner {
                    let expected = row.map_or(0, |row| values[row * inner + k]);
                    assert_eq!(packed[tiles.index(unit, half, k)], expected, "{tiles:?} {unit} {half} {k}");
                }
            }
        }
        assert!(seen.iter().all(|&s| s));
    }

    #[test]
    fn every_element_is_where_the_formula_says() {
        check(16, 32, Pairing::Neighbours);
        check(35, 96, Pairing::Neighbours);
        check(1, 32, Pairing::Neighbours);
        check(40, 64, Pairing::Rotary { head_dim: 8 });
        check(18, 32, Pairing::Rotary { head_dim: 6 });
        check(26, 64, Pairing::Stacked);
    }

    /// The formula against the PTX manual's fragment of `mma.m16n8k16`: register i of a lane holds two neighbouring
    /// columns of row `lane / 4 + 8 (i % 2)`, from column `2 (lane % 4) + 8 (i / 2)` on; K is permuted as said above.
    #[test]
    fn a_lane_holds_the_fragment_of_its_multiplication() {
        let tiles = Tiles::new(32, 64, Pairing::Neighbours).unwrap();
        for (tile, step, low, lane, register) in
            (0..2).flat_map(|t| (0..128).map(move |l| (t, l / 64, l / 32 % 2, l % 32, l % 4)))
        {
            let (row, pair) = (lane / 4 + register % 2 * 8, register / 2);
            let k = step * 32 + lane % 4 * 8 + low * 4 + pair * 2;
            let at = ((tile * 2 + step) * 2 + low) * 256 + lane * 8 + register * 2;
            assert_eq!(tiles.index(tile * 8 + row % 8, row / 8, k), at);
            assert_eq!(tiles.index(tile * 8 + row % 8, row / 8, k + 1), at + 1);
        }
    }

    #[test]
    fn shapes_that_do_not_divide_are_refused() {
        for (rows, inner, pairing) in [
            (16, 48, Pairing::Neighbours),
            (0, 32, Pairing::Neighbours),
            (16, 0, Pairing::Neighbours),
            (17, 32, Pairing::Stacked),
            (20, 32, Pairing::Rotary { head_dim: 8 }),
            (20, 32, Pairing::Rotary { head_dim: 5 }),
            (20, 32, Pairing::Rotary { head_dim: 0 }),
            (usize::MAX / 32, 64, Pairing::Neighbours),
        ] {
            assert!(Tiles::new(rows, inner, pairing).is_err(), "[{rows}, {inner}] {pairing:?}");
        }
        let tiles = Tiles::new(16, 32, Pairing::Neighbours).unwrap();
        assert!(tiles.pack(&[0; 16]).is_err());
        assert!(tiles.write_tile(1, |_, _| Ok(()), &mut [0; 1024]).is_err());
        assert!(tiles.write_tile(0, |_, _| Ok(()), &mut [0; 1000]).is_err());
    }
}
