//! The registry of ops: one row per op, its variants, its test cases and what they cost.
//!
//! An op is `ops/NAME.rs` (shapes, checks, geometry, declared reads and writes), `kernels/NAME.cu` and
//! `reference/NAME.rs`. A variant is chosen by name; nobody edits the executor to try a kernel.
//! Ops know the device interface and nothing of models.

pub mod advance;
pub mod attention;
pub mod bench;
pub mod conv2d;
pub mod down;
pub mod embed;
pub mod encode_latent;
pub mod flow_chain;
pub mod flow_modulation;
pub mod gate_up;
pub mod gather_rows;
pub mod group_stats;
pub mod harness;
pub mod linear;
pub mod lm_head;
pub mod merge_stats;
pub mod norm_rows;
pub mod o_proj;
pub mod out_proj;
pub mod params;
pub mod product;
pub mod project;
pub mod qkv;
pub mod randn;
pub mod repeat_prompts;
pub mod shared;
pub mod to_rgb8;
pub mod unpatchify;
pub mod vae_attention;

use crate::device::KernelId;
use crate::error::{Error, Result};

/// Element type of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single: verification against golden tensors.
    F32,
    /// bfloat16: the shipped type.
    Bf16,
}

impl DType {
    /// Both, in the order in which symbols are listed.
    pub const ALL: &'static [DType] = &[DType::F32, DType::Bf16];

    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }

    /// As in kernel symbols and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
        }
    }
}

/// One way to compute an op.
#[derive(Debug)]
pub struct Variant {
    /// Names the technique: `plain`, `tile`, `splitkv`.
    pub name: &'static str,
    /// Kernel of each supported element type; a variant refuses the others.
    pub kernels: &'static [(DType, KernelId)],
    /// One line: what it does and for which shapes.
    pub summary: &'static str,
}

impl Variant {
    /// The kernel for `dtype`.
    pub fn kernel(&self, op: &'static str, dtype: DType) -> Result<KernelId> {
        self.kernels.iter().find(|(d, _)| *d == dtype).map(|(_, k)| *k).ok_or_else(|| Error::Unsupported {
            op,
            variant: self.name.into(),
            reason: format!("has no {} kernel", dtype.name()),
        })
    }
}

/// One row of the registry.
pub struct Op {
    /// Name, also of the three files.
    pub name: &'static str,
    /// One line: what it computes.
    pub summary: &'static str,
    /// What bounds it on the shipped model: bytes, FLOPs, or latency, with the figure.
    pub bound: &'static str,
    /// Its variants; the first is the default.
    pub variants: &'static [Variant],
    /// Its test and bench cases for every variant and element type.
    pub cases: fn() -> Vec<harness::Case>,
}

impl Op {
    /// The variant called `name`.
    pub fn variant(&self, name: &str) -> Result<&'static Variant> {
        let known = || self.variants.iter().map(|v| v.name).collect::<Vec<_>>().join(", ");
        self.variants.iter().find(|v| v.name == name).ok_or_else(|| Error::Unsupported {
            op: self.name,
            variant: name.into(),
            reason: format!("no such variant; known: {}", known()),
        })
    }
}

/// Declares the `kernels` table of a variant: `kernels!("qkv", f32: "qkv_plain_f32", bf16: "qkv_plain_bf16")`.
#[macro_export]
macro_rules! kernels {
    ($module:literal, f32: $f32:literal, bf16: $bf16:literal) => {
        &[
            ($crate::ops::DType::F32, $crate::device::KernelId { module: $module, symbol: $f32 }),
            ($crate::ops::DType::Bf16, $crate::device::KernelId { module: $module, symbol: $bf16 }),
        ]
    };
    ($module:literal, bf16: $bf16:literal) => {
        &[($crate::ops::DType::Bf16, $crate::device::KernelId { module: $module, symbol: $bf16 })]
    };
}

static OPS: &[&Op] = &[
    &encode_latent::OP,
    &embed::OP,
    &norm_rows::OP,
    &qkv::OP,
    &attention::OP,
    &o_proj::OP,
    &gate_up::OP,
    &down::OP,
    &gather_rows::OP,
    &repeat_prompts::OP,
    &out_proj::OP,
    &linear::OP,
    &flow_modulation::OP,
    &randn::OP,
    &flow_chain::OP,
    &advance::OP,
    &unpatchify::OP,
    &conv2d::OP,
    &group_stats::OP,
    &merge_stats::OP,
    &vae_attention::OP,
    &to_rgb8::OP,
    &lm_head::OP,
];

