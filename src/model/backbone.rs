//! The transformer: device weights, and the nodes of one pass over some rows.
//!
//! A row is a token of one sequence; a sequence is one image of one guidance branch. Sequences are ragged:
//! each has its own length and no padding, and a row's cache slot counts the real tokens before it.

use super::config::ModelConfig;
use super::upload::Uploader;
use crate::device::{NodeList, Span};
use crate::error::Result;
use crate::ops::product::{self, Layout, Next, ProductScratch, Weight};
use crate::ops::{self, DType, Launch};
use crate::weights::ModelWeights;
use crate::weights::pack::Pairing;

/// Weights of one decoder layer.
struct Layer {
    input_norm: Span,
    qkv: Weight,
    qkv_bias: Option<Span>,
    o: Weight,
    o_bias: Option<Span>,
    post_norm: Span,
    gate_up: ops::gate_up::Weights,
    gate_bias: Option<Span>,
    up_bias: Option<Span>,
    down: Weight,
    down_bias: Option<Span>,
}

impl Layer {
    fn gate_up_layout(&self) -> Layout {
        match self.gate_up {
            ops::gate_up::Weights::Rows { .. } => Layout::Rows,
            ops::gate_up::Weights::Tiles(_) => Layout::Tiles,
        }
    }

    fn gate_up_next(&self) -> Option<Next> {
        match self.gate_up {
            ops::gate_up::Weights::Rows { .. } => None,
            ops::gate_up::Weights::Tiles(weights) => Some(Next { weights, first: Next::OWN_STEPS }),
        }
    }
}

/// Weights of the transformer and of the projectors around it.
pub struct Backbone {
    embed: Span,
    layers: Vec<Layer>,
    norm: Span,
    image_out: Weight,
    image_out_bias: Span,
    pos_embed: Option<Span>,
    pos_rows: usize,
    dims: Dims,
}

/// The sizes that every node needs.
#[derive(Clone, Copy, Debug)]
struct Dims {
    hidden: usize,
    intermediate: usize,
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    vocab: usize,
    eps: f32,
}

/// The rows that a pass works on, and the memory it works in. Shapes use the letters of `kernels/params.h`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Rows M of this pass.
    pub rows: usize,
    /// `[M, D]` float: the residual stream, read and written.
    pub x: Span,
    /// `[M]` u32: sequence of each row.
    pub row_seq: Span,
    /// `[M]` u32: cache slot of each row.
    pub row_pos: Span,
    /// `[M, D]`: the rows normed for the product at hand, where it takes them so.
    pub normed: Span,
    /// `[M, Q, d]`: queries.
    pub q: Span,
    /// `[M, Q, d]`: attention output.
    pub context: Span,
    /// `[M, I]`: activated MLP.
    pub act: Span,
    /// Scratch of a split attention, while decoding.
    pub split: Option<ops::attention::SplitScratch>,
    /// Scratch of products that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
}

/// Key/value cache and rotation tables of a session.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    /// `[layers, S, G, capacity, d]`.
    pub keys: Span,
    /// `[layers, S, G, capacity, d]`.
    pub values: Span,
    /// Sequences S.
    pub sequences: usize,
    /// Slots per sequence.
    pub capacity: usize,
    /// `[positions, d]` float: cosines, then sines.
    pub rope: Span,
    /// Rows of the rotation table.
    pub positions: usize,
    /// `[S]` u32: added to a slot for its rotation angle.
    pub rope_offset: Span,
}

