//! Cases of kinds `fmnet` (one evaluation of the flow head) and `samplers` (whole solver runs).

use super::pipeline::{network_times, read};
use super::{CaseFile, Comparer, Context, Line, Models, Tolerance};
use crate::device::{Copies, NodeList};
use crate::error::Result;
use crate::model::nextstep::NextStep;
use crate::model::plan::{Draws, RunSpec};
use crate::model::run::Run;
use crate::ops::harness::encode;
use crate::ops::{DType, params::SolverStep};
use crate::sampler::{Sampler, Solver, sinusoids};
use serde_json::Value;
use std::sync::Arc;

/// Prompts nobody reads: these cases start at the condition.
fn no_prompts(sequences: usize) -> Vec<Vec<u32>> {
    vec![vec![0]; sequences]
}

fn base_spec(model: &NextStep, images: usize, branches: usize) -> RunSpec {
    RunSpec {
        prompts: no_prompts(images * branches),
        sources: Default::default(),
        images,
        branches,
        grid: (1, 1),
        steps: Vec::new(),
        sinusoid: Vec::new(),
        guidance: vec![[1.0, 1.0]],
        draws_per_token: 1,
        draws: Draws::Recorded(Vec::new()),
        use_norm: false,
        rescale: false,
        frequencies: vec![1.0; model.config.head_dim / 2],
        rope_offset: vec![0; images * branches],
        pos_embed: false,
        preview_every_rows: None,
        taps: true,
        poison: true,
    }
}

/// `fmnet`: six rows, each with its own time, as six evaluations of six images of which the diagonal counts.
pub(super) fn network(context: &Context<'_>, models: &mut Models) -> Result<Vec<Line>> {
    let case = context.case;
    let dtype = context.dtype();
    let model = models.load_without_vae(context, case.text("model")?, dtype)?;
    let (x, t, c) = (case.tensor("x")?, case.tensor("t")?, case.tensor("c")?);
    let rows = t.values.len();
    let dims = model.flow.dims;
    let table = sinusoids(&t.values);
    let mut comparer = Comparer::new(case);
    comparer.tensor("sinusoid", &table, "host", Tolerance::Max(2e-6))?;
    let mut spec = base_spec(&model, rows, 1);
    spec.steps = vec![SolverStep { keep: 1.0, velocity: 0.0, noise: 0.0, pad: 0 }; rows];
    spec.sinusoid = table;
    spec.draws = Draws::Recorded(x.values.clone());
    let mut run = Run::new(model.clone(), context.device, context.options.selection.clone(), spec)?;
    let buffers = run.buffers();
    let missing = || case.invalid("run without taps");
    let forced: Vec<f32> = x.values.repeat(rows);
    run.stream().put(buffers.taps.forced_x.ok_or_else(missing)?, bytemuck::cast_slice(&forced))?;
    let (bytes, _) = encode(dtype, c.values.clone());
    run.stream().put(buffers.condition, &bytes)?;
    let mut list = NodeList::new();
    run.record_sample(&mut list, true)?;
    run.run_once(&list, |_, _| Ok(()))?;
    let tolerance = match dtype {
        DType::F32 => Tolerance::Max(2e-5),
        DType::Bf16 => Tolerance::MeanMax { mean: 0.01, max: 0.06 },
    };
    let time = read(run.stream(), buffers.time, dtype)?;
    // Embedded before the list by the same kernel as the condition.
    comparer.tensor("time_embed", &time, list.writer(buffers.cond), tolerance)?;
    let cond = read(run.stream(), buffers.cond, dtype)?;
    comparer.tensor("cond_embed", &cond, list.writer(buffers.cond), tolerance)?;
    let modulation = read(run.stream(), buffers.modulation, dtype)?;
    let outputs = dims.modulation_outputs();
    for block in 0..dims.blocks {
        let mut diagonal = Vec::new();
        for row in 0..rows {
            let start = (row * rows + row) * outputs + block * 3 * dims.width;
            diagonal.extend_from_slice(&modulation[start..start + 3 * dims.width]);
        }
        let kernel = list.writer(buffers.modulation);
        comparer.tensor(&format!("block{block}.mod"), &diagonal, kernel, tolerance)?;
    }
    let v = read(run.stream(), buffers.taps.v_raw.ok_or_else(missing)?, DType::F32)?;
    let diagonal: Vec<f32> =
        (0..rows).flat_map(|r| v[(r * rows + r) * dims.token_dim..][..dims.token_dim].to_vec()).collect();
    comparer.tensor("velocity", &diagonal, list.writer(buffers.tokens), tolerance)?;
    let mut required: Vec<String> =
        ["sinusoid", "time_embed", "cond_embed", "velocity"].map(String::from).to_vec();
    required.extend((0..dims.blocks).map(|b| format!("block{b}.mod")));
    Ok(comparer.finish(&required))
}

/// `samplers`: every variant from its recorded condition and draws to its token.
pub(super) fn samplers(context: &Context<'_>, models: &mut Models) -> Result<Vec<Line>> {
    let case = context.case;
    let model = models.load_without_vae(context, case.text("model")?, context.dtype())?;
    let variants = case
        .meta
        .get("variants")
        .and_then(Value::as_object)
        .ok_or_else(|| case.invalid("metadata: no variants"))?;
    let mut comparer = Comparer::new(case);
    let mut required = Vec::new();
    for (name, arguments) in variants.iter().filter(|(name, _)| *name != "cfgnorm") {
        variant(context, &model, name, arguments, &mut comparer)?;
        required.extend(["x_net", "v", "out", "t_net"].map(|t| format!("{name}.{t}")));
    }
    for branches in [2, 3] {
        rescale(context, &model, branches, &mut comparer)?;
        required.push(format!("cfgnorm.v{branches}_out"));
    }
    Ok(comparer.finish(&required))
}

