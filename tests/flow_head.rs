//! The flow head's ops and references against what the official code recorded: one network evaluation (`fmnet`), whole
//! sampler runs (`samplers`), guidance with the norm rescale (`cfgnorm`), torch's noise; and what the chain promises
//! beyond its numbers.

#[path = "flow_head/chain.rs"]
mod chain;
#[path = "flow_head/golden.rs"]
mod golden;

use chain::{Chain, Head, Token};
use golden::{Golden, index_entry, max_error, mean_error};
use half::bf16;
use serde_json::Value;
use warpstep::ops::DType;
use warpstep::ops::params::SolverStep;
use warpstep::reference::flow_chain::guide;
use warpstep::reference::{Exact, PlainBf16, samplers};
use warpstep::rng::RecordedDraws;
use warpstep::sampler::{DEFAULT_NOISE_LEVEL, Sampler, Solver, sinusoids};

const TOKEN_DIM: usize = 64;
/// Teacher-forced, for values of size about 1 (README of the fixtures).
const F32_TOLERANCE: f32 = 2e-5;

/// A step that keeps x.
const IDLE: SolverStep = SolverStep { keep: 1.0, velocity: 0.0, noise: 0.0, pad: 0 };

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// The values of a `[rows, rows, len]` array at `[i, i]`.
fn diagonal(values: &[f32], rows: usize, len: usize) -> Vec<f32> {
    (0..rows).flat_map(|i| values[(i * rows + i) * len..][..len].to_vec()).collect()
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], dtype: DType) {
    let (max, mean) = (max_error(found, expected), mean_error(found, expected));
    println!("{what}: max {max:.2e}, mean {mean:.2e}");
    match dtype {
        DType::F32 => assert!(max <= F32_TOLERANCE, "{what} is off by {max}"),
        DType::Bf16 => assert!(max <= 0.06 && mean <= 0.01, "{what} is off by {max}, {mean} on average"),
    }
}

/// Six rows with a time each: six evaluations of six images, of which the diagonal was recorded.
fn network(model: &str, dtype: DType) {
    let golden = Golden::open(&format!(
        "cases/fmnet_{model}_{}",
        if dtype == DType::F32 { "float32" } else { "bfloat16" }
    ));
    let weights = Golden::open(match model {
        "tiny-a" => "tiny-a/model",
        _ => "gqa5-b/model-00003-of-00003",
    });
    let head = Head::load(&weights, dtype);
    let [x, t, c] = ["x", "t", "c"].map(|name| golden.get(name));
    let rows = t.len();

    // the reference, in f64 and as the official code rounds
    for row in 0..rows {
        let part = |values: &[f32], len: usize| values[row * len..][..len].to_vec();
        let (x, c) = (part(&x, TOKEN_DIM), part(&c, c.len() / rows));
        let found = match dtype {
            DType::F32 => narrow(&head.reference().velocity::<Exact>(&wide(&x), t[row], &wide(&c))),
            DType::Bf16 => head.reference().velocity::<PlainBf16>(&x, t[row], &c),
        };
        let expected = part(&golden.get("velocity"), TOKEN_DIM);
        assert_close(&format!("{model} reference velocity {row}"), &found, &expected, dtype);
    }

    // the ops
    let mut chain = Chain::new(&head, dtype, 4);
    let found_time = chain.time_embedding(&sinusoids(&t));
    assert_close("time_embed", &chain.read(found_time), &golden.get("time_embed"), dtype);
    let found_cond = chain.condition(&c);
    assert_close("cond_embed", &chain.read(found_cond), &golden.get("cond_embed"), dtype);
    let modulation = chain.modulation(found_time, rows, found_cond, rows);
    let found = chain.read(modulation);
    let outputs = found.len() / (rows * rows);
    let thirds = diagonal(&found, rows, outputs);
    for block in 0..head.blocks {
        let of_row = |row: usize| thirds[row * outputs + block * 3 * head.width..][..3 * head.width].to_vec();
        let found: Vec<f32> = (0..rows).flat_map(of_row).collect();
        assert_close(&format!("block{block}.mod"), &found, &golden.get(&format!("block{block}.mod")), dtype);
    }
    let token = chain.run(Token {
        steps: vec![IDLE; rows],
        images: rows,
        forced_x: Some(x.repeat(rows)),
        ..Token::new(modulation, x.clone())
    });
    let found = diagonal(&token.v_raw, rows, TOKEN_DIM);
    assert_close("velocity", &found, &golden.get("velocity"), dtype);
    // The scratch rows keep the residual of the last evaluation, which is row 5's.
    let last_block = golden.get(&format!("block{}", head.blocks - 1));
    let row = (rows - 1) * head.width..rows * head.width;
    assert_close("last block", &token.h[row.clone()], &last_block[row], dtype);

    // image_in_projector: tokens that the sampler leaves as they are
    let tokens = golden.get("in_proj.in");
    let images = tokens.len() / TOKEN_DIM;
    let (time, cond) =
        (chain.time_embedding(&sinusoids(&t[..1])), chain.condition(&c[..images * head.hidden]));
    let modulation = chain.modulation(time, 1, cond, images);
    let found = chain.run(Token { steps: vec![IDLE], images, ..Token::new(modulation, tokens) });
    assert_close("in_proj", &found.x_next, &golden.get("in_proj.out"), dtype);
}