impl Backbone {
    /// Uploads the transformer's weights.
    pub fn load(config: &ModelConfig, weights: &ModelWeights, up: &mut Uploader<'_>) -> Result<Backbone> {
        let optional = |up: &mut Uploader<'_>, name: &str| match weights.find(name) {
            Some(view) => up.one(name, &view).map(Some),
            None => Ok(None),
        };
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let neighbours = |up: &mut Uploader<'_>, op: &'static ops::Op, name: &str, inner: usize| {
            up.product(op, name, &[weights.get(name)?], inner, Pairing::Neighbours)
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("layers.{i}.{part}");
            let projections = ["q_proj", "k_proj", "v_proj"].map(|p| format!("layers.{i}.self_attn.{p}"));
            let stacked = |suffix: &str| -> Result<Vec<_>> {
                projections.iter().map(|p| weights.get(&format!("{p}.{suffix}"))).collect()
            };
            let qkv_bias = match weights.find(&format!("{}.bias", projections[0])) {
                Some(_) => Some(up.stack(&name("self_attn.qkv.bias"), &stacked("bias")?)?),
                None => None,
            };
            layers.push(Layer {
                input_norm: up
                    .one(&name("input_layernorm.weight"), &weights.get(&name("input_layernorm.weight"))?)?,
                qkv: up.product(
                    &ops::qkv::OP,
                    &name("self_attn.qkv.weight"),
                    &stacked("weight")?,
                    hidden,
                    Pairing::Rotary { head_dim: config.head_dim },
                )?,
                qkv_bias,
                o: neighbours(
                    up,
                    &ops::o_proj::OP,
                    &name("self_attn.o_proj.weight"),
                    config.num_attention_heads * config.head_dim,
                )?,
                o_bias: optional(up, &name("self_attn.o_proj.bias"))?,
                post_norm: up.one(
                    &name("post_attention_layernorm.weight"),
                    &weights.get(&name("post_attention_layernorm.weight"))?,
                )?,
                gate_up: load_gate_up(weights, up, &name("mlp"), hidden)?,
                gate_bias: optional(up, &name("mlp.gate_proj.bias"))?,
                up_bias: optional(up, &name("mlp.up_proj.bias"))?,
                down: neighbours(up, &ops::down::OP, &name("mlp.down_proj.weight"), intermediate)?,
                down_bias: optional(up, &name("mlp.down_proj.bias"))?,
            });
        }
        let (pos_embed, pos_rows) = match config.use_gen_pos_embed {
            false => (None, 0),
            true => {
                let grid = config.base_image_grid_size;
                let span = match weights.find("gen_pos_embed") {
                    Some(view) => up.one("gen_pos_embed", &view)?,
                    None => {
                        let table = (grid * grid, config.hidden_size);
                        up.rows("gen_pos_embed", table, |index, row| {
                            position_row(grid, config.hidden_size, index, row);
                            Ok(())
                        })?
                    }
                };
                (Some(span), grid * grid)
            }
        };
        Ok(Backbone {
            embed: up.one("embed_tokens.weight", &weights.get("embed_tokens.weight")?)?,
            layers,
            norm: up.one("norm.weight", &weights.get("norm.weight")?)?,
            image_out: neighbours(up, &ops::out_proj::OP, "image_out_projector.weight", hidden)?,
            image_out_bias: up.one("image_out_projector.bias", &weights.get("image_out_projector.bias")?)?,
            pos_embed,
            pos_rows,
            dims: Dims {
                hidden: config.hidden_size,
                intermediate: config.intermediate_size,
                heads_q: config.num_attention_heads,
                heads_kv: config.num_key_value_heads,
                head_dim: config.head_dim,
                vocab: config.vocab_size,
                eps: config.rms_norm_eps,
            },
        })
    }

    /// The position table, if the model has one, read at the token index in `state`.
    pub fn pos_embed(&self, state: Span) -> Option<ops::out_proj::PosEmbed> {
        self.pos_embed.map(|table| ops::out_proj::PosEmbed { table, rows: self.pos_rows, state })
    }

    /// Rows of the position table; a picture may not have more tokens.
    pub fn pos_rows(&self) -> usize {
        self.pos_rows
    }

    /// `[V, D]` E: the embedding table.
    pub fn embedding(&self) -> Span {
        self.embed
    }

    /// `[D]` E: weights of the final norm.
    pub fn final_norm(&self) -> Span {
        self.norm
    }

    /// Whether the bits of each of `rows` rows are what they are in any other number of rows, by the variants that
    /// `launch` chooses.
    pub fn rows_alike(&self, launch: &Launch<'_>, rows: usize) -> Result<bool> {
        let Some(layer) = self.layers.first() else { return Ok(true) };
        Ok(product::rows_alike(&ops::qkv::OP, launch, layer.qkv.layout, rows)?
            && product::rows_alike(&ops::gate_up::OP, launch, layer.gate_up_layout(), rows)?)
    }

    /// The rows normed in memory of their own, if the product takes them so.
    fn record_norm(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        name: &dyn Fn(&str) -> String,
        (op, layout): (&'static ops::Op, Layout),
        norm_w: Span,
        rows: &Rows,
    ) -> Result<Option<Span>> {
        if !product::takes_normed(op, launch, layout, rows.rows)? {
            return Ok(None);
        }
        let (h, hidden, eps) = (rows.normed, self.dims.hidden, self.dims.eps);
        let args = ops::norm_rows::Args { x: rows.x, norm_w, h, rows: rows.rows, hidden, eps };
        list.push(ops::norm_rows::node(launch, &name("norm_rows"), &args)?);
        Ok(Some(h))
    }

    /// Number of decoder layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Token ids `[M]` u32, and the image tokens of `source` between them, to the residual stream.
    pub fn record_embed(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        label: &str,
        ids: Span,
        source: Option<ops::embed::Source>,
        rows: &Rows,
    ) -> Result<()> {
        let args = ops::embed::Args {
            ids,
            table: self.embed,
            source,
            x: rows.x,
            rows: rows.rows,
            hidden: self.dims.hidden,
            vocab: self.dims.vocab,
        };
        list.push(ops::embed::node(launch, &format!("{label}.embed"), &args)?);
        Ok(())
    }

    /// All decoder layers over `rows`; the cache gains their keys and values.
    pub fn record_layers(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        label: &str,
        rows: &Rows,
        cache: &Cache,
    ) -> Result<()> {
        let d = self.dims;
        let layer_bytes = cache.sequences * d.heads_kv * cache.capacity * d.head_dim * launch.dtype.bytes();
        for (i, layer) in self.layers.iter().enumerate() {
            let name = |op: &str| format!("{label}.layer{i}.{op}");
            let ahead = |next: Option<Next>| rows.scratch.map(|scratch| scratch.ahead(next));
            let k_cache = cache.keys.slice(i * layer_bytes, layer_bytes);
            let v_cache = cache.values.slice(i * layer_bytes, layer_bytes);
            let normed = self.record_norm(
                launch,
                list,
                &name,
                (&ops::qkv::OP, layer.qkv.layout),
                layer.input_norm,
                rows,
            )?;
            let qkv = ops::qkv::Args {
                x: rows.x,
                norm_w: layer.input_norm,
                normed,
                w: layer.qkv,
                bias: layer.qkv_bias,
                rope: cache.rope,
                row_seq: rows.row_seq,
                row_pos: rows.row_pos,
                rope_offset: cache.rope_offset,
                q: rows.q,
                k_cache,
                v_cache,
                rows: rows.rows,
                sequences: cache.sequences,
                hidden: d.hidden,
                heads_q: d.heads_q,
                heads_kv: d.heads_kv,
                head_dim: d.head_dim,
                capacity: cache.capacity,
                positions: cache.positions,
                eps: d.eps,
                // Its blocks find no room on an SM before those of attention end.
                scratch: ahead(Next::of(layer.o, 0)),
            };
            list.push(ops::qkv::node(launch, &name("qkv"), &qkv)?);
            let attention = ops::attention::Args {
                q: rows.q,
                k_cache,
                v_cache,
                row_seq: rows.row_seq,
                row_pos: rows.row_pos,
                out: rows.context,
                split: rows.split,
                prefetch: Some(layer.o.span),
                rows: rows.rows,
                sequences: cache.sequences,
                heads_q: d.heads_q,
                heads_kv: d.heads_kv,
                head_dim: d.head_dim,
                capacity: cache.capacity,
                scale: attention_scale(d.head_dim),
            };
            list.push(ops::attention::node(launch, &name("attention"), &attention)?);
            let o_proj = ops::project::Args {
                input: rows.context,
                w: layer.o,
                bias: layer.o_bias,
                x: rows.x,
                rows: rows.rows,
                hidden: d.hidden,
                inner: d.heads_q * d.head_dim,
                scratch: ahead(layer.gate_up_next()),
            };
            list.push(ops::o_proj::node(launch, &name("o_proj"), &o_proj)?);
            let gate_up = (&ops::gate_up::OP, layer.gate_up_layout());
            let normed = self.record_norm(launch, list, &name, gate_up, layer.post_norm, rows)?;
            let gate_up = ops::gate_up::Args {
                x: rows.x,
                norm_w: layer.post_norm,
                normed,
                w: layer.gate_up,
                gate_bias: layer.gate_bias,
                up_bias: layer.up_bias,
                act: rows.act,
                rows: rows.rows,
                hidden: d.hidden,
                intermediate: d.intermediate,
                eps: d.eps,
                scratch: ahead(Next::of(layer.down, Next::OWN_STEPS)),
            };
            list.push(ops::gate_up::node(launch, &name("gate_up"), &gate_up)?);
            let down = ops::project::Args {
                input: rows.act,
                w: layer.down,
                bias: layer.down_bias,
                x: rows.x,
                rows: rows.rows,
                hidden: d.hidden,
                inner: d.intermediate,
                // Of the last layer the next token's first product.
                scratch: ahead(Next::of(
                    self.layers.get(i + 1).map_or(self.image_out, |next| next.qkv),
                    Next::OWN_STEPS,
                )),
            };
            list.push(ops::down::node(launch, &name("down"), &down)?);
        }
        Ok(())
    }

    /// Final norm, position row and `image_out_projector`: residual `x [S, D]` to condition `c [S, D]`.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a buffer of its own; a struct would only rename them"
    )]
    pub fn record_condition(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        label: &str,
        x: Span,
        rows: usize,
        pos_embed: Option<ops::out_proj::PosEmbed>,
        norm_out: Option<Span>,
        c: Span,
        scratch: Option<ProductScratch>,
    ) -> Result<()> {
        let args = ops::out_proj::Args {
            x,
            norm_w: self.norm,
            pos_embed,
            w: self.image_out,
            bias: self.image_out_bias,
            norm_out,
            c,
            rows,
            hidden: self.dims.hidden,
            eps: self.dims.eps,
            scratch,
        };
        list.push(ops::out_proj::node(launch, &format!("{label}.out_proj"), &args)?);
        Ok(())
    }
}

