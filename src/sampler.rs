//! The samplers of the flow-matching head: time grids and solver coefficients, computed once per request on the host.
//!
//! Every sampler of the official code, stochastic or not, is linear in the state x, the guided velocity v and one draw:
//! `x <- keep * x + velocity * v + noise * draw[k + 1]`. So the device runs one loop for all of them over a table of
//! [`SolverStep`]s, and everything that differs between samplers is in this file. Time runs from 0 (noise) to 1 (image).
//!
//! Numbers that the official code holds in float32 tensors (time grid, sinusoid) are computed in float32 in its order of
//! operations, because the network sees them; coefficients are computed in f64 from that grid and rounded once.

mod guidance;

pub use guidance::{Branches, GuidanceSchedule, MAX_GUIDANCE_SCALE, guidance_table};

use crate::error::{Error, Result};
use crate::prompt::Generation;
use half::bf16;
use serde::{Deserialize, Serialize};

/// Width of the sinusoid that embeds a time: half cosines, half sines.
pub const SINUSOID_WIDTH: usize = 256;
/// Most network evaluations per image token that a request may ask for.
pub const MAX_SAMPLING_STEPS: u32 = 1000;
/// Largest time shift; the released models use 1 to 3.2.
pub const MAX_TIMESTEPS_SHIFT: f64 = 100.0;
/// Smallest warp of the time grid: with less, neighbouring times of 1000 steps are one number in float32.
pub const MIN_TIMESTEPS_SHIFT: f64 = 1e-3;
/// Noise level of `sde` and `cps` when none is given.
pub const DEFAULT_NOISE_LEVEL: f64 = 0.8;

/// Length of the last, noiseless step of [`Sampler::Aug`].
const AUG_LAST_STEP: f64 = 0.04;

/// Which sampler of the official code is reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// August 2025: stochastic steps to t = 0.96, then a noiseless step of 0.04.
    Aug,
    /// The code inside the NextStep-1.1 checkpoint: stochastic steps all the way, noise in the last one too.
    Hf11,
    /// February 2026, `sde`: the default of its pipeline; `noise_level` scales the noise.
    Sde,
    /// February 2026, `cps`: keeps the marginal's variance; the last step is noiseless.
    Cps,
    /// February 2026, anything else: Euler steps, no noise after the first draw.
    Ode,
}

impl Sampler {
    /// All samplers, in the order of their documentation.
    pub const ALL: [Sampler; 5] = [Sampler::Aug, Sampler::Hf11, Sampler::Sde, Sampler::Cps, Sampler::Ode];

    /// The name in requests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Sampler::Aug => "aug",
            Sampler::Hf11 => "hf11",
            Sampler::Sde => "sde",
            Sampler::Cps => "cps",
            Sampler::Ode => "ode",
        }
    }

    /// The sampler of a name.
    pub fn from_name(name: &str) -> Option<Sampler> {
        Sampler::ALL.into_iter().find(|sampler| sampler.name() == name)
    }

    /// Which pipeline the sampler belongs to: it decides the prompt rows and the order of the draws. `hf11` replaces the
    /// sampler alone and runs in the August pipeline.
    pub fn generation(self) -> Generation {
        match self {
            Sampler::Aug | Sampler::Hf11 => Generation::August,
            Sampler::Sde | Sampler::Cps | Sampler::Ode => Generation::February,
        }
    }

    /// `torch.randn` calls per image token, the initial noise included. `cps` takes a draw for its noiseless last step.
    pub fn draws_per_token(self, num_sampling_steps: u32) -> u32 {
        match self {
            Sampler::Aug => num_sampling_steps,
            Sampler::Hf11 | Sampler::Sde | Sampler::Cps => num_sampling_steps + 1,
            Sampler::Ode => 1,
        }
    }

    /// Whether [`SolverStep::noise`] depends on `noise_level`.
    pub fn uses_noise_level(self) -> bool {
        matches!(self, Sampler::Sde | Sampler::Cps)
    }

    /// Fewest steps that make sense: with one step `aug` would go from t = 0 to t = 0.04 and stop.
    pub fn min_steps(self) -> u32 {
        if self == Sampler::Aug { 2 } else { 1 }
    }
}