fn variant(
    context: &Context<'_>,
    model: &Arc<NextStep>,
    name: &str,
    arguments: &Value,
    comparer: &mut Comparer<'_>,
) -> Result<()> {
    let case = context.case;
    let dtype = context.dtype();
    let number = |key: &str, default: f64| arguments.get(key).and_then(Value::as_f64).unwrap_or(default);
    // Named <generation>_s<shift>_m<branches>.
    let sampler = match name.rsplit_once("_s").map(|(generation, _)| generation) {
        Some("aug") => Sampler::Aug,
        Some("hf11") => Sampler::Hf11,
        Some("feb_sde") => Sampler::Sde,
        Some("feb_cps") => Sampler::Cps,
        Some("feb_ode") => Sampler::Ode,
        _ => return Err(case.invalid(format!("sampler variant {name:?}"))),
    };
    let cfg = (number("cfg", 1.0), number("cfg2", number("cfg_img", 1.0)));
    let solver = Solver::new(
        sampler,
        number("num_sampling_steps", 6.0) as u32,
        number("timesteps_shift", 1.0),
        number("noise_level", 0.8),
    )?;
    let times = network_times(&solver, dtype);
    let (images, branches) = (number("rows", 1.0) as usize, number("branches", 1.0) as usize);
    let tensor = |part: &str| case.tensor(&format!("{name}.{part}"));
    let noise = tensor("noise")?;
    let (draw_rows, k) = (noise.shape[0], noise.shape[1]);
    let tiled = |values: &[f32]| -> Vec<f32> {
        (0..images).flat_map(|image| values[image % draw_rows * k..][..k].to_vec()).collect()
    };
    let mut draws = tiled(&noise.values);
    if case.has(&format!("{name}.step_noise")) {
        let steps = tensor("step_noise")?;
        for step in 0..steps.shape[0] {
            draws.extend(tiled(steps.at(step)));
        }
    }
    let mut spec = base_spec(model, images, branches);
    spec.steps = solver.steps.iter().map(Into::into).collect();
    spec.sinusoid = sinusoids(&times);
    spec.guidance = vec![[cfg.0 as f32, cfg.1 as f32]];
    spec.draws_per_token = draws.len() / (images * k);
    spec.draws = Draws::Recorded(draws.clone());
    let steps = spec.steps.len();
    let mut run = Run::new(model.clone(), context.device, context.options.selection.clone(), spec)?;
    let buffers = run.buffers();
    let (bytes, _) = encode(dtype, tensor("c")?.values);
    run.stream().put(buffers.condition, &bytes)?;
    let mut list = NodeList::new();
    run.record_sample(&mut list, false)?;
    run.run_once(&list, |_, _| Ok(()))?;
    let mut tap = |span: Option<crate::device::Span>| {
        read(run.stream(), span.ok_or_else(|| case.invalid("run without taps"))?, DType::F32)
    };
    let (v, x, out) = (tap(buffers.taps.v)?, tap(buffers.taps.x)?, tap(buffers.taps.sampled)?);
    // The network is given the initial noise, then the state after every step but the last.
    let mut x_net = draws[..images * k].to_vec();
    x_net.extend_from_slice(&x[..(steps - 1) * images * k]);
    let tolerance = Tolerance::Max(2e-5);
    let kernel = list.writer(buffers.tokens);
    comparer.tensor(&format!("{name}.t_net"), &times, "host", Tolerance::Exact)?;
    comparer.tensor(&format!("{name}.x_net"), &x_net, kernel, tolerance)?;
    comparer.tensor(&format!("{name}.v"), &v, kernel, tolerance)?;
    comparer.tensor(&format!("{name}.out"), &out, kernel, tolerance)
}

/// cfg and cfg_img of the recorded rescale, as the case's own note says.
const RESCALE_SCALES: (f64, f64) = (7.5, 2.0);

/// `cfgnorm`: guidance with the norm rescale on, from recorded velocities; a host formula here, the same one
/// that the chain's own cases hold it to.
fn rescale(
    context: &Context<'_>,
    model: &Arc<NextStep>,
    branches: usize,
    comparer: &mut Comparer<'_>,
) -> Result<()> {
    let case: &CaseFile = context.case;
    let input = case.tensor(&format!("cfgnorm.v{branches}_in"))?;
    let k = model.flow.dims.token_dim;
    let images = input.values.len() / (branches * k);
    let (cfg, cfg_img) = RESCALE_SCALES;
    let velocity: Vec<f64> = input.values.iter().map(|&v| f64::from(v)).collect();
    let mut got = Vec::with_capacity(images * k);
    for image in 0..images {
        let branch = |b: usize| &velocity[(b * images + image) * k..][..k];
        let guided = crate::reference::flow_chain::guide(
            &(0..branches).map(branch).collect::<Vec<_>>(),
            cfg,
            cfg_img,
            true,
        );
        got.extend(guided.iter().map(|&v| v as f32));
    }
    comparer.tensor(&format!("cfgnorm.v{branches}_out"), &got, "reference", Tolerance::Max(2e-5))
}
