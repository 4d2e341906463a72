//! Decoder output to 8-bit pixels.

use super::Precision;
use num_traits::Float;

/// `rint(clamp(x / 2 + 0.5, 0, 1) * 255)`, halves to the even level, as a number from 0 to 255.
pub fn to_rgb8<P: Precision>(x: &[P::T]) -> Vec<P::T> {
    let (zero, half, one) = (P::constant(0.0), P::constant(0.5), P::constant(1.0));
    let level = |v: P::T| {
        let level = (v * half + half).max(zero).min(one) * P::constant(255.0);
        let (below, above) = (level.floor(), level.ceil());
        let even = if below % P::constant(2.0) == zero { below } else { above };
        match (level - below).partial_cmp(&half) {
            Some(std::cmp::Ordering::Less) => below,
            Some(std::cmp::Ordering::Equal) => even,
            _ => above,
        }
    };
    x.iter().map(|&v| level(v)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Exact;
    use super::*;

    #[test]
    fn halves_go_to_even_and_the_range_is_clamped() {
        let of_level = |level: f64| level / 255.0 * 2.0 - 1.0;
        let levels = [0.0, 1.0, 254.0, 255.0, 100.4, 100.6];
        let x: Vec<f64> = levels.iter().map(|&l| of_level(l)).collect();
        assert_eq!(to_rgb8::<Exact>(&x), [0.0, 1.0, 254.0, 255.0, 100.0, 101.0]);
        // x = 0 is exactly level 127.5.
        assert_eq!(to_rgb8::<Exact>(&[0.0, -1.5, 7.0, f64::INFINITY]), [128.0, 0.0, 255.0, 255.0]);
    }
}
