//! torch's normal draws on a CUDA device in f64, straight from the definition: Philox4x32-10, then Box-Muller.

/// Element `element` of the call at generator offset `offset` (32-bit outputs, a multiple of 4), as long as one call
/// has no more elements than the card has threads.
pub fn normal(seed: u64, offset: u64, element: u32) -> f64 {
    let position = offset / 4;
    let mut counter = [position as u32, (position >> 32) as u32, element, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let first = 0xD251_1F53 * u64::from(counter[0]);
        let second = 0xCD9E_8D57 * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    // The float literals of cuRAND's header.
    let (c, tau) = (f64::from(2.328_306_4e-10_f32), f64::from(6.283_185_5_f32));
    let u = f64::from(counter[0]) * c + c / 2.0;
    let v = (f64::from(counter[1]) + 0.5) * f64::from((c as f32) * (tau as f32));
    (-2.0 * u.ln()).sqrt() * v.sin()
}
