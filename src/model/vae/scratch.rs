//! A memory whose places are taken and given back while steps are laid out.

use crate::error::{Error, Result};

/// Every tensor starts at a multiple of this, as a fresh allocation would.
pub const ALIGNMENT: usize = 256;

/// Bytes of a memory.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub offset: usize,
    pub bytes: usize,
}

/// A memory that is as large as the most that was in use at once; first fit.
#[derive(Debug, Default)]
pub struct Scratch {
    /// In use, by offset.
    taken: Vec<Region>,
    bytes: usize,
}

impl Scratch {
    /// The lowest free place for `bytes`.
    pub fn take(&mut self, bytes: usize) -> Result<Region> {
        let mut offset = 0usize;
        let mut index = 0;
        for (i, region) in self.taken.iter().enumerate() {
            if offset.checked_add(bytes).is_some_and(|end| end <= region.offset) {
                break;
            }
            offset = (region.offset + region.bytes).next_multiple_of(ALIGNMENT);
            index = i + 1;
        }
        let region = Region { offset, bytes };
        let end = offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        let end = end.ok_or_else(|| Error::Internal(format!("{bytes} bytes of VAE activations overflow")))?;
        self.bytes = self.bytes.max(end);
        self.taken.insert(index, region);
        Ok(region)
    }

    /// Frees the region at `offset`.
    pub fn give(&mut self, offset: usize) {
        self.taken.retain(|region| region.offset != offset);
    }

    /// The most that was in use.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_gives_the_lowest_gap_and_refuses_what_overflows() {
        let mut scratch = Scratch::default();
        let offsets: Vec<usize> = [100, 300, 1].map(|bytes| scratch.take(bytes).unwrap().offset).to_vec();
        assert_eq!(offsets, [0, 256, 768]);
        scratch.give(256);
        assert_eq!(scratch.take(513).unwrap().offset, 1024);
        assert_eq!(scratch.take(512).unwrap().offset, 256);
        assert!(scratch.take(usize::MAX - 100).is_err());
        assert_eq!(scratch.bytes(), 1792);
    }
}
