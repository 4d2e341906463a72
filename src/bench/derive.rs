//! What a token must cost, without a GPU: the node list of one token is recorded on a device of paper, its bytes are
//! counted, and a stated bandwidth gives the time. Derived, never measured: launches, dependencies and arithmetic are
//! free here, so that a real token takes longer.

use super::bytes::{OpBytes, count, total};
use super::model::{Options, grid, spec};
use crate::device::Device;
use crate::device::NodeList;
use crate::device::paper::PaperDevice;
use crate::error::{Error, Result};
use crate::model::config::{ModelConfig, VaeConfig};
use crate::model::nextstep::NextStep;
use crate::model::run::Run;
use crate::ops::{DType, registry};
use serde::Serialize;
use std::fmt::Write as _;
use std::sync::Arc;

/// What its JSON says it is.
pub const SCHEMA: &str = "warpstep-derived-1";

/// SMs of the shipped geometry.
const SM_COUNT: u32 = 132;

/// A token of one model, counted.
#[derive(Clone, Debug, Serialize)]
pub struct Derived {
    /// Nodes of a token.
    pub nodes: usize,
    /// Slots of the cache that a token reads: the mean over a picture.
    pub context: usize,
    /// Tokens of a picture.
    pub tokens: usize,
    /// Width and height of a picture in pixels.
    pub size: (usize, usize),
    /// By op.
    pub token: Vec<OpBytes>,
    /// The prompt, by op.
    pub prefill: Vec<OpBytes>,
    /// The VAE's decoder, by op.
    pub image: Vec<OpBytes>,
    /// Bytes per second.
    pub bandwidth: f64,
}

/// Records and counts, without memory: for pictures of `size` pixels at `bandwidth` bytes per second.
pub fn derive(
    configs: &(ModelConfig, VaeConfig),
    dtype: DType,
    options: &Options,
    size: (usize, usize),
    bandwidth: f64,
) -> Result<Derived> {
    if !(bandwidth.is_finite() && bandwidth > 0.0) {
        return Err(Error::request("bandwidth", format!("{bandwidth}: bytes per second, such as 3.0e12")));
    }
    let run = paper_run(configs, dtype, options, size)?;
    let tokens = run.spec().tokens_total();
    let context = options.prompt + tokens / 2;
    let token = run.record_token(false)?;
    check_nodes(&token)?;
    let image = run.record_image()?.0;
    Ok(Derived {
        nodes: token.len(),
        context,
        tokens,
        size,
        token: count(&run, &token, context),
        prefill: count(&run, &run.record_prefill(true)?, options.prompt),
        image: count(&run, &image, 0),
        bandwidth,
    })
}

/// A generation that can be recorded and not run.
pub(crate) fn paper_run(
    (config, vae): &(ModelConfig, VaeConfig),
    dtype: DType,
    options: &Options,
    size: (usize, usize),
) -> Result<Run> {
    let device: Arc<dyn Device> = Arc::new(PaperDevice::new(SM_COUNT));
    let model = NextStep::random(&device, (config, vae), dtype, &options.kernels, 1)?;
    let spec = spec(&model, options, grid(&model, size)?)?;
    Run::new(Arc::new(model), &device, options.kernels.clone(), spec)
}

/// Every node must be a kernel of the registry: whatever else there could be, a copy or a call of the host, would
/// stop the token loop.
pub fn check_nodes(list: &NodeList) -> Result<()> {
    let known = |symbol: &str| {
        let variants = registry().iter().flat_map(|op| op.variants);
        variants.flat_map(|variant| variant.kernels).any(|(_, kernel)| kernel.symbol == symbol)
    };
    match list.nodes().iter().find(|node| !known(node.kernel.symbol)) {
        None => Ok(()),
        Some(node) => Err(Error::Internal(format!("{node:?} is no kernel of the registry"))),
    }
}

impl Derived {
    fn ms(&self, bytes: u64) -> f64 {
        bytes as f64 / self.bandwidth * 1e3
    }

