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
use crate::parallel::try_split_rows;
use std::ops::Range;

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

    /// Packs the steps from `first` on, counted through all tiles, into `out`, which must hold whole ones: any share of
    /// the matrix, so that any number of threads can take equal ones. `read` writes the bf16 elements `columns` of a row
    /// to where it is told.
    pub fn write_steps(
        &self,
        first: usize,
        mut read: impl FnMut(usize, Range<usize>, &mut [u8]) -> Result<()>,
        out: &mut [u8],
    ) -> Result<()> {
        let per_tile = self.inner / STEP;
        let end = first.checked_add(out.len() / STEP_BYTES);
        if !out.len().is_multiple_of(STEP_BYTES) || end.is_none_or(|end| end > self.tiles() * per_tile) {
            return Err(Error::Internal(format!("{} bytes from step {first} of {self:?}", out.len())));
        }
        let mut rows = [Vec::new(), Vec::new()];
        let (mut step, mut left) = (first, out);
        while !left.is_empty() {
            let (tile, start) = (step / per_tile, step % per_tile);
            let steps = (per_tile - start).min(left.len() / STEP_BYTES);
            let (part, rest) = left.split_at_mut(steps * STEP_BYTES);
            let columns = start * STEP..(start + steps) * STEP;
            for g in 0..TILE_UNITS {
                for (half, bytes) in rows.iter_mut().enumerate() {
                    bytes.resize(columns.len() * 2, 0);
                    match self.row(tile * TILE_UNITS + g, half) {
                        Some(row) => read(row, columns.clone(), bytes)?,
                        None => bytes.fill(0),
                    }
                }
                interleave(g, &rows, part);
            }
            (step, left) = (step + steps, rest);
        }
        Ok(())
    }

    /// The whole packed matrix of `values`, bf16 as bytes, by all cores.
    pub fn pack(&self, values: &[u8]) -> Result<Vec<u8>> {
        let row_bytes = self.inner * 2;
        if values.len() != self.rows * row_bytes {
            return Err(Error::Internal(format!("{} bytes for {self:?}", values.len())));
        }
        let mut out = vec![0; self.bytes()];
        let read = |row: usize, columns: Range<usize>, to: &mut [u8]| {
            to.copy_from_slice(&values[row * row_bytes..][columns.start * 2..columns.end * 2]);
            Ok(())
        };
        let per_tile = self.inner / STEP;
        try_split_rows(&mut out, self.tile_bytes(), |tile, out| {
            self.write_steps(tile * per_tile, read, out)
        })?;
        Ok(out)
    }
}

/// Writes both rows of unit `g` into steps of a tile. Every offset within a step is a constant, so that this vectorises:
/// it runs over all weights of a model.
fn interleave(g: usize, rows: &[Vec<u8>; 2], out: &mut [u8]) {
    const ROW_BYTES: usize = STEP * 2;
    let pieces = rows[0].as_chunks::<ROW_BYTES>().0.iter().zip(rows[1].as_chunks::<ROW_BYTES>().0);
    for ((first, second), step) in pieces.zip(out.as_chunks_mut::<STEP_BYTES>().0) {
        // Eight bytes of each row make the 16 bytes of one lane for one multiplication.
        for i in 0..ROW_BYTES / 8 {
            let (lane, low) = (g * 4 + i / 2, i % 2);
            let to = &mut step[low * (STEP_BYTES / 2) + lane * 16..][..16];
            to[..4].copy_from_slice(&first[i * 8..i * 8 + 4]);
            to[4..8].copy_from_slice(&second[i * 8..i * 8 + 4]);
            to[8..12].copy_from_slice(&first[i * 8 + 4..i * 8 + 8]);
            to[12..].copy_from_slice(&second[i * 8 + 4..i * 8 + 8]);
        }
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

    /// Shares that end within tiles, in any order, make the same matrix.
    #[test]
    fn shares_of_any_size_make_the_whole() {
        let tiles = Tiles::new(70, 96, Pairing::Stacked).unwrap();
        let values: Vec<u16> = (0..70 * 96).map(|i| i as u16).collect();
        let whole = tiles.pack(bytemuck::cast_slice(&values)).unwrap();
        let read = |row: usize, columns: Range<usize>, to: &mut [u8]| {
            to.copy_from_slice(bytemuck::cast_slice(&values[row * 96..][columns]));
            Ok(())
        };
        for share in [1, 2, 4, 7, 100] {
            let mut out = vec![0xff; whole.len()];
            for (i, part) in
                out.chunks_mut(share * STEP_BYTES).enumerate().collect::<Vec<_>>().into_iter().rev()
            {
                tiles.write_steps(i * share, read, part).unwrap();
            }
            assert!(out == whole, "shares of {share} steps");
        }
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
        for (first, bytes) in [(1, 1024), (0, 1000), (0, 2048), (usize::MAX, 1024)] {
            assert!(
                tiles.write_steps(first, |_, _, _| Ok(()), &mut vec![0; bytes]).is_err(),
                "{first} {bytes}"
            );
        }
    }
}
