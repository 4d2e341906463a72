//! The LM head's weights, and the nodes from the residual stream to logits.

use super::backbone::Backbone;
use super::config::ModelConfig;
use super::upload::Uploader;
use crate::device::{NodeList, Span};
use crate::error::Result;
use crate::ops::product::{Layout, ProductScratch, Weight};
use crate::ops::{self, Launch, Selection};
use crate::weights::pack::Pairing;
use crate::weights::{ModelWeights, Part};

/// What turns the residual stream into logits.
pub struct LmHead {
    /// `[V, D]`
    weight: Weight,
    /// `[D, D]` and `[D]`: `before_lm_head`, which some checkpoints have.
    before: Option<(Weight, Span)>,
}

/// Where logits are made: inputs and outputs of [`LmHead::record`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Logits {
    /// `[rows, D]` f32.
    pub(super) x: Span,
    pub(super) rows: usize,
    /// `[rows, D]` E, written if given: the final norm.
    pub(super) norm_out: Option<Span>,
    /// `[rows, D]` E: what `before_lm_head` makes.
    pub(super) hidden: Span,
    /// `[rows, V]` f32, written.
    pub(super) logits: Span,
    /// Scratch of products that share tiles between blocks.
    pub(super) scratch: Option<ProductScratch>,
}

impl LmHead {
    /// Uploads the head. With tied embeddings the table that is already there serves: rows are looked up in it, so it
    /// lies as stored, which `plain` reads as well; a packed copy would take its size again (1.56 GB at the 14B's
    /// shape). It is made where `kernels` name a variant that reads nothing else.
    pub fn load(
        config: &ModelConfig,
        weights: &ModelWeights,
        backbone: &Backbone,
        kernels: &Selection,
        up: &mut Uploader<'_>,
    ) -> Result<LmHead> {
        const NAME: &str = "lm_head.weight";
        let own = weights.specs().iter().any(|spec| spec.part == Part::LmHead && spec.name == NAME);
        let hidden = config.hidden_size;
        let op = match config.use_mlp_before_lm_head {
            false => &ops::lm_head::OP,
            true => &ops::linear::OP,
        };
        let named = kernels.chosen(op).is_some_and(|variant| Layout::of_variant(variant) == Layout::Tiles);
        let weight = match own || (named && up.packs(op, hidden)) {
            false => backbone.embedding().into(),
            true => up.product(op, NAME, &[weights.get(NAME)?], hidden, Pairing::Neighbours)?,
        };
        let before = match config.use_mlp_before_lm_head {
            false => None,
            true => {
                let [w, b] = ["before_lm_head.weight", "before_lm_head.bias"];
                let views = [weights.get(w)?];
                let w = up.product(&ops::out_proj::OP, w, &views, hidden, Pairing::Neighbours)?;
                Some((w, up.one(b, &weights.get(b)?)?))
            }
        };
        Ok(LmHead { weight, before })
    }

    /// Nodes from residual rows to their logits.
    pub(super) fn record(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        label: &str,
        (config, norm_w): (&ModelConfig, Span),
        io: &Logits,
    ) -> Result<()> {
        let (hidden, vocab, eps) = (config.hidden_size, config.vocab_size, config.rms_norm_eps);
        let Some((w, bias)) = self.before else {
            let args = ops::lm_head::Args {
                x: io.x,
                norm_w,
                w: self.weight,
                norm_out: io.norm_out,
                logits: io.logits,
                rows: io.rows,
                hidden,
                vocab,
                eps,
                scratch: io.scratch,
            };
            list.push(ops::lm_head::node(launch, &format!("{label}.lm_head"), &args)?);
            return Ok(());
        };
        // The final norm and a square layer are what out_proj computes.
        let before = ops::out_proj::Args {
            x: io.x,
            norm_w,
            pos_embed: None,
            w,
            bias,
            norm_out: io.norm_out,
            c: io.hidden,
            rows: io.rows,
            hidden,
            eps,
            scratch: io.scratch,
        };
        list.push(ops::out_proj::node(launch, &format!("{label}.before_lm_head"), &before)?);
        let head = ops::linear::Args {
            x: io.hidden,
            w: self.weight,
            bias: None,
            y: io.logits,
            rows: io.rows,
            outputs: vocab,
            inner: hidden,
            silu: false,
            out_f32: true,
            scratch: io.scratch,
        };
        list.push(ops::linear::node(launch, &format!("{label}.lm_head"), &head)?);
        Ok(())
    }
}
