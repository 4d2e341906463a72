//! Bytes that must move, counted from a node list: what each op declares it reads and writes, with the three places
//! put right where a declaration covers more than is touched, and the flow head's weights counted per evaluation.

use crate::device::{Node, NodeList, Span};
use crate::model::run::Run;
use crate::ops::params::{Conv2dParams, FlowChainParams, VaeAttentionParams};

/// What the launches of one op move.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct OpBytes {
    /// The op, by the end of its label: `qkv`, `flow.chain`.
    pub op: String,
    /// Launches.
    pub launches: usize,
    /// Weights: from device memory every time, because there is more of them than any cache holds.
    pub weights: u64,
    /// Key/value cache.
    pub cache: u64,
    /// Everything else: activations and tables. Of a token these stay in the L2 cache.
    pub activations: u64,
    /// Operations of convolutions and of the VAE's attention; 0 for other ops.
    pub flops: u64,
}

impl OpBytes {
    /// Bytes that have to come from or go to device memory while tokens are made.
    pub fn floor(&self) -> u64 {
        self.weights + self.cache
    }
}

/// Counts `list` of `run` by op, in the order in which ops first appear, with `context` slots of the cache filled.
pub(crate) fn count(run: &Run, list: &NodeList, context: usize) -> Vec<OpBytes> {
    let mut ops: Vec<OpBytes> = Vec::new();
    for node in list.nodes() {
        let name = op_name(&node.label);
        let index = ops.iter().position(|op| op.op == name).unwrap_or_else(|| {
            ops.push(OpBytes { op: name, ..OpBytes::default() });
            ops.len() - 1
        });
        let op = &mut ops[index];
        op.launches += 1;
        op.flops += flops(node);
        for span in &node.reads {
            add(op, run, node, *span, context, false);
        }
        for span in &node.writes {
            add(op, run, node, *span, context, true);
        }
    }
    ops
}

/// The sum of `what` over all ops.
pub fn total(ops: &[OpBytes], what: impl Fn(&OpBytes) -> u64) -> u64 {
    ops.iter().map(what).sum()
}

/// `decode.layer3.qkv` is a `qkv` like the 47 others; what comes once keeps its label.
fn op_name(label: &str) -> String {
    match label.split_once(".layer") {
        Some((_, rest)) => rest.split_once('.').map_or(label, |(_, op)| op).into(),
        None => label.strip_prefix("decode.").unwrap_or(label).into(),
    }
}

fn add(op: &mut OpBytes, run: &Run, node: &Node, span: Span, context: usize, written: bool) {
    let cache = run.cache();
    let bytes = span.bytes as u64;
    if span.overlaps(&cache.keys) || span.overlaps(&cache.values) {
        // Declared whole; read up to the context, written in one slot per row.
        let rows = (run.spec().prompts.len() * cache.capacity).max(1) as u64;
        let touched = match written {
            _ if node.kernel.module == "repeat_prompts" => run.prompt_tokens().repeated as u64,
            true => rows_of(node, run) as u64,
            false => (run.spec().prompts.len() * context.min(cache.capacity)) as u64,
        };
        op.cache += bytes / rows * touched;
    } else if span.overlaps(&cache.rope) {
        // One row of the table per row.
        op.activations += bytes / cache.positions.max(1) as u64 * rows_of(node, run) as u64;
    } else if span.overlaps(&run.arena()) {
        op.activations += bytes;
    } else if node.label.ends_with(".embed") {
        // One row of the embedding per prompt token.
        let row = run.model().config.hidden_size * run.dtype().bytes();
        op.weights += (rows_of(node, run) * row) as u64;
    } else {
        let times = if is_evaluated(node, span) { run.spec().steps.len() as u64 } else { 1 };
        op.weights += bytes * times;
    }
}

/// Rows of a pass: every token of a prompt in the prefill, one per sequence after it.
fn rows_of(node: &Node, run: &Run) -> usize {
    match node.label.starts_with("prefill.") {
        true => run.prompt_tokens().prefilled,
        false => run.spec().prompts.len(),
    }
}

/// Whether a weight is read at every evaluation: all of the chain's but the projection of the finished token.
fn is_evaluated(node: &Node, span: Span) -> bool {
    let params = bytemuck::try_from_bytes::<FlowChainParams>(node.params.as_slice());
    node.label == "flow.chain" && params.is_ok_and(|p| ![p.w_next, p.b_next].contains(&span.ptr.0))
}

fn flops(node: &Node) -> u64 {
    let product = |factors: &[u32]| factors.iter().map(|&f| u64::from(f)).product::<u64>();
    let params = node.params.as_slice();
    match node.kernel.module {
        // Whichever variant: all take the same parameters.
        module if module.starts_with("conv2d") => bytemuck::try_from_bytes::<Conv2dParams>(params)
            .map_or(0, |p| 2 * product(&[p.images, p.height, p.width, p.c_in, p.c_out, p.ksize, p.ksize])),
        module if module.starts_with("vae_attention") => {
            bytemuck::try_from_bytes::<VaeAttentionParams>(params)
                .map_or(0, |p| 4 * product(&[p.images, p.pixels, p.pixels, p.channels]))
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_share_a_name_and_the_rest_keeps_its_own() {
        assert_eq!(op_name("decode.layer47.gate_up"), "gate_up");
        assert_eq!(op_name("prefill.layer0.qkv"), "qkv");
        assert_eq!(op_name("flow.chain"), "flow.chain");
        assert_eq!(op_name("decode.out_proj"), "out_proj");
    }
}