    /// Milliseconds of a token: weights and cache at the stated bandwidth.
    pub fn token_ms(&self) -> f64 {
        self.ms(total(&self.token, OpBytes::floor))
    }

    /// Seconds of a picture: prompt, tokens, VAE.
    pub fn image_s(&self) -> f64 {
        let image = total(&self.image, |op| op.weights + op.activations);
        let prefill = total(&self.prefill, OpBytes::floor);
        (self.ms(prefill) + self.ms(image) + self.tokens as f64 * self.token_ms()) / 1e3
    }

    /// Everything as one object.
    pub fn json(&self) -> Result<String> {
        let value = serde_json::json!({
            "schema": SCHEMA, "derived": self, "token_ms": self.token_ms(), "image_s": self.image_s(),
        });
        let text = serde_json::to_string_pretty(&value);
        text.map(|text| text + "\n").map_err(|error| Error::Internal(format!("derived: {error}")))
    }

    /// The table for people, every figure marked as derived.
    pub fn markdown(&self) -> String {
        let (width, height) = self.size;
        let mut text = format!(
            "derived, not measured: bytes of the node list of one token ({} nodes) at {:.2} TB/s, with {} slots of \
             the cache filled\n\n| op | launches | weights MB | cache MB | derived ms |\n|---|---|---|---|---|\n",
            self.nodes,
            self.bandwidth / 1e12,
            self.context
        );
        let mb = |bytes: u64| format!("{:.2}", bytes as f64 / 1e6);
        for op in &self.token {
            // What moves nothing is launched all the same.
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {:.4} |",
                op.op,
                op.launches,
                mb(op.weights),
                mb(op.cache),
                self.ms(op.floor())
            );
        }
        let sum = |what: fn(&OpBytes) -> u64| total(&self.token, what);
        let _ = writeln!(
            text,
            "| **one token** | {} | {} | {} | **{:.3}** |",
            self.nodes,
            mb(sum(|op| op.weights)),
            mb(sum(|op| op.cache)),
            self.token_ms()
        );
        let image = total(&self.image, |op| op.weights + op.activations);
        let prefill = total(&self.prefill, OpBytes::floor);
        let _ = writeln!(text, "| prompt | | {} | | {:.3} |", mb(prefill), self.ms(prefill));
        let _ = writeln!(
            text,
            "| VAE decode {width}x{height}, with its activations | | {} | | {:.3} |",
            mb(image),
            self.ms(image)
        );
        let _ = writeln!(
            text,
            "| **picture {width}x{height}, {} tokens** | | | | **{:.2} s** |",
            self.tokens,
            self.image_s()
        );
        let _ = writeln!(
            text,
            "\nThe flow head's weights count once per evaluation. {} MB of activations and tables per token stay in \
             the L2 cache and are not priced; neither are launches, dependencies and arithmetic.",
            mb(sum(|op| op.activations))
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::samples::Effort;
    use crate::bench::synthetic::configs;
    use crate::ops::Selection;

    fn options() -> Options {
        Options {
            steps: 28,
            branches: 2,
            images: 1,
            prompt: 96,
            positions: Vec::new(),
            sizes: Vec::new(),
            end_to_end: false,
            kernels: Selection::default(),
            effort: Effort::for_device("paper"),
            pictures: 1,
            seed: 1,
        }
    }

    fn bytes(ops: &[OpBytes], name: &str) -> OpBytes {
        ops.iter().find(|op| op.op == name).unwrap_or_else(|| panic!("no {name} in {ops:?}")).clone()
    }

    #[test]
    fn a_token_of_the_14b_is_at_most_250_kernels_and_nothing_else() {
        let derived =
            derive(&configs("14b", None).unwrap(), DType::Bf16, &options(), (512, 512), 3.0e12).unwrap();
        assert!(derived.nodes <= 250, "{} nodes", derived.nodes);
        assert_eq!(derived.tokens, 1024);
    }

    /// Packed for a kernel, weights may take up to 2 % more than their tensors.
    fn near(found: u64, tensors: u64) {
        assert!((tensors..=tensors + tensors / 50).contains(&found), "{found} bytes for {tensors}");
    }

    #[test]
    fn counted_bytes_are_those_of_the_shapes() {
        let derived =
            derive(&configs("14b", None).unwrap(), DType::Bf16, &options(), (512, 512), 3.0e12).unwrap();
        // From the shapes, two bytes each: weights, bias, norm; per layer, times 48.
        let layers = |elements: u64| 48 * 2 * elements;
        let token = &derived.token;
        near(bytes(token, "qkv").weights, layers(36_700_160 + 7_168 + 5_120));
        near(bytes(token, "o_proj").weights, layers(26_214_400));
        near(bytes(token, "gate_up").weights, layers(141_557_760 + 5_120));
        near(bytes(token, "down").weights, layers(70_778_880));
        near(bytes(token, "flow.modulation").weights, 2 * (84_989_952 + 4_721_664));
        near(bytes(token, "out_proj").weights, 2 * (26_219_520 + 5_120));
        // The cache: 196 608 bytes per slot and branch are read, one slot per branch is written.
        assert_eq!(bytes(token, "attention").cache, 2 * 196_608 * (96 + 512));
        assert_eq!(bytes(token, "qkv").cache, 2 * 196_608);
        // The chain per evaluation, and image_in_projector once: 56 659 968 + 198 208 + 36 864 and 332 800.
        near(bytes(token, "flow.chain").weights, 2 * (28 * (56_659_968 + 198_208 + 36_864) + 332_800));
        // The prompt reads every layer once, however many rows; of the embedding one row each.
        near(bytes(&derived.prefill, "down").weights, layers(70_778_880));
        near(bytes(&derived.prefill, "prefill.embed").weights, 2 * 96 * 5_120 * 2);
        // 2.515 TFLOP for the decoder at 512x512, most of it convolutions.
        let flops = total(&derived.image, |op| op.flops) as f64 / 1e12;
        assert!((flops - 2.515).abs() < 0.02, "{flops}");
        assert!((derived.token_ms() - 10.0).abs() < 0.2, "{}", derived.token_ms());
    }

    #[test]
    fn a_longer_context_and_more_branches_move_more_cache_only() {
        let configs = configs("tiny", None).unwrap();
        let count = |options: &Options| derive(&configs, DType::Bf16, options, (64, 64), 3.0e12).unwrap();
        let (a, b) = (count(&options()), count(&Options { prompt: 192, branches: 1, ..options() }));
        let sum = |d: &Derived, what: fn(&OpBytes) -> u64| total(&d.token, what);
        assert_eq!(sum(&a, |op| op.weights), sum(&b, |op| op.weights));
        assert_eq!(sum(&a, |op| op.cache) * (192 + 8 + 1), sum(&b, |op| op.cache) * 2 * (96 + 8 + 1));
        assert!(derive(&configs, DType::Bf16, &options(), (64, 60), 3.0e12).is_err());
        assert!(derive(&configs, DType::Bf16, &options(), (64, 64), f64::NAN).is_err());
    }

    /// What `tools/run-bundle.sh` tries: a variant that is named is taken for the prompt too, and a ring holds few rows.
    #[test]
    fn rings_fit_a_token_of_the_14b_after_prompts_of_one_token() {
        let rings = ["qkv", "o_proj", "gate_up", "down", "out_proj", "linear"].map(|op| format!("{op}=ring"));
        let kernels = Selection::parse(&rings).unwrap();
        let with = |prompt| {
            let options = Options { kernels: kernels.clone(), prompt, ..options() };
            derive(&configs("14b", None).unwrap(), DType::Bf16, &options, (512, 512), 3.0e12)
        };
        with(1).unwrap();
        assert!(matches!(with(96), Err(Error::Unsupported { .. })));
    }
}
