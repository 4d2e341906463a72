//! The tensors of the language model and its flow-matching head: official names and shapes, from the config.

use super::slots::{Expected, Part, Slots, TensorSpec};
use super::{Checkpoint, TensorView};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;

/// Width of the sinusoidal time embedding that enters the flow-matching head.
const TIME_EMBED_DIM: usize = 256;
/// The tensor whose rows are the width of the flow head's MLP: no released config states the ratio.
const FLOW_MLP: &str = "image_head.net.res_blocks.0.mlp.0.weight";

/// Every tensor that `config` asks for, in the order of execution, with the flow head's MLPs `flow_mlp_dim` wide
/// (`fm_head_dim` for ratio 1). Includes the optional ones: `gen_pos_embed` and a tied `lm_head`.
pub fn model_tensors(config: &ModelConfig, flow_mlp_dim: usize) -> Vec<TensorSpec> {
    let mut list = List(Vec::new());
    let hidden = config.hidden_size; // D
    list.add(Part::Embedding, "embed_tokens.weight", [config.vocab_size, hidden]);
    for layer in 0..config.num_hidden_layers {
        let (q, kv, mlp) = (config.q_size(), config.kv_size(), config.intermediate_size);
        let part = Part::Backbone;
        let at = format!("layers.{layer}");
        list.add(part, format!("{at}.input_layernorm.weight"), [hidden]);
        list.linear(part, &format!("{at}.self_attn.q_proj"), q, hidden, config.attention_bias);
        list.linear(part, &format!("{at}.self_attn.k_proj"), kv, hidden, config.attention_bias);
        list.linear(part, &format!("{at}.self_attn.v_proj"), kv, hidden, config.attention_bias);
        list.linear(part, &format!("{at}.self_attn.o_proj"), hidden, q, config.o_attention_bias);
        list.add(part, format!("{at}.post_attention_layernorm.weight"), [hidden]);
        list.linear(part, &format!("{at}.mlp.gate_proj"), mlp, hidden, config.mlp_bias);
        list.linear(part, &format!("{at}.mlp.up_proj"), mlp, hidden, config.mlp_bias);
        list.linear(part, &format!("{at}.mlp.down_proj"), hidden, mlp, config.mlp_bias);
    }
    list.add(Part::Backbone, "norm.weight", [hidden]);
    if config.use_mlp_before_lm_head {
        list.linear(Part::LmHead, "before_lm_head", hidden, hidden, true);
    }
    list.add(Part::LmHead, "lm_head.weight", [config.vocab_size, hidden]);
    list.linear(Part::Projectors, "image_in_projector", hidden, config.token_dim(), true);
    list.linear(Part::Projectors, "image_out_projector", hidden, hidden, true);
    list.add(Part::PositionTable, "gen_pos_embed", [1, config.gen_pos_rows(), hidden]);

    let (part, width) = (Part::FlowHead, config.fm_head_dim); // F
    list.linear(part, "image_head.net.time_embed.mlp.0", width, TIME_EMBED_DIM, true);
    list.linear(part, "image_head.net.time_embed.mlp.2", width, width, true);
    list.linear(part, "image_head.net.cond_embed", width, hidden, true);
    list.linear(part, "image_head.net.input_proj", width, config.token_dim(), true);
    for block in 0..config.fm_head_layers {
        let at = format!("image_head.net.res_blocks.{block}");
        list.add(part, format!("{at}.in_ln.weight"), [width]);
        list.add(part, format!("{at}.in_ln.bias"), [width]);
        list.linear(part, &format!("{at}.mlp.0"), flow_mlp_dim, width, true);
        list.linear(part, &format!("{at}.mlp.2"), width, flow_mlp_dim, true);
        // shift, scale and gate
        list.linear(part, &format!("{at}.adaLN_modulation.1"), 3 * width, width, true);
    }
    // shift and scale
    list.linear(part, "image_head.net.final_layer.adaLN_modulation.1", 2 * width, width, true);
    list.linear(part, "image_head.net.final_layer.linear", config.token_dim(), width, true);
    list.0
}

struct List(Vec<TensorSpec>);

impl List {
    fn add(&mut self, part: Part, name: impl Into<String>, shape: impl Into<Vec<usize>>) {
        self.0.push(TensorSpec { name: name.into(), shape: shape.into(), part });
    }

    /// `weight` [out, in] and, if there is one, `bias` [out].
    fn linear(&mut self, part: Part, name: &str, outputs: usize, inputs: usize, bias: bool) {
        self.add(part, format!("{name}.weight"), [outputs, inputs]);
        if bias {
            self.add(part, format!("{name}.bias"), [outputs]);
        }
    }
}

/// The checkpoint of a language model with its flow head: every tensor is there once and has the shape that
/// follows from the config.
pub struct ModelWeights {
    checkpoint: Checkpoint,
    slots: Slots,
    flow_mlp_dim: usize,
}

