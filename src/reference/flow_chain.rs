//! The sampler of one image token as the `flow_chain` op defines it: evaluations, guidance, solver steps, the token and
//! its projection back into the transformer.

use super::Precision;
use super::flow_head::{Layer, Trunk, standardize};
use num_traits::Float;

/// Factors of one solver step: `x <- keep x + velocity v + noise draw`.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Of the state.
    pub keep: f32,
    /// Of the guided velocity.
    pub velocity: f32,
    /// Of the draw; 0 where none is taken.
    pub noise: f32,
}

/// Inputs of one token. Sequences are branch-major: sequence = branch * images + image.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// Weights.
    pub trunk: Trunk<'a>,
    /// `image_in_projector`
    pub next: Layer<'a>,
    /// `[N, S, (3L + 2) F]`
    pub modulation: &'a [f32],
    /// `[N]`
    pub steps: Vec<Step>,
    /// cfg and cfg_img of this token.
    pub guidance: [f32; 2],
    /// `[draws, B, K]`: the initial noise, then that of step 0 and on.
    pub draws: &'a [f32],
    /// `[N, B, K]`: states that replace x before each evaluation.
    pub forced_x: Option<&'a [f32]>,
    /// Images B.
    pub images: usize,
    /// Guidance branches R.
    pub branches: usize,
    /// Values per token K.
    pub token_dim: usize,
    /// LayerNorm over the token.
    pub use_norm: bool,
    /// Norm rescale after guidance.
    pub rescale: bool,
}

/// Everything that the op can write, widened.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// `[N, S, K]`
    pub v_raw: Vec<f64>,
    /// `[N, B, K]`: after guidance.
    pub v: Vec<f64>,
    /// `[N, B, K]`: after the step.
    pub x: Vec<f64>,
    /// `[B, K]`: before `use_norm`.
    pub sampled: Vec<f64>,
    /// `[B, K]`
    pub token: Vec<f64>,
    /// `[S, D]`
    pub x_next: Vec<f64>,
}

/// Classifier-free guidance of one image from the velocities of its branches (cond; cond, nothing; or cond, image only,
/// nothing), with the optional norm rescale. The rescale acts only where there is guidance: cfg above 1, and cfg_img
/// above 1 with three branches.
pub fn guide<T: Float + std::iter::Sum>(branches: &[&[T]], cfg: T, cfg_img: T, rescale: bool) -> Vec<T> {
    let cond = branches[0];
    let mut guided: Vec<T> = match branches {
        [_] => cond.to_vec(),
        [c, u] => c.iter().zip(*u).map(|(&c, &u)| u + cfg * (c - u)).collect(),
        [c, i, n, ..] => {
            (c.iter().zip(*i).zip(*n)).map(|((&c, &i), &n)| n + cfg_img * (i - n) + cfg * (c - i)).collect()
        }
        [] => Vec::new(),
    };
    let acts = match branches.len() {
        1 => false,
        2 => cfg > T::one(),
        _ => cfg > T::one() && cfg_img > T::one(),
    };
    if rescale && acts {
        let norm = |v: &[T]| v.iter().map(|&v| v * v).sum::<T>().sqrt();
        let tiny = T::from(1e-6).unwrap_or_else(T::zero);
        let factor = (norm(cond) / (norm(&guided) + tiny)).max(T::zero()).min(T::one());
        guided.iter_mut().for_each(|v| *v = *v * factor);
    }
    guided
}

/// One token. The state, guidance and the solver step are not rounded; what the network reads and returns, and the
/// token, are.
pub fn sample_token<P: Precision>(i: &Inputs) -> Outputs {
    let values = i.images * i.token_dim;
    let modulation_width = i.modulation.len() / (i.steps.len() * i.images * i.branches);
    let mut modulations = i.modulation.chunks_exact(modulation_width);
    let mut out = Outputs::default();
    let mut x: Vec<P::T> = P::load_all(&i.draws[..values]);
    for (n, step) in i.steps.iter().enumerate() {
        if let Some(forced) = i.forced_x {
            x = P::load_all(&forced[n * values..][..values]);
        }
        // [S, K]
        let mut raw: Vec<Vec<P::T>> = Vec::new();
        for _ in 0..i.branches {
            for image in x.chunks_exact(i.token_dim) {
                let modulation = P::load_all(modulations.next().unwrap_or(&[]));
                raw.push(i.trunk.velocity::<P>(image, &modulation));
            }
        }
        let (cfg, cfg_img) = (P::load(i.guidance[0]), P::load(i.guidance[1]));
        let mut guided = Vec::new();
        for image in 0..i.images {
            let branches: Vec<&[P::T]> = (0..i.branches).map(|b| &raw[b * i.images + image][..]).collect();
            guided.extend(guide(&branches, cfg, cfg_img, i.rescale));
        }
        for (at, (x, &v)) in x.iter_mut().zip(&guided).enumerate() {
            *x = P::load(step.keep) * *x + P::load(step.velocity) * v;
            if step.noise != 0.0 {
                *x += P::load(step.noise) * P::load(i.draws[(n + 1) * values + at]);
            }
        }
        out.v_raw.extend(raw.iter().flat_map(|row| P::widen_all(row)));
        out.v.extend(P::widen_all(&guided));
        out.x.extend(P::widen_all(&x));
    }
    let sampled: Vec<P::T> = x.iter().map(|&v| P::store(v)).collect();
    let token: Vec<P::T> = if i.use_norm {
        sampled.chunks_exact(i.token_dim).flat_map(|t| standardize::<P>(t)).map(P::store).collect()
    } else {
        sampled.clone()
    };
    for _ in 0..i.branches {
        for image in token.chunks_exact(i.token_dim) {
            out.x_next.extend(P::widen_all(&i.next.apply::<P>(image)));
        }
    }
    out.sampled = P::widen_all(&sampled);
    out.token = P::widen_all(&token);
    out
}
