//! Every op and variant on its own: the registry's cases, prepared once and launched many times.

use super::ceilings::flush_span;
use super::samples::{Effort, Floor, Row, time};
use crate::device::{Buffer, Device, NodeList, Span};
use crate::error::Result;
use crate::ops::harness::{Case, Prepared, Scale, prepare};
use crate::ops::{self, DType, Op};
use std::sync::Arc;

/// Which cases, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only this op.
    pub op: Option<String>,
    /// Only this variant.
    pub variant: Option<String>,
    /// Only shapes that contain this.
    pub shape: Option<String>,
    /// Only this element type.
    pub dtype: Option<DType>,
    /// Cases of this scale; ops that have none are timed at their largest case below it.
    pub scale: Scale,
    /// How often.
    pub effort: Effort,
    /// Launches back to back in one graph, for the hot figure: one alone would measure the launch.
    pub chain: usize,
    /// Of the random inputs.
    pub seed: u64,
}

/// A case and the op that it is of.
pub struct Choice {
    /// The op.
    pub op: &'static Op,
    /// The case.
    pub case: Case,
}

/// The cases that `options` select, in the registry's order. Errors name unknown ops and variants.
pub fn choose(options: &Options) -> Result<Vec<Choice>> {
    let only = options.op.as_deref().map(ops::find).transpose()?;
    if let (Some(op), Some(variant)) = (only, &options.variant) {
        op.variant(variant)?;
    }
    let mut chosen = Vec::new();
    for op in ops::registry().iter().copied().filter(|op| only.is_none_or(|only| only.name == op.name)) {
        let mut cases = (op.cases)();
        cases.retain(|case| {
            options.variant.as_ref().is_none_or(|v| v == case.variant)
                && options.dtype.is_none_or(|d| d == case.dtype)
                && options.shape.as_ref().is_none_or(|text| case.label.contains(text.as_str()))
                && case.scale <= options.scale
        });
        for variant in op.variants {
            for (dtype, _) in variant.kernels {
                let mut mine = Vec::new();
                let mut rest = Vec::new();
                for case in cases {
                    match case.variant == variant.name && case.dtype == *dtype {
                        true => mine.push(case),
                        false => rest.push(case),
                    }
                }
                cases = rest;
                if mine.iter().any(|case| case.scale == options.scale) {
                    mine.retain(|case| case.scale == options.scale);
                } else {
                    let largest = mine.iter().map(|case| (case.bytes, case.flops)).max();
                    mine.retain(|case| Some((case.bytes, case.flops)) == largest);
                    mine.truncate(1);
                }
                chosen.extend(mine.into_iter().map(|case| Choice { op, case }));
            }
        }
    }
    Ok(chosen)
}

/// A device with room to flush its cache in.
pub struct Bench {
    device: Arc<dyn Device>,
    flush: Span,
    _flush_buffer: Buffer,
}

impl Bench {
    /// On `device`.
    pub fn new(device: Arc<dyn Device>) -> Result<Bench> {
        let (_flush_buffer, flush) = flush_span(&device)?;
        Ok(Bench { device, flush, _flush_buffer })
    }

    /// Times one case: first after the cache was flushed, then with whatever stays in it.
    pub fn run(&self, choice: &Choice, options: &Options) -> Result<[Row; 2]> {
        let Prepared { node, mut rig } = prepare(&choice.case, self.device.clone(), options.seed)?;
        let stream = rig.stream();
        let flush = self.flush;
        let cold = time(stream, &options.effort, &mut |stream| stream.fill(flush, 0x5a), &mut |stream| {
            stream.launch(&node)
        })?;
        let chain = options.chain.max(1);
        let mut list = NodeList::new();
        for _ in 0..chain {
            list.push(node.clone());
        }
        let executable = stream.instantiate(Arc::new(list))?;
        let hot =
            time(stream, &options.effort, &mut |_| Ok(()), &mut |stream| stream.replay(executable.as_ref()))?;
        let row = |l2: &str, samples_ms, note: String| Row {
            test: choice.op.name.into(),
            variant: choice.case.variant.into(),
            dtype: choice.case.dtype.name().into(),
            shape: choice.case.label.clone(),
            l2: l2.into(),
            bytes: choice.case.bytes,
            flops: choice.case.flops,
            samples_ms,
            floor: Floor::Copy,
            note,
        };
        let hot = hot.iter().map(|ms| ms / chain as f64).collect();
        let note = if chain > 1 { format!("{chain} launches in one graph") } else { String::new() };
        Ok([row("cold", cold, String::new()), row("hot", hot, note)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};

    fn options() -> Options {
        Options {
            op: None,
            variant: None,
            shape: None,
            dtype: None,
            scale: Scale::Small,
            effort: Effort { warm_up: 0, repeats: 2, seconds: 10.0, in_flight: 1 },
            chain: 3,
            seed: 1,
        }
    }

    #[test]
    fn every_variant_is_chosen_and_filters_filter() {
        let chosen = choose(&Options { scale: Scale::Real, ..options() }).unwrap();
        for op in ops::registry() {
            for variant in op.variants {
                let found = chosen.iter().any(|c| c.op.name == op.name && c.case.variant == variant.name);
                assert!(found, "{} {}", op.name, variant.name);
            }
        }
        let one = Options { op: Some("gate_up".into()), shape: Some("rows=2,".into()), ..options() };
        let one = choose(&Options { dtype: Some(DType::Bf16), ..one }).unwrap();
        assert!(!one.is_empty());
        assert!(one.iter().all(|c| c.op.name == "gate_up" && c.case.label.contains("rows=2,")));
        assert!(choose(&Options { op: Some("nothing".into()), ..options() }).is_err());
        let odd = Options { op: Some("gate_up".into()), variant: Some("nothing".into()), ..options() };
        assert!(choose(&odd).is_err());
    }

    #[test]
    fn every_op_can_be_launched_again_and_again() {
        let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
        let bench = Bench::new(device).unwrap();
        let options = options();
        let mut done = std::collections::BTreeSet::new();
        for choice in choose(&options).unwrap() {
            // One case per kernel will do.
            if !done.insert((choice.op.name, choice.case.variant, choice.case.dtype)) {
                continue;
            }
            let rows = bench.run(&choice, &options).unwrap();
            assert!(rows.iter().all(|row| row.samples_ms.len() == 2), "{}", choice.case.label);
        }
    }
}
