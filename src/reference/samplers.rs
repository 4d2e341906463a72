//! The official samplers as they are written there, in f64 and with scores, data and noise estimates spelled out: what
//! the collapsed coefficients of `crate::sampler` and the kernel's loop over them are judged by.

/// A sampler of the official code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampler {
    /// August 2025.
    Aug,
    /// Inside the NextStep-1.1 checkpoint.
    Hf11,
    /// February 2026, `sde`, with its noise level.
    Sde(f64),
    /// February 2026, `cps`, with its noise level.
    Cps(f64),
    /// February 2026, everything else.
    Ode,
}

/// Length of the last, noiseless step of [`Sampler::Aug`].
const AUG_LAST_STEP: f64 = 0.04;

/// The grid of evaluation times, `t / (s - (s - 1) t)` over equal steps.
pub fn times(sampler: Sampler, evaluations: usize, shift: f64) -> Vec<f64> {
    let warp = |t: f64| t / (shift - (shift - 1.0) * t);
    let even = |k: usize| match sampler {
        Sampler::Aug => k as f64 * (1.0 - AUG_LAST_STEP) / (evaluations - 1) as f64,
        _ => k as f64 / evaluations as f64,
    };
    (0..evaluations).map(|k| warp(even(k))).collect()
}

/// The result of a run from `noise` (all images at once). `draw(k)` is the noise of step k; `velocity(k, x)` is the
/// guided velocity of evaluation k.
pub fn sample(
    sampler: Sampler,
    times: &[f64],
    noise: &[f64],
    mut draw: impl FnMut(usize) -> Vec<f64>,
    mut velocity: impl FnMut(usize, &[f64]) -> Vec<f64>,
) -> Vec<f64> {
    let mut x = noise.to_vec();
    let last_time = times[times.len() - 1];
    for (k, &t) in times.iter().enumerate() {
        let v = velocity(k, &x);
        let next = times.get(k + 1).copied().unwrap_or(1.0);
        let dt = next - t;
        let is_last = k + 1 == times.len();
        let takes_draw = !matches!((sampler, is_last), (Sampler::Aug, true) | (Sampler::Ode, _));
        let w = if takes_draw { draw(k) } else { vec![0.0; x.len()] };
        for ((x, v), w) in x.iter_mut().zip(v).zip(w) {
            let noise_estimate = *x - v * t;
            let image_estimate = *x + v * (1.0 - t);
            *x = match sampler {
                Sampler::Aug if is_last => *x + v * AUG_LAST_STEP,
                Sampler::Aug | Sampler::Hf11 => {
                    let variance = (1.0 - t) * (1.0 - t) + t * (1.0 - t);
                    let score = (t * v - *x) / variance;
                    let drift = v + (1.0 - t) * score;
                    *x + drift * dt + (2.0 * (1.0 - t)).sqrt() * w * dt.sqrt()
                }
                Sampler::Ode => noise_estimate * (1.0 - next) + image_estimate * next,
                Sampler::Cps(level) => {
                    let deviation = (1.0 - next) * (level * std::f64::consts::FRAC_PI_2).sin();
                    let kept = ((1.0 - next) * (1.0 - next) - deviation * deviation).max(0.0).sqrt();
                    noise_estimate * kept + image_estimate * next + deviation * w
                }
                Sampler::Sde(level) => {
                    let sigma = 1.0 - t;
                    let guard = if sigma == 1.0 { last_time } else { sigma };
                    let deviation = level * (sigma / (1.0 - guard)).sqrt();
                    noise_estimate * (1.0 - next) + image_estimate * next
                        - deviation * deviation * dt / (2.0 * sigma) * noise_estimate
                        + deviation * dt.sqrt() * w
                }
            };
        }
    }
    x
}
