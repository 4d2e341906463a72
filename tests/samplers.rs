//! Samplers, guidance schedules and time sinusoids against what the official code recorded.

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use warpstep::prompt::Generation;
use warpstep::rng::RecordedDraws;
use warpstep::sampler::{
    Branches, DEFAULT_NOISE_LEVEL, GuidanceSchedule, Sampler, Solver, guidance_table, sinusoids,
};

const TOKEN_DIM: usize = 64;

fn golden(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/golden/cases/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The values of a tensor and its dtype; bf16 is widened.
fn tensor(file: &SafeTensors, name: &str) -> Option<(Vec<f32>, Dtype)> {
    let view = file.tensor(name).ok()?;
    let bytes = view.data();
    let values = match view.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::BF16 => {
            bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        other => panic!("{name}: {other:?}"),
    };
    Some((values, view.dtype()))
}

fn max_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max)
}

fn cases() -> Vec<Value> {
    serde_json::from_slice(&golden("index.json")).unwrap()
}

fn case(name: &str) -> Value {
    cases().into_iter().find(|case| case["name"] == name).unwrap()
}

fn number(args: &Value, key: &str, default: f64) -> f64 {
    args.get(key).map_or(default, |v| v.as_f64().unwrap())
}

fn sampler_of(generation: &str, args: &Value) -> Sampler {
    match generation {
        "feb" => Sampler::from_name(args["sde_type"].as_str().unwrap()).unwrap(),
        name => Sampler::from_name(name).unwrap(),
    }
}

#[test]
fn recorded_velocities_lead_to_the_recorded_states() {
    let bytes = golden("samplers.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let variants = case("samplers")["variants"].as_object().unwrap().clone();
    let mut checked = 0;
    for (name, args) in variants.iter().filter(|(name, _)| name.as_str() != "cfgnorm") {
        let get = |tail: &str| tensor(&file, &format!("{name}.{tail}")).map(|(values, _)| values);
        let sampler = sampler_of(name.split('_').next().unwrap(), args);
        let steps = number(args, "num_sampling_steps", f64::NAN) as usize;
        let level = number(args, "noise_level", DEFAULT_NOISE_LEVEL);
        let solver = Solver::new(sampler, steps as u32, number(args, "timesteps_shift", 1.0), level).unwrap();
        assert_eq!(solver.times, get("t_net").unwrap(), "{name}: times");

        let rows = args["rows"].as_u64().unwrap() as usize;
        let cfg_img = number(args, "cfg2", number(args, "cfg_img", 1.0));
        let branches = Branches::from_scales(number(args, "cfg", 1.0), cfg_img).unwrap();
        assert_eq!(branches.count() as u64, args["branches"].as_u64().unwrap(), "{name}: branches");

        let (noise, step_noise) = (get("noise").unwrap(), get("step_noise").unwrap_or_default());
        let drawn_rows = noise.len() / TOKEN_DIM;
        let drawn_steps = step_noise.len() / noise.len();
        assert_eq!(drawn_steps + 1, sampler.draws_per_token(steps as u32) as usize, "{name}: draws");
        let shape = [1, drawn_steps, drawn_rows, TOKEN_DIM];
        let draws = RecordedDraws::from_noise_and_steps(shape, &noise, &step_noise, rows).unwrap();

        let (x_net, v) = (get("x_net").unwrap(), get("v").unwrap());
        let mut x = draws.draw(0, 0).unwrap().to_vec();
        for (k, step) in solver.steps.iter().enumerate() {
            let error = max_error(&x, &x_net[k * x.len()..][..x.len()]);
            assert!(error < 2e-5, "{name}: state before evaluation {k} is off by {error}");
            for (i, x) in x.iter_mut().enumerate() {
                let draw = if step.noise == 0.0 { 0.0 } else { draws.draw(0, k + 1).unwrap()[i] };
                *x = step.keep * *x + step.velocity * v[k * rows * TOKEN_DIM + i] + step.noise * draw;
            }
        }
        let error = max_error(&x, &get("out").unwrap());
        assert!(error < 2e-5, "{name}: result is off by {error}");
        checked += 1;
    }
    assert_eq!(checked, 30, "5 samplers x 2 shifts x 3 branch counts");
}

#[test]
fn times_and_guidance_of_every_pipeline_case() {
    let bytes = golden("../schedules.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut checked = 0;
    for case in cases().iter().filter(|case| case["kind"] == "pipeline") {
        let (name, args) = (case["name"].as_str().unwrap(), &case["kwargs"]);
        let generation = case["generation"].as_str().unwrap();
        let sampler = sampler_of(generation, args);
        let steps = number(args, "num_sampling_steps", f64::NAN) as u32;
        let shift = number(args, "timesteps_shift", 1.0);
        let solver = Solver::new(sampler, steps, shift, DEFAULT_NOISE_LEVEL).unwrap();
        let (times, dtype) = tensor(&file, &format!("{name}/fm.t_net")).unwrap();
        let seen_by_network = if dtype == Dtype::BF16 { solver.times_bf16() } else { solver.times };
        assert_eq!(seen_by_network, times, "{name}");

        let recorded_steps =
            case["tensors"].get("draw.step").map_or(0, |shape| shape[0][1].as_u64().unwrap());
        assert_eq!(u64::from(sampler.draws_per_token(steps)), recorded_steps + 1, "{name}");

        let schedule = match args.get("cfg_schedule").and_then(Value::as_str) {
            Some("linear") if sampler.generation() == Generation::February => GuidanceSchedule::LinearRising,
            Some("linear") => GuidanceSchedule::Linear,
            _ => GuidanceSchedule::Constant,
        };
        let recorded = tensor(&file, &format!("{name}/cfg_schedule")).unwrap().0;
        let (cfg, cfg_img) = (number(args, "cfg", 1.0), number(args, "cfg_img", 1.0));
        let table = guidance_table(schedule, cfg, cfg_img, recorded.len() / 2);
        let error = max_error(&table.concat(), &recorded);
        assert!(error < 1e-6, "{name}: guidance is off by {error}");
        checked += 1;
    }
    assert_eq!(checked, 27);
}

#[test]
fn sinusoids_match_in_both_precisions() {
    for name in ["fmnet_tiny-a_float32.safetensors", "fmnet_tiny-a_bfloat16.safetensors"] {
        let bytes = golden(name);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (times, recorded) = (tensor(&file, "t").unwrap().0, tensor(&file, "sinusoid").unwrap().0);
        let error = max_error(&sinusoids(&times), &recorded);
        assert!(error < 2.5e-7, "{name}: {error}");
    }
}