impl ModelWeights {
    /// Checks `checkpoint` against `config`. A leading `model.` of a stored name is ignored. May be missing:
    /// `gen_pos_embed` (it is a formula) and, with tied embeddings, `lm_head.weight`.
    pub fn new(checkpoint: Checkpoint, config: &ModelConfig) -> Result<ModelWeights> {
        let prefixed = |name: &str| format!("model.{name}");
        let position =
            [FLOW_MLP.to_owned(), prefixed(FLOW_MLP)].iter().find_map(|name| checkpoint.position(name));
        let flow_mlp_dim = match position.map(|index| (index, &checkpoint.tensors[index].shape[..])) {
            // Missing: the binding below says so.
            None => config.fm_head_dim,
            Some((_, &[rows, inputs])) if rows > 0 && inputs == config.fm_head_dim => rows,
            Some((index, found)) => {
                return Err(Error::ShapeMismatch {
                    path: checkpoint.file_of(index).to_owned(),
                    tensor: FLOW_MLP.into(),
                    expected: vec![config.fm_head_dim; 2],
                    found: found.to_vec(),
                });
            }
        };
        let expected = model_tensors(config, flow_mlp_dim).into_iter().map(|spec| Expected {
            aliases: vec![prefixed(&spec.name)],
            optional: match spec.name.as_str() {
                "gen_pos_embed" => true,
                "lm_head.weight" => config.tie_word_embeddings,
                _ => false,
            },
            pointwise: false,
            spec,
        });
        let slots = Slots::bind(&checkpoint, expected.collect())?;
        Ok(ModelWeights { checkpoint, slots, flow_mlp_dim })
    }

    /// Shapes without values; see `Checkpoint::of_shapes`.
    pub(crate) fn of_shapes(config: &ModelConfig) -> Result<ModelWeights> {
        let mut specs = model_tensors(config, config.fm_head_dim);
        // It is a formula where the checkpoint lacks it.
        specs.retain(|spec| spec.part != Part::PositionTable);
        ModelWeights::new(Checkpoint::of_shapes(&specs)?, config)
    }

    /// The tensor of this official name. A tied `lm_head.weight` is the embedding table.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>> {
        self.find(name).ok_or_else(|| self.checkpoint.missing(name))
    }

    /// Like [`get`](Self::get), for tensors that may be missing.
    pub fn find(&self, name: &str) -> Option<TensorView<'_>> {
        self.slots.find(&self.checkpoint, name).or_else(|| match name {
            // Without tied embeddings the binding has made sure of an lm_head of its own.
            "lm_head.weight" => self.slots.find(&self.checkpoint, "embed_tokens.weight"),
            _ => None,
        })
    }

    /// The tensors that are there, in the order of execution.
    pub fn specs(&self) -> &[TensorSpec] {
        self.slots.specs()
    }

    /// Inner width of the flow head's MLPs: F times the MLP ratio.
    pub fn flow_mlp_dim(&self) -> usize {
        self.flow_mlp_dim
    }

    /// The files underneath.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::path::Path;

    /// The released 14B model as far as it is known, with the FM head given.
    fn large(fm_head_dim: usize, fm_head_layers: usize) -> ModelConfig {
        let text = format!(
            r#"{{"model_type":"nextstep","hidden_size":5120,"intermediate_size":13824,"num_hidden_layers":48,
            "num_attention_heads":40,"num_key_value_heads":8,"vocab_size":152064,"attention_bias":true,
            "o_attention_bias":false,"boi":151667,"eoi":151668,"image_placeholder_id":151669,
            "fm_head_dim":{fm_head_dim},"fm_head_layers":{fm_head_layers}}}"#
        );
        ModelConfig::parse(Path::new("config.json"), &text).unwrap()
    }

    fn counts(config: &ModelConfig) -> HashMap<Part, usize> {
        let mut counts = HashMap::new();
        for spec in model_tensors(config, config.fm_head_dim) {
            *counts.entry(spec.part).or_default() += spec.elements();
        }
        counts
    }

    #[test]
    fn parameter_counts_are_those_of_the_paper() {
        // docs: the published sizes 40M / 157M / 528M of the heads and the counts computed from Qwen2.5-14B.
        for (width, layers, expected) in
            [(1024, 6, 40_288_320), (1536, 12, 157_228_096), (2048, 24, 527_528_000)]
        {
            assert_eq!(counts(&large(width, layers))[&Part::FlowHead], expected);
        }
        let counts = counts(&large(1536, 12));
        assert_eq!(counts[&Part::Backbone], 13_212_893_184 + 5_120);
        assert_eq!(counts[&Part::PositionTable], 5_242_880);
        assert_eq!(counts.values().sum::<usize>() - counts[&Part::PositionTable], 14_953_814_080);
    }

    #[test]
    fn names_are_unique() {
        let specs = model_tensors(&large(1536, 12), 1536);
        let mut names: Vec<_> = specs.iter().map(|spec| &spec.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), specs.len());
    }
}