/// Gate and up of the MLP called `mlp`: one packed matrix, or two as stored.
fn load_gate_up(
    weights: &ModelWeights,
    up: &mut Uploader<'_>,
    mlp: &str,
    hidden: usize,
) -> Result<ops::gate_up::Weights> {
    let names = ["gate", "up"].map(|part| format!("{mlp}.{part}_proj.weight"));
    let views = [weights.get(&names[0])?, weights.get(&names[1])?];
    Ok(match up.packs(&ops::gate_up::OP, hidden) {
        true => {
            let label = format!("{mlp}.gate_up_proj.weight");
            ops::gate_up::Weights::Tiles(up.packed(&label, &views, hidden, Pairing::Stacked)?)
        }
        false => ops::gate_up::Weights::Rows {
            gate: up.one(&names[0], &views[0])?,
            up: up.one(&names[1], &views[1])?,
        },
    })
}

/// `1 / sqrt(head_dim)`.
pub fn attention_scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

/// Frequencies `theta^(-2j/d)` in single precision (model.md section 11, quirk 1: the official `.to(bfloat16)`
/// rounds them, training did not).
pub fn rope_frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|j| (1.0 / theta.powf(2.0 * j as f64 / head_dim as f64)) as f32).collect()
}

/// `[positions, d]`: cosines, then sines of `position * frequency`, rounded to `dtype` as the official code
/// rounds them before the multiplication.
pub fn rope_table(frequencies: &[f32], positions: usize, dtype: DType) -> Vec<f32> {
    let round = |v: f64| match dtype {
        DType::F32 => v as f32,
        DType::Bf16 => half::bf16::from_f64(v).to_f32(),
    };
    let mut table = Vec::with_capacity(positions * frequencies.len() * 2);
    for position in 0..positions {
        // The angle itself is a single-precision product, as torch forms it.
        let angles: Vec<f64> = frequencies.iter().map(|f| f64::from(position as f32 * f)).collect();
        table.extend(angles.iter().map(|a| round(a.cos())));
        table.extend(angles.iter().map(|a| round(a.sin())));
    }
    table
}

