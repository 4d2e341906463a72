//! The flow-matching head: device weights, the tables of a sampling schedule, the nodes of one image token.

use super::config::ModelConfig;
use super::upload::Uploader;
use crate::device::{Node, NodeList, Span};
use crate::error::{Error, Result};
use crate::ops::product::{ProductScratch, Weight};
use crate::ops::{self, Launch};
use crate::weights::ModelWeights;
use crate::weights::pack::Pairing;

/// Width of the sinusoidal embedding of time.
pub const SINUSOID_WIDTH: usize = 256;

/// Weights of the flow head and of `image_in_projector`.
pub struct FlowHead {
    time0: Weight,
    time0_bias: Span,
    time2: Weight,
    time2_bias: Span,
    cond: Weight,
    cond_bias: Span,
    modulation: Span,
    modulation_bias: Span,
    input: Span,
    input_bias: Span,
    ln_w: Span,
    ln_b: Span,
    w0: Span,
    b0: Span,
    w2: Span,
    b2: Span,
    output: Span,
    output_bias: Span,
    next: Span,
    /// The same matrix for the products of prompts, which may want it packed; `flow_chain` reads it as stored.
    next_product: Weight,
    next_bias: Span,
    /// Sizes of the head.
    pub dims: FlowDims,
}

/// Sizes of the flow head.
#[derive(Clone, Copy, Debug)]
pub struct FlowDims {
    /// Width F.
    pub width: usize,
    /// MLP width H.
    pub mlp_width: usize,
    /// Blocks L.
    pub blocks: usize,
    /// Values per token K.
    pub token_dim: usize,
    /// `hidden_size` D of the transformer.
    pub hidden: usize,
}

impl FlowDims {
    /// Outputs of the modulation product: shift, scale, gate per block, then the final shift and scale.
    pub fn modulation_outputs(&self) -> usize {
        (3 * self.blocks + 2) * self.width
    }
}

/// Memory of the flow head in a session; shapes use the letters of `kernels/params.h`.
#[derive(Clone, Copy, Debug)]
pub struct FlowBuffers {
    /// Network evaluations N per token.
    pub steps: usize,
    /// Images B.
    pub images: usize,
    /// Guidance branches R.
    pub branches: usize,
    /// Image tokens T.
    pub tokens_total: usize,
    /// `[S, D]`: conditions.
    pub condition: Span,
    /// `[N, F]`: time embeddings.
    pub time: Span,
    /// `[S, F]`: embedded conditions.
    pub cond: Span,
    /// `[N, S, (3L + 2) F]`: modulations.
    pub modulation: Span,
    /// `[N]` SolverStep.
    pub steps_table: Span,
    /// `[T, 2]` float: guidance scales.
    pub guidance: Span,
    /// `[draw_slots, draws_per_slot, B, K]` float.
    pub draws: Span,
    /// Draws stored per slot.
    pub draws_per_slot: usize,
    /// T when all draws are recorded, 1 when `randn` refills the slot.
    pub draw_slots: usize,
    /// GenerationState.
    pub state: Span,
    /// GridBarrier.
    pub barrier: Span,
    /// Memory of [`ops::flow_chain::exchange_bytes`].
    pub exchange: Span,
    /// `[S, F]` float.
    pub h: Span,
    /// `[S, H]` float.
    pub a: Span,
    /// `[S, K]` float.
    pub v_raw: Span,
    /// `[B, T, K]`: finished tokens.
    pub tokens: Span,
    /// `[S, D]` float: input of the next transformer step.
    pub x_next: Span,
    /// LayerNorm over the token.
    pub use_norm: bool,
    /// Norm rescale after guidance.
    pub rescale: bool,
    /// Scratch of products that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
    /// What verification records and forces.
    pub taps: FlowTaps,
}

/// Optional outputs and inputs of the sampler, for verification.
#[derive(Clone, Copy, Debug, Default)]
pub struct FlowTaps {
    /// `[N, B, K]` float: replaces x before every evaluation.
    pub forced_x: Option<Span>,
    /// `[N, S, K]` float.
    pub v_raw: Option<Span>,
    /// `[N, B, K]` float.
    pub v: Option<Span>,
    /// `[N, B, K]` float.
    pub x: Option<Span>,
    /// `[B, K]` float: the token before `use_norm`.
    pub sampled: Option<Span>,
}

/// How `randn` fills the draws.
#[derive(Clone, Copy, Debug)]
pub struct DrawSource {
    /// Seed of the request.
    pub seed: u64,
    /// Generator offset before token 0.
    pub base_offset: u64,
    /// Number of the first image of the batch.
    pub first_image: u32,
    /// Draws are rounded to bf16, as torch makes them in a bf16 model.
    pub round_bf16: bool,
}