/// One evaluation's place in the solver: `x <- keep * x + velocity * v + noise * draw[k + 1]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SolverStep {
    /// Factor of the state.
    pub keep: f32,
    /// Factor of the guided velocity.
    pub velocity: f32,
    /// Factor of the draw; exactly 0 where the step takes none.
    pub noise: f32,
}

/// The plan of one image token's sampling: N evaluations of the network, at these times, with these updates.
#[derive(Clone, Debug, PartialEq)]
pub struct Solver {
    /// t_k of evaluation k, `[N]`, as float32 in the official code.
    pub times: Vec<f32>,
    /// What follows evaluation k, `[N]`.
    pub steps: Vec<SolverStep>,
}

impl Solver {
    /// Checks the settings and computes grid and coefficients. `noise_level` counts for `sde` and `cps` only.
    pub fn new(
        sampler: Sampler,
        num_sampling_steps: u32,
        timesteps_shift: f64,
        noise_level: f64,
    ) -> Result<Solver> {
        check_settings(sampler, num_sampling_steps, timesteps_shift, noise_level)?;
        let times = time_grid(sampler, num_sampling_steps as usize, timesteps_shift);
        let steps = solver_steps(sampler, &times, noise_level);
        Ok(Solver { times, steps })
    }

    /// The times as the network of a bf16 model sees them. The update goes on with the unrounded ones.
    pub fn times_bf16(&self) -> Vec<f32> {
        self.times.iter().map(|&t| bf16::from_f32(t).to_f32()).collect()
    }
}

/// The bounds that [`Solver::new`] enforces, for request validation.
pub fn check_settings(
    sampler: Sampler,
    num_sampling_steps: u32,
    timesteps_shift: f64,
    noise_level: f64,
) -> Result<()> {
    if !(sampler.min_steps()..=MAX_SAMPLING_STEPS).contains(&num_sampling_steps) {
        let reason = format!(
            "is {num_sampling_steps}; sampler {} takes {} to {MAX_SAMPLING_STEPS}",
            sampler.name(),
            sampler.min_steps()
        );
        return Err(Error::request("steps", reason));
    }
    // Written so that NaN fails.
    if !(MIN_TIMESTEPS_SHIFT..=MAX_TIMESTEPS_SHIFT).contains(&timesteps_shift) {
        let reason =
            format!("is {timesteps_shift}; it must be from {MIN_TIMESTEPS_SHIFT} to {MAX_TIMESTEPS_SHIFT}");
        return Err(Error::request("timesteps_shift", reason));
    }
    if !(0.0..=1.0).contains(&noise_level) {
        return Err(Error::request("noise_level", format!("is {noise_level}; it must be from 0 to 1")));
    }
    Ok(())
}

/// t_k of the N evaluations.
fn time_grid(sampler: Sampler, evaluations: usize, timesteps_shift: f64) -> Vec<f32> {
    let grid = match sampler {
        // The warp is applied to the grid that ends at 0.96, and the last step stays 0.04: with a shift other than 1 the
        // integration stops short of 1. So does the official code.
        Sampler::Aug => linspace(1.0 - AUG_LAST_STEP, evaluations, evaluations),
        _ => linspace(1.0, evaluations + 1, evaluations),
    };
    grid.into_iter().map(|t| warp(t, timesteps_shift)).collect()
}

/// The first `count` of `points` values from 0 to `end`, as `torch.linspace` makes them in float32: counted from
/// the nearer end, multiply and add fused.
fn linspace(end: f64, points: usize, count: usize) -> Vec<f32> {
    let end = end as f32;
    let step = if points > 1 { end / (points - 1) as f32 } else { 0.0 };
    (0..count)
        .map(|i| if i < points / 2 { step * i as f32 } else { (-step).mul_add((points - 1 - i) as f32, end) })
        .collect()
}

/// t' = t / (s - (s - 1) t), in float32 with `s - 1` taken in double before, as Python does.
fn warp(t: f32, shift: f64) -> f32 {
    t / (shift as f32 - (shift - 1.0) as f32 * t)
}

