//! One `torch.randn` call on a CUDA device: the mapping from elements to counters and lanes.

use super::philox;

/// Threads per block of torch's random kernels.
pub const BLOCK_THREADS: u64 = 256;
/// Most threads torch starts for a random kernel on an H100 SXM or H200: 132 SMs of 2048 threads.
pub const H100_MAX_THREADS: u64 = 132 * 2048;

/// The `numel` normals that one eager `torch.randn` call returns, addressable one by one.
///
/// torch starts T = 256 * grid threads, as many as elements up to what the card holds. Thread i takes four normals a
/// round, and lane k of round r is element i + T (4 r + k). Up to the cap T covers all elements, so each is lane 0 of
/// its own thread; above it the layout depends on the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaRandn {
    seed: u64,
    offset: u64,
    numel: u64,
    threads: u64,
}

impl CudaRandn {
    /// `offset`: the generator's position before the call, in 32-bit outputs, a multiple of 4. `max_threads`: SMs times
    /// threads per SM of the card that is to be matched.
    pub fn new(seed: u64, offset: u64, numel: u64, max_threads: u64) -> CudaRandn {
        let grid = (max_threads / BLOCK_THREADS).min(numel.div_ceil(BLOCK_THREADS)).max(1);
        CudaRandn { seed, offset, numel, threads: grid * BLOCK_THREADS }
    }

    /// Number of elements.
    pub fn numel(&self) -> u64 {
        self.numel
    }

    /// Whether every element is lane 0 of its own thread, so that the values do not depend on the card.
    pub fn one_element_per_thread(&self) -> bool {
        self.numel <= self.threads
    }

    /// Element `index`, counted in row-major order. Defined beyond `numel` as well.
    pub fn at(&self, index: u64) -> f32 {
        let (thread, step) = (index % self.threads, index / self.threads);
        let counter = philox::counter(thread, self.offset, step / 4);
        philox::normal4(counter, philox::key(self.seed))[(step % 4) as usize]
    }

    /// Elements `first..first + out.len()`.
    pub fn fill(&self, first: u64, out: &mut [f32]) {
        for (index, value) in (first..).zip(out) {
            *value = self.at(index);
        }
    }

    /// Every element. For calls known to be small.
    pub fn all(&self) -> Vec<f32> {
        (0..self.numel).map(|index| self.at(index)).collect()
    }

    /// The generator's offset after the call.
    pub fn next_offset(&self) -> u64 {
        // A call for no elements launches nothing.
        if self.numel == 0 {
            return self.offset;
        }
        self.offset.wrapping_add(((self.numel - 1) / (self.threads * 4) + 1) * 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(randn: CudaRandn, count: usize) -> Vec<f32> {
        randn.all()[..count].to_vec()
    }

    fn assert_near(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 2e-6, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn known_answers_of_torch() {
        let seed0 = CudaRandn::new(0, 0, 12, H100_MAX_THREADS);
        assert_near(
            &first(seed0, 12),
            &[
                -0.924662, -0.425344, -2.643846, 0.145184, -0.120867, -0.579726, -0.622852, -0.328387,
                -1.074542, -0.363144, -1.67105, 2.265505,
            ],
        );
        let seed42 = CudaRandn::new(42, 0, 64, H100_MAX_THREADS);
        assert_near(&first(seed42, 4), &[0.194019, 2.161374, -0.172051, 0.84906]);
        assert_eq!(seed42.next_offset(), 4);
        let second = CudaRandn::new(42, seed42.next_offset(), 64, H100_MAX_THREADS);
        assert_near(&first(second, 4), &[0.139138, -0.108216, -0.717422, 0.756649]);
    }

    #[test]
    fn lanes_and_rounds_above_the_cap() {
        // A card of 2 blocks: 512 threads, 4 lanes, so element 2048 is lane 0 of round 1 of thread 0.
        let randn = CudaRandn::new(9, 40, 5000, 512);
        assert!(!randn.one_element_per_thread());
        let words = |thread, round| philox::normal4(philox::counter(thread, 40, round), philox::key(9));
        assert_eq!(randn.at(3), words(3, 0)[0]);
        assert_eq!(randn.at(512 + 3), words(3, 0)[1]);
        assert_eq!(randn.at(3 * 512 + 511), words(511, 0)[3]);
        assert_eq!(randn.at(4 * 512), words(0, 1)[0]);
        assert_eq!(randn.at(9 * 512 + 7), words(7, 2)[1]);
        // 5000 elements of 512 x 4 per round are three rounds, four outputs each.
        assert_eq!(randn.next_offset(), 40 + 12);
    }

    #[test]
    fn offsets_grow_by_rounds() {
        let grow = |numel, threads| CudaRandn::new(0, 0, numel, threads).next_offset();
        assert_eq!(grow(0, 512), 0);
        assert_eq!(grow(1, 512), 4);
        assert_eq!(grow(2048, 512), 4);
        assert_eq!(grow(2049, 512), 8);
        assert_eq!(grow(4 * H100_MAX_THREADS, H100_MAX_THREADS), 4);
        assert_eq!(grow(4 * H100_MAX_THREADS + 1, H100_MAX_THREADS), 8);
    }

    #[test]
    fn values_below_the_cap_do_not_depend_on_the_count_or_the_card() {
        let one = CudaRandn::new(5, 16, 64, H100_MAX_THREADS);
        let many = CudaRandn::new(5, 16, 64 * 100, 64 * 2048);
        assert!(many.one_element_per_thread());
        for index in [0, 1, 63] {
            assert_eq!(one.at(index), many.at(index));
        }
    }
}
