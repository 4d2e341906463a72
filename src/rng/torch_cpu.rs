//! `torch.randn` on the CPU: mt19937 with torch's two ways of making normals.
//!
//! torch's vectorised builds take their own logarithm and sine, so its last bits differ between builds; values here
//! agree with it to about 1e-6.

const STATE_WORDS: usize = 624;
const SHIFT: usize = 397;
/// Number of elements from which torch fills a contiguous float tensor in blocks.
const BLOCK: usize = 16;

/// torch's CPU generator.
#[derive(Clone)]
pub struct CpuGenerator {
    state: [u32; STATE_WORDS],
    next: usize,
    /// The second normal of the last scalar pair, kept between calls as torch keeps it.
    spare: Option<f64>,
}

impl CpuGenerator {
    /// `torch.manual_seed`: only the low 32 bits of the seed reach the engine.
    pub fn new(seed: u64) -> CpuGenerator {
        let mut state = [seed as u32; STATE_WORDS];
        for i in 1..STATE_WORDS {
            let previous = state[i - 1];
            state[i] = (previous ^ (previous >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        CpuGenerator { state, next: STATE_WORDS, spare: None }
    }

    fn twist(&mut self) {
        for i in 0..STATE_WORDS {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE_WORDS] & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE_WORDS] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// The next 32-bit output of mt19937.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == STATE_WORDS {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform float in [0, 1) with 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 / 16_777_216.0
    }

    /// Uniform double in [0, 1) with 53 bits; the first output is the high word.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.next_u32());
        let bits = (high << 32 | u64::from(self.next_u32())) & ((1 << 53) - 1);
        bits as f64 / (1u64 << 53) as f64
    }

    /// `torch.randn` of `out.len()` contiguous floats.
    pub fn randn(&mut self, out: &mut [f32]) {
        if out.len() < BLOCK {
            for value in out {
                *value = self.scalar_normal() as f32;
            }
            return;
        }
        for value in out.iter_mut() {
            *value = self.uniform_f32();
        }
        for block in out.chunks_exact_mut(BLOCK) {
            transform_block(block);
        }
        // The last block is drawn afresh when it is not whole, and overlaps the one before it.
        if !out.len().is_multiple_of(BLOCK) {
            let start = out.len() - BLOCK;
            let last = &mut out[start..];
            for value in last.iter_mut() {
                *value = self.uniform_f32();
            }
            transform_block(last);
        }
    }

    fn scalar_normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = std::f64::consts::TAU * u1;
        self.spare = Some(radius * theta.sin());
        radius * theta.cos()
    }
}

/// Uniforms to normals in place: element j < 8 is paired with element j + 8.
fn transform_block(block: &mut [f32]) {
    let (left, right) = block.split_at_mut(BLOCK / 2);
    for (a, b) in left.iter_mut().zip(right) {
        let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
        let theta = std::f32::consts::TAU * *b;
        (*a, *b) = (radius * theta.cos(), radius * theta.sin());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn randn(seed: u64, count: usize) -> Vec<f32> {
        let mut out = vec![0.0; count];
        CpuGenerator::new(seed).randn(&mut out);
        out
    }

    fn assert_near(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= tolerance, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn mt19937_known_answers() {
        // The reference program's output for its default seed: first value, and the 10000th (the C++ standard's check).
        let mut generator = CpuGenerator::new(5489);
        assert_eq!(generator.next_u32(), 3_499_211_612);
        for _ in 1..9_999 {
            generator.next_u32();
        }
        assert_eq!(generator.next_u32(), 4_123_659_995);
    }

    #[test]
    fn known_answers_of_torch() {
        assert_near(&randn(0, 3), &[1.5410, -0.2934, -2.1788], 6e-5);
        assert_near(
            &randn(0, 16),
            &[
                -1.1258, -1.1524, -0.2506, -0.4339, 0.8487, 0.6920, -0.3160, -2.1152, 0.3223, -1.2633,
                0.3500, 0.3081, 0.1198, 1.2377, 1.1168, -0.2473,
            ],
            6e-5,
        );
        assert_near(&randn(42, 64)[..4], &[1.926915, 1.487284, 0.900717, -2.105521], 2e-6);
    }

    #[test]
    fn seeds_are_cut_to_32_bits() {
        assert_eq!(randn(7, 20), randn(7 + (1 << 32), 20));
    }

    #[test]
    fn ragged_tail_is_redrawn() {
        // 20 elements: the first four keep the block of 16, the last 16 come from outputs 20..36.
        let tail = randn(3, 20);
        let mut generator = CpuGenerator::new(3);
        for _ in 0..20 {
            generator.next_u32();
        }
        let mut fresh = vec![0.0; 16];
        generator.randn(&mut fresh);
        assert_eq!(tail[4..], fresh[..]);
        assert_eq!(tail[..4], randn(3, 16)[..4]);
    }

    #[test]
    fn spare_normal_survives_between_calls() {
        let mut generator = CpuGenerator::new(11);
        let (mut first, mut second) = ([0.0; 1], [0.0; 2]);
        generator.randn(&mut first);
        generator.randn(&mut second);
        assert_eq!([first[0], second[0], second[1]], randn(11, 3)[..]);
    }
}
