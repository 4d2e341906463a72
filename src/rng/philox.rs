//! Philox4x32-10 and cuRAND's Box-Muller transform, in cuRAND's order of operations.

/// Multipliers of the two products of a round.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Added to the key after every round (golden ratio, square root of three less one).
const KEY_INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words of one counter value. Word 0 is the least significant of `counter` and `key`.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        let a = u64::from(c0) * u64::from(MULTIPLIERS[0]);
        let b = u64::from(c2) * u64::from(MULTIPLIERS[1]);
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        k0 = k0.wrapping_add(KEY_INCREMENTS[0]);
        k1 = k1.wrapping_add(KEY_INCREMENTS[1]);
    }
    [c0, c1, c2, c3]
}

/// cuRAND's 2^-32, as the float literal of its header.
const INV_2POW32: f32 = 2.328_306_4e-10;
/// cuRAND's 2 pi 2^-32: a product of two floats, rounded to float.
const INV_2POW32_2PI: f32 = INV_2POW32 * std::f32::consts::TAU;

/// Two normals from two words: `[s sin v, s cos v]` with `s = sqrt(-2 ln u)`.
///
/// In float with the multiply-adds fused, as nvcc compiles them by default. The device takes the fast sine and
/// cosine, so it agrees with this to about 1e-6 and not to the bit.
pub fn box_muller(x: u32, y: u32) -> [f32; 2] {
    let u = (x as f32).mul_add(INV_2POW32, INV_2POW32 / 2.0);
    let v = (y as f32).mul_add(INV_2POW32_2PI, INV_2POW32_2PI / 2.0);
    let s = (-2.0 * u.ln()).sqrt();
    [s * v.sin(), s * v.cos()]
}

/// [`box_muller`] in double, from the same float constants: what the float version is measured against.
pub fn box_muller_f64(x: u32, y: u32) -> [f64; 2] {
    let (c, d) = (f64::from(INV_2POW32), f64::from(INV_2POW32_2PI));
    let u = f64::from(x) * c + c / 2.0;
    let v = f64::from(y) * d + d / 2.0;
    let s = (-2.0 * u.ln()).sqrt();
    [s * v.sin(), s * v.cos()]
}

/// The counter of thread `subsequence` after `offset` 32-bit outputs (a multiple of 4) and `round` more calls.
pub fn counter(subsequence: u64, offset: u64, round: u64) -> [u32; 4] {
    let position = (offset / 4).wrapping_add(round);
    [position as u32, (position >> 32) as u32, subsequence as u32, (subsequence >> 32) as u32]
}

/// The key of a seed.
pub fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// Four normals of one counter: what `curand_normal4` returns.
pub fn normal4(counter: [u32; 4], key: [u32; 2]) -> [f32; 4] {
    let [a, b, c, d] = philox4x32_10(counter, key);
    let ([n0, n1], [n2, n3]) = (box_muller(a, b), box_muller(c, d));
    [n0, n1, n2, n3]
}

#[cfg(test)]
mod tests {
    use super::*;

    // Published known answers of Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn random123_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn box_muller_stays_finite_at_the_ends_and_near_the_double_version() {
        for x in [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX] {
            for y in [0, 1, 0x4000_0000, u32::MAX] {
                let (single, double) = (box_muller(x, y), box_muller_f64(x, y));
                for (s, d) in single.into_iter().zip(double) {
                    assert!(s.is_finite(), "{x:#x} {y:#x}");
                    // At x near 2^32 ln(u) of the float 1 is 0 where the double sees 1 - 1e-10: s differs by 2e-5.
                    assert!((f64::from(s) - d).abs() < 4e-5, "{x:#x} {y:#x}: {s} {d}");
                }
            }
        }
    }

    #[test]
    fn counters_carry_into_the_second_word() {
        assert_eq!(counter(7, 4 * 0xffff_ffff, 0), [0xffff_ffff, 0, 7, 0]);
        assert_eq!(counter(1 << 32, 4 * 0xffff_ffff, 1), [0, 1, 0, 1]);
    }
}