impl FlowHead {
    /// Uploads the flow head's weights.
    pub fn load(config: &ModelConfig, weights: &ModelWeights, up: &mut Uploader<'_>) -> Result<FlowHead> {
        let blocks = config.fm_head_layers;
        let net = |part: &str| format!("image_head.net.{part}");
        let mut product = |name: String, inner: usize| -> Result<Weight> {
            up.product(&ops::linear::OP, &name, &[weights.get(&name)?], inner, Pairing::Neighbours)
        };
        let time0 = product(net("time_embed.mlp.0.weight"), SINUSOID_WIDTH)?;
        let time2 = product(net("time_embed.mlp.2.weight"), config.fm_head_dim)?;
        let cond = product(net("cond_embed.weight"), config.hidden_size)?;
        let next_name = "image_in_projector.weight";
        let next = up.one(next_name, &weights.get(next_name)?)?;
        let next_product = match up.packs(&ops::linear::OP, config.token_dim()) {
            true => up.product(
                &ops::linear::OP,
                "image_in_projector.packed",
                &[weights.get(next_name)?],
                config.token_dim(),
                Pairing::Neighbours,
            )?,
            false => next.into(),
        };
        let mut one = |name: String| -> Result<Span> { up.one(&name, &weights.get(&name)?) };
        let time0_bias = one(net("time_embed.mlp.0.bias"))?;
        let time2_bias = one(net("time_embed.mlp.2.bias"))?;
        let cond_bias = one(net("cond_embed.bias"))?;
        let input = one(net("input_proj.weight"))?;
        let input_bias = one(net("input_proj.bias"))?;
        let output = one(net("final_layer.linear.weight"))?;
        let output_bias = one(net("final_layer.linear.bias"))?;
        let next_bias = one("image_in_projector.bias".into())?;
        // Per block one tensor; stacked so that a kernel finds block l at a fixed stride.
        let mut stacked = |part: &str, last: Option<&str>| -> Result<Span> {
            let mut views = Vec::with_capacity(blocks + 1);
            for block in 0..blocks {
                views.push(weights.get(&net(&format!("res_blocks.{block}.{part}")))?);
            }
            if let Some(last) = last {
                views.push(weights.get(&net(last))?);
            }
            up.stack(&net(&format!("res_blocks.{part}")), &views)
        };
        Ok(FlowHead {
            modulation: stacked("adaLN_modulation.1.weight", Some("final_layer.adaLN_modulation.1.weight"))?,
            modulation_bias: stacked("adaLN_modulation.1.bias", Some("final_layer.adaLN_modulation.1.bias"))?,
            ln_w: stacked("in_ln.weight", None)?,
            ln_b: stacked("in_ln.bias", None)?,
            w0: stacked("mlp.0.weight", None)?,
            b0: stacked("mlp.0.bias", None)?,
            w2: stacked("mlp.2.weight", None)?,
            b2: stacked("mlp.2.bias", None)?,
            time0,
            time0_bias,
            time2,
            time2_bias,
            cond,
            cond_bias,
            input,
            input_bias,
            output,
            output_bias,
            next,
            next_product,
            next_bias,
            dims: FlowDims {
                width: config.fm_head_dim,
                mlp_width: weights.flow_mlp_dim(),
                blocks,
                token_dim: config.token_dim(),
                hidden: config.hidden_size,
            },
        })
    }

    /// Nodes from the sinusoids of a schedule of `steps` in `input [N, 256]` to `time_embed(t_n)` in `time [N, F]`,
    /// once per session; `hidden [N, F]` is scratch.
    pub fn record_times(
        &self,
        launch: &Launch<'_>,
        steps: usize,
        (input, hidden): (Span, Span),
        time: Span,
        scratch: Option<ProductScratch>,
    ) -> Result<[Node; 2]> {
        let first = self.linear(
            launch,
            "flow.time_embed.0",
            (input, SINUSOID_WIDTH),
            (self.time0, self.time0_bias),
            (hidden, self.dims.width),
            (steps, scratch),
            true,
        )?;
        let second = self.linear(
            launch,
            "flow.time_embed.2",
            (hidden, self.dims.width),
            (self.time2, self.time2_bias),
            (time, self.dims.width),
            (steps, scratch),
            false,
        )?;
        Ok([first, second])
    }

    #[expect(clippy::too_many_arguments, reason = "input, weight and output are pairs already")]
    fn linear(
        &self,
        launch: &Launch<'_>,
        label: &str,
        (x, inner): (Span, usize),
        (w, bias): (Weight, Span),
        (y, outputs): (Span, usize),
        (rows, scratch): (usize, Option<ProductScratch>),
        silu: bool,
    ) -> Result<Node> {
        let bias = Some(bias);
        let args = ops::linear::Args { x, w, bias, y, rows, outputs, inner, silu, out_f32: false, scratch };
        ops::linear::node(launch, label, &args)
    }