#[test]
fn one_evaluation_tiny_f32() {
    network("tiny-a", DType::F32);
}

#[test]
fn one_evaluation_tiny_bf16() {
    network("tiny-a", DType::Bf16);
}

#[test]
fn one_evaluation_gqa_f32() {
    network("gqa5-b", DType::F32);
}

#[test]
fn one_evaluation_gqa_bf16() {
    network("gqa5-b", DType::Bf16);
}

/// What a variant of `samplers` was recorded with.
struct Variant {
    solver: Solver,
    literal: samplers::Sampler,
    shift: f64,
    cfg: [f32; 2],
    images: usize,
    branches: usize,
    draws: RecordedDraws,
}

impl Variant {
    fn new(golden: &Golden, name: &str, arguments: &Value) -> Variant {
        let number = |key: &str, default: f64| arguments.get(key).map_or(default, |v| v.as_f64().unwrap());
        let level = number("noise_level", DEFAULT_NOISE_LEVEL);
        // Named <generation>_s<shift>_m<branches>.
        let (sampler, literal) = match name.rsplit_once("_s").unwrap().0 {
            "aug" => (Sampler::Aug, samplers::Sampler::Aug),
            "hf11" => (Sampler::Hf11, samplers::Sampler::Hf11),
            "feb_sde" => (Sampler::Sde, samplers::Sampler::Sde(level)),
            "feb_cps" => (Sampler::Cps, samplers::Sampler::Cps(level)),
            "feb_ode" => (Sampler::Ode, samplers::Sampler::Ode),
            other => panic!("{other}"),
        };
        let steps = number("num_sampling_steps", f64::NAN) as u32;
        let shift = number("timesteps_shift", f64::NAN);
        let images = number("rows", f64::NAN) as usize;
        let noise = golden.get(&format!("{name}.noise"));
        let step_noise = golden.find(&format!("{name}.step_noise")).unwrap_or_default();
        let shape = [1, step_noise.len() / noise.len(), noise.len() / TOKEN_DIM, TOKEN_DIM];
        Variant {
            solver: Solver::new(sampler, steps, shift, level).unwrap(),
            literal,
            shift,
            cfg: [number("cfg", 1.0) as f32, number("cfg2", number("cfg_img", 1.0)) as f32],
            images,
            branches: number("branches", f64::NAN) as usize,
            draws: RecordedDraws::from_noise_and_steps(shape, &noise, &step_noise, images).unwrap(),
        }
    }

    fn steps(&self) -> Vec<SolverStep> {
        let step = |s: &warpstep::sampler::SolverStep| SolverStep {
            keep: s.keep,
            velocity: s.velocity,
            noise: s.noise,
            pad: 0,
        };
        self.solver.steps.iter().map(step).collect()
    }

    /// [draws, B, K]
    fn stored_draws(&self, count: usize) -> Vec<f32> {
        (0..count).flat_map(|j| self.draws.draw(0, j).unwrap().to_vec()).collect()
    }
}

fn variants() -> Vec<(String, Value)> {
    let all = index_entry("samplers")["variants"].as_object().unwrap().clone();
    let variants: Vec<_> = all.into_iter().filter(|(name, _)| name != "cfgnorm").collect();
    assert_eq!(variants.len(), 30, "5 samplers x 2 shifts x 3 branch counts");
    variants
}

/// From condition and draws to the token, on the device: teacher-forced, then on its own.
#[test]
fn every_sampler_makes_the_recorded_token() {
    let golden = Golden::open("cases/samplers");
    let head = Head::load(&Golden::open("tiny-a/model"), DType::F32);
    for (name, arguments) in variants() {
        let variant = Variant::new(&golden, &name, &arguments);
        let get = |part: &str| golden.get(&format!("{name}.{part}"));
        let mut chain = Chain::new(&head, DType::F32, 4);
        let steps = variant.steps();
        let time = chain.time_embedding(&sinusoids(&variant.solver.times));
        let cond = chain.condition(&get("c"));
        let modulation = chain.modulation(time, steps.len(), cond, variant.images * variant.branches);
        let noisy = steps.iter().rposition(|s| s.noise != 0.0).map_or(0, |k| k + 1);
        let token = Token {
            steps: steps.clone(),
            images: variant.images,
            branches: variant.branches,
            guidance: variant.cfg,
            ..Token::new(modulation, variant.stored_draws(noisy + 1))
        };
        let x_net = get("x_net");
        let values = variant.images * TOKEN_DIM;
        for forced in [true, false] {
            let what = |part: &str| format!("{name} {part}, {}", if forced { "forced" } else { "free" });
            let found = chain.run(Token { forced_x: forced.then(|| x_net.clone()), ..token.clone() });
            assert_close(&what("v"), &found.v, &get("v"), DType::F32);
            assert_close(&what("x"), &found.x[..x_net.len() - values], &x_net[values..], DType::F32);
            assert_close(&what("out"), &found.sampled, &get("out"), DType::F32);
        }
    }
}