/// A row of the fixed position table, `[grid * grid, D]`: the column's sines and cosines before the row's.
fn position_row(grid: usize, hidden: usize, index: usize, row: &mut Vec<f32>) {
    let quarter = hidden / 4;
    let frequency = |i: usize| 1.0 / 10_000f64.powf(i as f64 / quarter as f64);
    for position in [index % grid, index / grid] {
        let angle = |i: usize| position as f64 * frequency(i);
        row.extend((0..quarter).map(|i| angle(i).sin() as f32));
        row.extend((0..quarter).map(|i| angle(i).cos() as f32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rope_table_holds_cosines_then_sines() {
        let table = rope_table(&rope_frequencies(10_000.0, 4), 3, DType::F32);
        assert_eq!(&table[..4], [1.0, 1.0, 0.0, 0.0]);
        assert!((table[4] - 1f32.cos()).abs() < 1e-7 && (table[6] - 1f32.sin()).abs() < 1e-7);
        assert!((table[5] - 0.01f32.cos()).abs() < 1e-7 && (table[7] - 0.01f32.sin()).abs() < 1e-7);
        let rounded = rope_table(&rope_frequencies(10_000.0, 4), 3, DType::Bf16);
        assert_eq!(rounded[4], half::bf16::from_f32(table[4]).to_f32());
    }

    #[test]
    fn position_row_puts_the_column_first() {
        // Entry 32 is row 1, column 0.
        let mut entry = Vec::new();
        position_row(32, 8, 32, &mut entry);
        assert_eq!(&entry[..4], [0.0, 0.0, 1.0, 1.0]);
        assert!((entry[4] - 1f32.sin()).abs() < 1e-7);
    }
}