fn solver_steps(sampler: Sampler, times: &[f32], noise_level: f64) -> Vec<SolverStep> {
    let last_time = times.last().map_or(0.0, |&t| f64::from(t));
    let last = times.len().saturating_sub(1);
    (0..times.len())
        .map(|k| {
            let t = f64::from(times[k]);
            let next = times.get(k + 1).map_or(1.0, |&t| f64::from(t));
            match sampler {
                Sampler::Aug if k == last => step(1.0, AUG_LAST_STEP, 0.0),
                Sampler::Aug | Sampler::Hf11 => score_sde_step(t, next),
                Sampler::Sde => sde_step(t, next, last_time, noise_level),
                Sampler::Cps => cps_step(t, next, noise_level),
                Sampler::Ode => step(1.0, next - t, 0.0),
            }
        })
        .collect()
}

fn step(keep: f64, velocity: f64, noise: f64) -> SolverStep {
    SolverStep { keep: keep as f32, velocity: velocity as f32, noise: noise as f32 }
}

/// A step that ends at `noise_part * (x - t v) + image_part * (x + (1 - t) v)`, plus noise: the two brackets are the
/// noise and the image that x and v point at.
fn mixed_step(t: f64, noise_part: f64, image_part: f64, noise: f64) -> SolverStep {
    step(noise_part + image_part, (1.0 - t) * image_part - t * noise_part, noise)
}

/// August, hf11: drift v + (1 - t) score = (1 + t) v - x, diffusion sqrt(2 (1 - t)).
fn score_sde_step(t: f64, next: f64) -> SolverStep {
    let dt = next - t;
    step(1.0 - dt, (1.0 + t) * dt, (2.0 * (1.0 - t) * dt).sqrt())
}

/// February `sde`. The deviation diverges at t = 0, where the official code takes the last grid time in place of sigma.
fn sde_step(t: f64, next: f64, last_time: f64, noise_level: f64) -> SolverStep {
    let (sigma, dt) = (1.0 - t, next - t);
    let guard = if sigma == 1.0 { last_time } else { sigma };
    let deviation = noise_level * (sigma / (1.0 - guard)).sqrt();
    let noise_part = (1.0 - next) - deviation * deviation * dt / (2.0 * sigma);
    mixed_step(t, noise_part, next, deviation * dt.sqrt())
}

/// February `cps`: part of the remaining noise is exchanged for a fresh draw.
fn cps_step(t: f64, next: f64, noise_level: f64) -> SolverStep {
    let (sin, cos) = (noise_level * std::f64::consts::FRAC_PI_2).sin_cos();
    mixed_step(t, (1.0 - next) * cos, next, (1.0 - next) * sin)
}