/// The reference network under the literal samplers, in f64 from end to end.
#[test]
fn literal_samplers_make_the_recorded_token() {
    let golden = Golden::open("cases/samplers");
    let weights = Head::load(&Golden::open("tiny-a/model"), DType::F32);
    let head = weights.reference();
    for (name, arguments) in variants() {
        let variant = Variant::new(&golden, &name, &arguments);
        let c = wide(&golden.get(&format!("{name}.c")));
        let times = samplers::times(variant.literal, variant.solver.times.len(), variant.shift);
        let found = samplers::sample(
            variant.literal,
            &times,
            &wide(variant.draws.draw(0, 0).unwrap()),
            |k| wide(variant.draws.draw(0, k + 1).unwrap()),
            |k, x| {
                let velocity = |sequence: usize| {
                    let image = sequence % variant.images;
                    let c = &c[sequence * head_width(&c, &variant)..][..head_width(&c, &variant)];
                    head.velocity::<Exact>(&x[image * TOKEN_DIM..][..TOKEN_DIM], times[k] as f32, c)
                };
                let raw: Vec<Vec<f64>> = (0..variant.images * variant.branches).map(velocity).collect();
                (0..variant.images)
                    .flat_map(|image| {
                        let branch = |b: usize| raw[b * variant.images + image].as_slice();
                        let branches: Vec<&[f64]> = (0..variant.branches).map(branch).collect();
                        guide(&branches, f64::from(variant.cfg[0]), f64::from(variant.cfg[1]), false)
                    })
                    .collect()
            },
        );
        assert_close(&name, &narrow(&found), &golden.get(&format!("{name}.out")), DType::F32);
    }
}

fn head_width(c: &[f64], variant: &Variant) -> usize {
    c.len() / (variant.images * variant.branches)
}

/// A network that returns given velocities: the final norm is scaled by zero and shifted by them, the output layer is
/// the identity.
#[test]
fn rescaled_guidance_matches_the_recording() {
    let golden = Golden::open("cases/samplers");
    for branches in [2, 3] {
        let input = golden.get(&format!("cfgnorm.v{branches}_in"));
        let images = input.len() / (branches * TOKEN_DIM);
        let head = Head::identity(TOKEN_DIM);
        let mut chain = Chain::new(&head, DType::F32, 4);
        // [S, 5 F]: nothing for the block, then shift and scale
        let mut modulation = Vec::new();
        for velocity in input.chunks_exact(TOKEN_DIM) {
            modulation.extend([0.0; 3 * TOKEN_DIM]);
            modulation.extend_from_slice(velocity);
            modulation.extend([-1.0; TOKEN_DIM]);
        }
        let modulation = chain.upload("modulation", modulation);
        for rescale in [true, false] {
            let token = chain.run(Token {
                steps: vec![IDLE],
                images,
                branches,
                guidance: [7.5, 2.0],
                rescale,
                ..Token::new(modulation, vec![0.5; images * TOKEN_DIM])
            });
            let expected = golden.get(&format!("cfgnorm.v{branches}_out"));
            if rescale {
                assert_close(&format!("cfgnorm v{branches}"), &token.v, &expected, DType::F32);
            } else {
                assert!(max_error(&token.v, &expected) > 1.0, "the recording shows no rescale");
            }
        }
    }
}

/// A random token of a small head, for promises that need no recording.
fn random_token(chain: &mut Chain<'_>, images: usize, branches: usize) -> Token {
    let c: Vec<f32> = (0..images * branches * 64).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
    let time = chain.time_embedding(&sinusoids(&[0.0, 0.5]));
    let cond = chain.condition(&c);
    let modulation = chain.modulation(time, 2, cond, images * branches);
    let draws = (0..3 * images * TOKEN_DIM).map(|i| ((i * 53 % 97) as f32 - 48.0) / 30.0).collect();
    let step = |noise| SolverStep { keep: 0.9, velocity: 0.5, noise, pad: 0 };
    Token {
        steps: vec![step(0.3), step(0.2)],
        images,
        branches,
        guidance: [3.0, 1.5],
        use_norm: true,
        rescale: true,
        ..Token::new(modulation, draws)
    }
}

