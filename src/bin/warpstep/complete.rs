//! `warpstep complete`: a text in, its continuation out.

use crate::args::{DeviceArgs, Precision};
use crate::loading::{LoadArgs, load};
use crate::picture::{PictureArgs, read_picture};
use anyhow::Result;
use clap::Args;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use warpstep::Error;
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event};
use warpstep::text::{RandomSampling, TextEnd, TextRequest, TextSampling};

/// Continue a text with the language model's head.
///
/// The continuation, without the prompt, goes to stdout as it is written. It ends at the model's end-of-text token,
/// where a picture would begin, or after --max-tokens. Without sampling options the most probable token is taken
/// every time; any of --temperature, --top-k and --top-p draws instead, as in transformers: temperature, then top-k,
/// then top-p.
///
/// The prompt may show pictures: each --image stands where the text says <image>, or in front of it if it says so
/// nowhere.
///
///   warpstep complete "a red"
///
///   warpstep complete "a small" --temperature 0.8 --top-p 0.95 --seed 7
///
///   warpstep complete "<image>" --image circle.png --max-tokens 20
#[derive(Args)]
#[command(allow_negative_numbers = true)]
pub struct Complete {
    /// The text to continue.
    prompt: String,

    /// A picture that the prompt shows: a PNG, JPEG or WebP file whose sides divide by the model's token size (16)
    /// unless --resize is given; may be repeated.
    #[arg(long = "image", value_name = "FILE")]
    images: Vec<PathBuf>,

    #[command(flatten)]
    pictures: PictureArgs,

    /// Most tokens to write.
    #[arg(long, alias = "max-new-tokens", value_name = "N", default_value_t = 256)]
    max_tokens: u32,

    /// Divides the logits: 1 is the model's own distribution, less is more predictable, 0 is greedy.
    #[arg(long, value_name = "F")]
    temperature: Option<f64>,

    /// Draw from the N most probable tokens only; 0 is all.
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,

    /// Draw from the most probable tokens only that together have this probability.
    #[arg(long, value_name = "F")]
    top_p: Option<f64>,

    /// Seed of the draws, which are not torch's [default: a random one, printed].
    #[arg(long, value_name = "U64")]
    seed: Option<u64>,

    /// Checkpoint folder in the official layout [default: the demo model inside this program].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// VAE folder [default: what config.json names, else vae/ in the model folder].
    #[arg(long, value_name = "DIR", requires = "model")]
    vae: Option<PathBuf>,

    /// Element type of weights and activations.
    #[arg(long, value_enum, default_value = "bf16")]
    precision: Precision,

    /// Print a JSON description of the result on stdout instead of the text alone.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    loading: LoadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// What the three sampling options mean together. Greedy text refuses those that would have no effect.
fn sampling(temperature: Option<f64>, top_k: Option<u32>, top_p: Option<f64>) -> Result<TextSampling> {
    if temperature == Some(0.0) {
        let idle = [("top_k", top_k.is_some()), ("top_p", top_p.is_some())];
        return match idle.into_iter().find(|(_, given)| *given) {
            Some((field, _)) => Err(Error::request(field, "has no effect at temperature 0").into()),
            None => Ok(TextSampling::Greedy),
        };
    }
    if temperature.is_none() && top_k.is_none() && top_p.is_none() {
        return Ok(TextSampling::Greedy);
    }
    Ok(TextSampling::Random(RandomSampling {
        temperature: temperature.unwrap_or(1.0),
        top_k: top_k.and_then(NonZeroU32::new),
        top_p,
    }))
}

impl Complete {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        let sampling = sampling(self.temperature, self.top_k, self.top_p)?;
        let greedy = sampling == TextSampling::Greedy;
        if self.seed.is_some() && greedy && self.images.is_empty() {
            let reason =
                "has no effect on greedy text: nothing is drawn without --temperature, --top-k or --top-p";
            return Err(Error::request("seed", reason).into());
        }
        let mut request = TextRequest::new(&self.prompt);
        request.images =
            self.images.iter().map(|path| read_picture(path, self.pictures.resize)).collect::<Result<_>>()?;
        if self.pictures.resize.is_some() && self.images.is_empty() {
            return Err(Error::request("resize", "has no effect without --image").into());
        }
        request.max_tokens = self.max_tokens;
        request.sampling = sampling;
        request.seed = self.seed.unwrap_or(request.seed);
        let source = match &self.model {
            Some(dir) => ModelSource::Dir(dir.clone()),
            None => ModelSource::Demo,
        };
        let options = EngineOptions {
            dtype: self.precision.into(),
            vae: self.vae.clone(),
            kernels: self.device.selection()?,
            text: true,
            ..self.loading.options()
        };
        let device = self.device.open()?;
        // What is wrong with the request is said before weights are read, which may take minutes.
        let plan = Engine::for_planning(&source, device.info().sm_count, options.clone())?;
        let plan = plan.plan_text(&request)?;
        let engine = Arc::new(load(&source, device, options)?);
        let how = match &request.sampling {
            TextSampling::Greedy => "greedy".to_owned(),
            TextSampling::Random(r) => {
                let mut how = format!("temperature {}", r.temperature);
                how += &r.top_k.map_or_else(String::new, |k| format!(", top-k {k}"));
                how += &r.top_p.map_or_else(String::new, |p| format!(", top-p {p}"));
                how + &format!(", seed {}", request.seed)
            }
        };
        eprintln!(
            "{}: {} prompt tokens, at most {} more, {how}; {:.1} MB of weights, {:.1} MB for this request",
            engine.name(),
            plan.prompt_tokens,
            plan.max_tokens,
            plan.weight_bytes as f64 / 1e6,
            (plan.cache_bytes + plan.activation_bytes) as f64 / 1e6
        );
        let made = engine.session().complete(&request, &CancelToken::new(), &mut |event| {
            if let (Event::Text { piece, .. }, false) = (event, self.json) {
                print!("{piece}");
            }
            Control::Continue
        })?;
        if self.json {
            let value = serde_json::json!({
                "prompt": request.prompt, "text": made.text, "ids": made.ids, "end": made.end,
                "sampling": request.sampling, "seed": request.seed, "plan": made.plan, "timings": made.timings,
                "device": engine.device_info().name,
            });
            println!("{value}");
        } else {
            println!();
        }
        let end = match &made.end {
            TextEnd::Token(token) => format!("ended at {token}"),
            TextEnd::MaxTokens => "stopped at the limit of tokens".to_owned(),
        };
        let t = made.timings;
        eprintln!(
            "{} tokens, {end}; prefill {:.0} ms, text {:.0} ms ({:.1} tokens/s), total {:.2} s",
            made.ids.len(),
            t.prefill_ms,
            t.decode_ms,
            made.ids.len() as f64 / (t.decode_ms / 1e3).max(1e-9),
            t.total_ms / 1e3
        );
        Ok(ExitCode::SUCCESS)
    }
}