/// The products of the transformer, its projectors and its LM head: the ops whose weights may be packed.
pub static PRODUCTS: [&Op; 7] =
    [&qkv::OP, &o_proj::OP, &gate_up::OP, &down::OP, &out_proj::OP, &linear::OP, &lm_head::OP];

/// Every op, in the order in which one image uses them; then what only text needs.
pub fn registry() -> &'static [&'static Op] {
    OPS
}

/// The op called `name`.
pub fn find(name: &str) -> Result<&'static Op> {
    registry().iter().copied().find(|op| op.name == name).ok_or_else(|| {
        let known = registry().iter().map(|o| o.name).collect::<Vec<_>>().join(", ");
        Error::request("kernel", format!("unknown op {name:?}; known ops: {known}"))
    })
}

/// For how many rows a stage's products are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One row per sequence: decoding.
    Few,
    /// A row per prompt token.
    Many,
}

/// Variants chosen by name (`--kernel op=variant`); ops that are not named use their default for the shape.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    chosen: Vec<(&'static str, &'static str)>,
    form: Option<Form>,
}

impl Selection {
    /// Parses `op=variant` items; unknown names list the known ones.
    pub fn parse<S: AsRef<str>>(items: &[S]) -> Result<Selection> {
        let mut chosen: Vec<(&'static str, &'static str)> = Vec::new();
        for item in items {
            let item = item.as_ref();
            let (op, variant) = item
                .split_once('=')
                .ok_or_else(|| Error::request("kernel", format!("{item:?} is not of the form OP=VARIANT")))?;
            let op = find(op)?;
            let variant = op.variant(variant).map_err(|e| Error::request("kernel", e.to_string()))?;
            if chosen.iter().any(|(o, _)| *o == op.name) {
                return Err(Error::request("kernel", format!("op {} is chosen twice", op.name)));
            }
            chosen.push((op.name, variant.name));
        }
        Ok(Selection { chosen, form: None })
    }

    /// A selection of one variant, for tests.
    pub fn one(op: &'static Op, variant: &str) -> Result<Selection> {
        Ok(Selection { chosen: vec![(op.name, op.variant(variant)?.name)], form: None })
    }

    /// The same with `variant` for `op` where nothing else was chosen. Stages fix their variants with it: were
    /// they chosen by the number of rows, an image's bits would depend on how many are in the batch.
    pub fn or(mut self, op: &'static Op, variant: &str) -> Result<Selection> {
        if !self.chosen.iter().any(|(o, _)| *o == op.name) {
            self.chosen.push((op.name, op.variant(variant)?.name));
        }
        Ok(self)
    }

    /// The same with the products' defaults of a stage, for the reason that [`Selection::or`] gives. Which variants
    /// these are depends on how a weight lies in memory, so ops cannot be given them by name.
    pub fn for_products(mut self, form: Form) -> Selection {
        self.form = Some(form);
        self
    }

    /// The form of products that the stage fixes, if it does.
    pub fn form(&self) -> Option<Form> {
        self.form
    }

    /// The variant chosen for `op` by name.
    pub fn chosen(&self, op: &Op) -> Option<&'static str> {
        self.chosen.iter().find(|(o, _)| *o == op.name).map(|(_, v)| *v)
    }

    /// The variant of `op`: the chosen one, else `default`.
    pub fn variant(&self, op: &'static Op, default: &str) -> Result<&'static Variant> {
        op.variant(self.chosen(op).unwrap_or(default))
    }
}

/// What every op wrapper needs beside its own arguments. Each `ops/NAME.rs` has
/// `pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node>`: it checks the shapes, picks the
/// variant (chosen by name, else the default for the shape), and declares every span it reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Variants chosen by name.
    pub selection: &'a Selection,
    /// Element type of weights and activations.
    pub dtype: DType,
    /// SMs to spread the work over.
    pub sm_count: u32,
    /// Whether the node may be launched before its predecessors end (programmatic dependent launch).
    pub dependent: bool,
}

/// `numerator / denominator`, rounded up, as a grid dimension.
pub fn div_ceil(numerator: usize, denominator: usize) -> u32 {
    u32::try_from(numerator.div_ceil(denominator)).unwrap_or(u32::MAX)
}