    /// `image_in_projector` over `rows` image tokens `[rows, K]`, to `[rows, D]` float, rounded as the model stores it.
    pub fn record_in_projector(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        tokens: Span,
        x: Span,
        rows: usize,
        scratch: Option<ProductScratch>,
    ) -> Result<()> {
        let args = ops::linear::Args {
            x: tokens,
            w: self.next_product,
            bias: Some(self.next_bias),
            y: x,
            rows,
            outputs: self.dims.hidden,
            inner: self.dims.token_dim,
            silu: false,
            out_f32: true,
            scratch,
        };
        list.push(ops::linear::node(launch, "prefill.image_in_projector", &args)?);
        Ok(())
    }

    /// The node of a token list that fills the draws: the only one with values of the request in its parameters.
    pub fn draws_node(&self, launch: &Launch<'_>, b: &FlowBuffers, source: DrawSource) -> Result<Node> {
        let randn = ops::randn::Args {
            state: b.state,
            draws: b.draws,
            seed: source.seed,
            base_offset: source.base_offset,
            draws_per_token: b.draws_per_slot,
            images: b.images,
            first_image: source.first_image,
            token_dim: self.dims.token_dim,
            round_bf16: source.round_bf16,
        };
        ops::randn::node(launch, "flow.randn", &randn)
    }

    /// From the condition to the finished token: embedding, modulations, draws, the chain.
    pub fn record(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        buffers: &FlowBuffers,
        draws: Option<DrawSource>,
    ) -> Result<()> {
        let b = buffers;
        let sequences = b.images * b.branches;
        list.push(self.linear(
            launch,
            "flow.cond_embed",
            (b.condition, self.dims.hidden),
            (self.cond, self.cond_bias),
            (b.cond, self.dims.width),
            (sequences, b.scratch),
            false,
        )?);
        let modulation = ops::flow_modulation::Args {
            time: b.time,
            cond: b.cond,
            w: self.modulation,
            bias: self.modulation_bias,
            modulation: b.modulation,
            steps: b.steps,
            rows: sequences,
            width: self.dims.width,
            outputs: self.dims.modulation_outputs(),
        };
        list.push(ops::flow_modulation::node(launch, "flow.modulation", &modulation)?);
        if let Some(source) = draws {
            list.push(self.draws_node(launch, b, source)?);
        }
        let chain = ops::flow_chain::Args {
            modulation: b.modulation,
            w_in: self.input,
            b_in: self.input_bias,
            ln_w: self.ln_w,
            ln_b: self.ln_b,
            w0: self.w0,
            b0: self.b0,
            w2: self.w2,
            b2: self.b2,
            w_out: self.output,
            b_out: self.output_bias,
            steps_table: b.steps_table,
            guidance: b.guidance,
            draws: b.draws,
            forced_x: b.taps.forced_x,
            state: b.state,
            barrier: b.barrier,
            exchange: b.exchange,
            h: b.h,
            a: b.a,
            v_raw: b.v_raw,
            trace_v_raw: b.taps.v_raw,
            trace_v: b.taps.v,
            trace_x: b.taps.x,
            sampled: b.taps.sampled,
            tokens: b.tokens,
            w_next: self.next,
            b_next: self.next_bias,
            x_next: b.x_next,
            steps: b.steps,
            images: b.images,
            branches: b.branches,
            width: self.dims.width,
            mlp_width: self.dims.mlp_width,
            blocks: self.dims.blocks,
            token_dim: self.dims.token_dim,
            hidden: self.dims.hidden,
            tokens_total: b.tokens_total,
            draws_per_slot: b.draws_per_slot,
            draw_slots: b.draw_slots,
            use_norm: b.use_norm,
            rescale: b.rescale,
        };
        list.push(ops::flow_chain::node(launch, "flow.chain", &chain)?);
        Ok(())
    }
}

/// Checks that nothing in a modulation table overflows 32-bit indices in the kernels.
pub fn check_sizes(dims: &FlowDims, steps: usize, sequences: usize) -> Result<()> {
    let elements = dims
        .modulation_outputs()
        .checked_mul(steps)
        .and_then(|n| n.checked_mul(sequences))
        .ok_or_else(|| Error::request("num_sampling_steps", "modulation table overflows"))?;
    if elements > u32::MAX as usize {
        return Err(Error::request(
            "num_sampling_steps",
            format!("{steps} evaluations of {sequences} sequences need {elements} modulations, 2^32 at most"),
        ));
    }
    Ok(())
}