/// Sinusoids of times, [N, 256]: 128 cosines, then 128 sines, of t * exp(-ln(10000) i / 128) in float32. The times are
/// not multiplied by 1000.
pub fn sinusoids(times: &[f32]) -> Vec<f32> {
    const HALF: usize = SINUSOID_WIDTH / 2;
    let log_period = -(10_000f64.ln()) as f32;
    let mut rows = vec![0.0; times.len() * SINUSOID_WIDTH];
    for (&t, row) in times.iter().zip(rows.chunks_exact_mut(SINUSOID_WIDTH)) {
        let (cosines, sines) = row.split_at_mut(HALF);
        for (i, (cos, sin)) in cosines.iter_mut().zip(sines).enumerate() {
            let angle = t * (log_period * i as f32 / HALF as f32).exp();
            (*cos, *sin) = (angle.cos(), angle.sin());
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solver(sampler: Sampler, steps: u32, shift: f64) -> Solver {
        Solver::new(sampler, steps, shift, 0.8).unwrap()
    }

    #[test]
    fn aug_ends_with_a_noiseless_step_of_four_hundredths() {
        let s = solver(Sampler::Aug, 50, 3.2);
        assert_eq!(s.times.len(), 50);
        // 0.96 / (3.2 - 2.2 * 0.96)
        assert!((s.times[49] - 0.882353).abs() < 1e-6);
        assert_eq!(s.steps[49], SolverStep { keep: 1.0, velocity: 0.04, noise: 0.0 });
        assert!(s.steps[48].noise > 0.0);
    }

    #[test]
    fn the_last_step_of_every_sampler() {
        let last = |sampler| *solver(sampler, 10, 1.0).steps.last().unwrap();
        // hf11 leaves noise of sqrt(2) dt in the token.
        assert!((last(Sampler::Hf11).noise - 0.02f32.sqrt()).abs() < 1e-6);
        assert!(last(Sampler::Sde).noise > 0.0);
        assert_eq!(last(Sampler::Cps).noise, 0.0);
        // Without noise the last step lands on the image that x and v point at: x + (1 - t) v.
        for sampler in [Sampler::Cps, Sampler::Ode] {
            let step = last(sampler);
            assert!((step.keep - 1.0).abs() < 1e-6 && (step.velocity - 0.1).abs() < 1e-6, "{step:?}");
        }
    }

    #[test]
    fn no_noise_means_euler_steps() {
        // cps and sde at level 0 are the ODE.
        for sampler in [Sampler::Sde, Sampler::Cps] {
            let quiet = Solver::new(sampler, 7, 3.2, 0.0).unwrap();
            for (q, e) in quiet.steps.iter().zip(solver(Sampler::Ode, 7, 3.2).steps) {
                assert!((q.keep - e.keep).abs() < 1e-6 && (q.velocity - e.velocity).abs() < 1e-6);
                assert_eq!(q.noise, 0.0);
            }
        }
    }

    #[test]
    fn one_step_is_defined_where_it_is_allowed() {
        assert_eq!(solver(Sampler::Ode, 1, 1.0).steps, [SolverStep { keep: 1.0, velocity: 1.0, noise: 0.0 }]);
        for sampler in [Sampler::Hf11, Sampler::Sde, Sampler::Cps] {
            let steps = solver(sampler, 1, 3.2).steps;
            assert!(steps.len() == 1 && steps[0].keep.is_finite() && steps[0].noise.is_finite(), "{steps:?}");
        }
        assert!(matches!(
            Solver::new(Sampler::Aug, 1, 1.0, 0.8),
            Err(Error::InvalidRequest { field: "steps", .. })
        ));
    }

    #[test]
    fn coefficients_are_finite_over_the_whole_range() {
        for sampler in Sampler::ALL {
            for steps in [2, 3, 28, 999, MAX_SAMPLING_STEPS] {
                for shift in [MIN_TIMESTEPS_SHIFT, 0.5, 1.0, 3.2, MAX_TIMESTEPS_SHIFT] {
                    let s = Solver::new(sampler, steps, shift, 1.0).unwrap();
                    assert!(s.times.windows(2).all(|pair| pair[0] < pair[1]), "{sampler:?} {steps} {shift}");
                    assert!(
                        s.steps.iter().all(|s| [s.keep, s.velocity, s.noise].into_iter().all(f32::is_finite)
                            && s.noise >= 0.0),
                        "{sampler:?} {steps} {shift}"
                    );
                }
            }
        }
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        for steps in [0, MAX_SAMPLING_STEPS + 1, 1_000_000_000] {
            let refused = Solver::new(Sampler::Ode, steps, 1.0, 0.8);
            assert!(matches!(refused, Err(Error::InvalidRequest { field: "steps", .. })));
        }
        for shift in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e30] {
            let refused = Solver::new(Sampler::Ode, 4, shift, 0.8);
            assert!(matches!(refused, Err(Error::InvalidRequest { field: "timesteps_shift", .. })));
        }
        for level in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            let refused = Solver::new(Sampler::Sde, 4, 1.0, level);
            assert!(matches!(refused, Err(Error::InvalidRequest { field: "noise_level", .. })));
        }
    }

    #[test]
    fn names_round_trip() {
        for sampler in Sampler::ALL {
            assert_eq!(Sampler::from_name(sampler.name()), Some(sampler));
        }
        assert_eq!(Sampler::from_name("euler"), None);
    }
}