/// Selects `image` of the values of a `[outer, images, TOKEN_DIM]` array.
fn of_image(values: &[f32], images: usize, image: usize, len: usize) -> Vec<f32> {
    values.chunks_exact(images * len).flat_map(|chunk| chunk[image * len..][..len].to_vec()).collect()
}

#[test]
fn an_image_of_a_batch_is_the_single_run_bit_for_bit() {
    let head = Head::load(&Golden::open("tiny-a/model"), DType::Bf16);
    // Five images of three branches: a full pass of eight sequences and one of seven.
    let (images, branches) = (5, 3);
    let mut chain = Chain::new(&head, DType::Bf16, 4);
    let batch = random_token(&mut chain, images, branches);
    let together = chain.run(batch.clone());
    let modulation = chain.read(batch.modulation);
    let outputs = modulation.len() / (2 * images * branches);
    for image in 0..images {
        let mut alone = Chain::new(&head, DType::Bf16, 3);
        let single = Token {
            modulation: alone.upload("modulation", of_image(&modulation, images, image, outputs)),
            draws: of_image(&batch.draws, images, image, TOKEN_DIM),
            images: 1,
            ..batch.clone()
        };
        let found = alone.run(single);
        assert_eq!(found.x, of_image(&together.x, images, image, TOKEN_DIM), "image {image}");
        assert_eq!(found.x_next, of_image(&together.x_next, images, image, 64), "image {image}");
    }
}

#[test]
fn the_grid_changes_no_bit() {
    for dtype in [DType::F32, DType::Bf16] {
        let head = Head::load(&Golden::open("tiny-a/model"), dtype);
        let run = |sm_count| {
            let mut chain = Chain::new(&head, dtype, sm_count);
            let token = random_token(&mut chain, 1, 2);
            let found = chain.run(token);
            (found.x, found.x_next)
        };
        let expected = run(1);
        for sm_count in [2, 5, 48] {
            assert!(run(sm_count) == expected, "{} on {sm_count} SMs", dtype.name());
        }
    }
}

#[test]
fn a_token_that_is_not_finite_is_reported_once() {
    let head = Head::load(&Golden::open("tiny-a/model"), DType::F32);
    let mut chain = Chain::new(&head, DType::F32, 4);
    let token = random_token(&mut chain, 2, 2);
    assert_eq!(chain.run(token.clone()).nonfinite, 0);
    let mut broken = token.clone();
    // The last value of the second image's initial noise.
    broken.draws[2 * TOKEN_DIM - 1] = f32::INFINITY;
    assert_eq!(chain.run(Token { token: 1, ..broken.clone() }).nonfinite, 2);
    assert_eq!(chain.run(Token { token: 1, nonfinite: 1, ..broken }).nonfinite, 1);
    // A draw that nobody made is no zero.
    let short = Token { draws: token.draws[..4 * TOKEN_DIM].to_vec(), ..token };
    let found = chain.run(short);
    assert!(found.nonfinite == 1 && found.sampled.iter().all(|v| v.is_nan()));
}

/// Known answers of torch (`torch.randn` on a CUDA device), and the host's own generator over the same stream.
#[test]
fn draws_are_those_of_torch() {
    let known: [(u64, u64, usize, &[f32]); 3] = [
        (
            0,
            0,
            12,
            &[
                -0.924662, -0.425344, -2.643846, 0.145184, -0.120867, -0.579726, -0.622852, -0.328387,
                -1.074542, -0.363144, -1.67105, 2.265505,
            ],
        ),
        (42, 0, 64, &[0.194019, 2.161374, -0.172051, 0.849060]),
        (42, 4, 64, &[0.139138, -0.108216, -0.717422, 0.756649]),
    ];
    for (seed, base_offset, numel, expected) in known {
        let found = chain::randn(seed, base_offset, 0, 1, (0, 1), numel, false);
        assert!(max_error(&found[..expected.len()], expected) < 2e-6, "seed {seed}: {found:?}");
    }
    let plan =
        warpstep::rng::DrawPlan::new(Sampler::Aug, 3, 77, (2, 2), TOKEN_DIM as u32, true, None).unwrap();
    let found = chain::randn(77, plan.base_offset, 5, 3, (2, 2), TOKEN_DIM, false);
    let expected: Vec<f32> = (0..3).flat_map(|j| plan.draw(5, j)).collect();
    assert!(max_error(&found, &expected) < 2e-6);
    let rounded = chain::randn(77, plan.base_offset, 5, 3, (2, 2), TOKEN_DIM, true);
    let expected: Vec<f32> = found.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
    assert_eq!(rounded, expected);
}
