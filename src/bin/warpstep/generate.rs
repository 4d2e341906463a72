//! `warpstep generate`: a caption in, PNGs out; and what `warpstep edit` shares with it.

use crate::args::{DeviceArgs, Precision, parse_size};
use crate::think::{ThinkArgs, Thought};
use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use warpstep::device::emulated::build_kind;
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event};
use warpstep::image::{Metadata, RgbImage, write_png};
use warpstep::request::{GenerateRequest, Preset, RequestFields};
use warpstep::sampler::{GuidanceSchedule, Sampler};

/// Make pictures from a caption.
///
/// Settings that are not given come from the model's own defaults (or --preset); what was used is printed and
/// stored in the PNG, where `warpstep inspect` finds it.
///
///   warpstep generate "a small blue star on a yellow background" --seed 7 -n 4 -o stars.png
///
///   warpstep generate "a red panda" --model NextStep-1.1 --size 512x512 --steps 28 --cfg 7.5
#[derive(Args)]
pub struct Generate {
    /// The caption.
    prompt: String,

    #[command(flatten)]
    options: Options,
}

/// Everything but prompt and pictures.
#[derive(Args)]
pub struct Options {
    /// Checkpoint folder in the official layout [default: the demo model inside this program].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// VAE folder [default: what config.json names, else vae/ in the model folder].
    #[arg(long, value_name = "DIR")]
    vae: Option<PathBuf>,

    /// Picture size in pixels, width first; both must divide by the model's token size (16).
    #[arg(long, value_name = "WxH", value_parser = parse_size)]
    size: Option<(u32, u32)>,

    /// What the picture should not show.
    #[arg(long, alias = "negative-prompt", value_name = "TEXT")]
    negative: Option<String>,

    /// Words added to the caption, e.g. "masterpiece, film grained, best quality."
    #[arg(long, alias = "positive-prompt", value_name = "TEXT")]
    positive: Option<String>,

    /// Guidance scale: 1 is none.
    #[arg(long, alias = "guidance-scale", value_name = "F")]
    cfg: Option<f64>,

    /// How guidance changes over the picture: constant, linear (falling), linear-rising.
    #[arg(long, value_name = "NAME", value_parser = named(GuidanceSchedule::from_name, "constant, linear, linear-rising"))]
    cfg_schedule: Option<GuidanceSchedule>,

    /// Network evaluations per image token.
    #[arg(long, alias = "num-sampling-steps", alias = "num-inference-steps", value_name = "N")]
    steps: Option<u32>,

    /// Sampler: aug (August 2025), hf11 (inside the 1.1 checkpoint), sde, cps, ode (February 2026).
    #[arg(long, value_name = "NAME", value_parser = named(Sampler::from_name, "aug, hf11, sde, cps, ode"))]
    sampler: Option<Sampler>,

    /// Time shift: above 1 spends more steps near the noise.
    #[arg(long, alias = "timesteps-shift", value_name = "F")]
    shift: Option<f64>,

    /// Noise of the sde and cps samplers, 0 to 1.
    #[arg(long, value_name = "F")]
    noise_level: Option<f64>,

    /// Normalise every token before it is fed back: true or false.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    use_norm: Option<bool>,

    /// Scale the guided velocity down to the size of the unguided one where it is larger: true or false.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    rescale: Option<bool>,

    /// Seed of the noise; the same stream as the official code on a GPU [default: a random one, printed].
    #[arg(long, value_name = "U64")]
    seed: Option<u64>,

    /// Images to make in one batch; each is what it would be alone.
    #[arg(short, value_name = "N", alias = "num-images-per-caption")]
    n: Option<u32>,

    /// Number of the first image: `--first-image 2` makes the third image of a batch by itself.
    #[arg(long, value_name = "I")]
    first_image: Option<u32>,

    /// Settings of the official examples instead of the model's defaults.
    #[arg(long, value_parser = named(Preset::from_name, "t2i, edit"))]
    preset: Option<Preset>,

    /// Element type of weights and activations.
    #[arg(long, value_enum, default_value = "bf16")]
    precision: Precision,

    /// Write the picture so far after every so many rows of image tokens, to FILE-preview.png. Each costs a VAE
    /// decode of those rows, and differs a little from what they will be in the whole picture.
    #[arg(long, value_name = "ROWS")]
    preview: Option<NonZeroU32>,

    /// Read copies of the weight files instead of mapping them.
    #[arg(long)]
    no_mmap: bool,

    /// Store no parameters in the PNG.
    #[arg(long)]
    no_metadata: bool,

    /// Say what the request will take, on stdout, and stop: the model is opened and checked, but no weights are read.
    /// For an H100's 132 SMs unless --device cuda or --sm-count says otherwise.
    #[arg(long)]
    plan: bool,

    /// Print a JSON description of the result on stdout.
    #[arg(long)]
    json: bool,

    /// PNG to write; with -n above 1 a number is added: out-0.png, out-1.png.
    #[arg(short, long, value_name = "FILE", default_value = "warpstep.png")]
    output: PathBuf,

    #[command(flatten)]
    think: ThinkArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// A parser for values chosen by name.
fn named<T: Clone + Send + Sync + 'static>(
    find: fn(&str) -> Option<T>,
    known: &'static str,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |name| find(name).ok_or_else(|| format!("known: {known}"))
}

/// Pictures to be edited, and how far the result follows them.
pub struct EditInput {
    /// The pictures.
    pub images: Vec<RgbImage>,
    /// `image_guidance_scale`.
    pub cfg_img: Option<f64>,
}

impl Generate {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        self.options.run(&self.prompt, None)
    }
}

impl Options {
    /// Makes the pictures.
    pub fn run(&self, prompt: &str, edit: Option<EditInput>) -> Result<ExitCode> {
        if !self.plan {
            check_output(&self.output)?;
        }
        self.think.check()?;
        let source = match &self.model {
            Some(dir) => ModelSource::Dir(dir.clone()),
            None => ModelSource::Demo,
        };
        let options = EngineOptions {
            dtype: self.precision.into(),
            mmap: !self.no_mmap,
            vae: self.vae.clone(),
            kernels: self.device.selection()?,
            text: self.think.writes(),
            ..EngineOptions::default()
        };
        let engine = Arc::new(match self.plan {
            true => Engine::for_planning(&source, self.device.planned_sm_count()?, options)?,
            false => Engine::load(&source, self.device.open()?, options)?,
        });
        let mut request = self.request(&engine, prompt, edit.as_ref())?;
        request.preview_every_rows = self.preview;
        request.images = edit.map(|edit| edit.images).unwrap_or_default();
        let thought = self.think.apply(&engine, &mut request)?;
        let plan = engine.plan(&request)?;
        let sizes = format!(
            "{} image tokens x {}, {} branches, {:.1} MB of weights, {:.1} MB for this request",
            plan.image_tokens,
            plan.images,
            plan.branches,
            plan.weight_bytes as f64 / 1e6,
            plan.request_bytes() as f64 / 1e6
        );
        if self.plan {
            match self.json {
                true => println!("{}", serde_json::json!({ "request": request, "plan": plan })),
                false => println!("{}: {}\n{sizes}", engine.name(), request.describe()),
            }
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("{}: {}\n{sizes}", engine.name(), request.describe());
        let progress = progress_bar(plan.image_tokens as u64);
        let cancel = CancelToken::new();
        let mut unwritten = None;
        let result = engine.session().generate(&request, &cancel, &mut |event| {
            match event {
                Event::Token { done, .. } => progress.set_position(*done as u64),
                Event::Preview { images, .. } => {
                    if let Err(error) = self.write_previews(images) {
                        unwritten = Some(error);
                        return Control::Stop;
                    }
                }
                _ => {}
            }
            Control::Continue
        });
        progress.finish_and_clear();
        if let Some(error) = unwritten {
            return Err(error);
        }
        let result = result?;
        let mut files = Vec::new();
        for (index, image) in result.images.iter().enumerate() {
            let path = numbered(&self.output, index, result.images.len());
            let metadata = match self.no_metadata {
                true => None,
                false => Some(self.metadata(&engine, &request, thought.as_ref(), index as u32)),
            };
            write_png(&path, image, metadata.as_ref())?;
            eprintln!("wrote {}", path.display());
            files.push(path);
        }
        let t = result.timings;
        eprintln!(
            "encode {:.0} ms, prefill {:.0} ms, {} tokens in {:.0} ms ({:.1} tokens/s), VAE {:.0} ms, total {:.2} s",
            t.vae_encode_ms,
            t.prefill_ms,
            plan.image_tokens,
            t.decode_ms,
            plan.image_tokens as f64 / (t.decode_ms / 1e3).max(1e-9),
            t.vae_decode_ms,
            t.total_ms / 1e3
        );
        if self.json {
            let value = serde_json::json!({
                "files": files, "request": request, "plan": result.plan, "timings": t,
                "device": engine.device_info().name, "thought": thought,
            });
            println!("{value}");
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What was given, over the preset's or the model's defaults.
    fn request(&self, engine: &Engine, prompt: &str, edit: Option<&EditInput>) -> Result<GenerateRequest> {
        // An edited picture keeps the size of the first one.
        let first = edit.and_then(|edit| edit.images.first()).map(|image| (image.width(), image.height()));
        let size = self.size.or(first);
        let fields = RequestFields {
            prompt: Some(prompt.into()),
            negative_prompt: self.negative.clone(),
            positive_prompt: self.positive.clone(),
            width: size.map(|(width, _)| width),
            height: size.map(|(_, height)| height),
            n: self.n,
            first_image: self.first_image,
            seed: self.seed,
            sampler: self.sampler,
            steps: self.steps,
            guidance_scale: self.cfg,
            image_guidance_scale: edit.and_then(|edit| edit.cfg_img),
            guidance_schedule: self.cfg_schedule,
            timesteps_shift: self.shift,
            noise_level: self.noise_level,
            use_norm: self.use_norm,
            rescale: self.rescale,
        };
        let defaults = self.preset.map_or_else(|| *engine.defaults(), Preset::defaults);
        Ok(fields.resolve(&defaults)?)
    }

    /// Pictures that are not finished; they carry no parameters.
    fn write_previews(&self, images: &[RgbImage]) -> Result<()> {
        let stem = self.output.file_stem().unwrap_or_default().to_string_lossy();
        let path = self.output.with_file_name(format!("{stem}-preview.png"));
        for (index, image) in images.iter().enumerate() {
            write_png(&numbered(&path, index, images.len()), image, None)?;
        }
        Ok(())
    }

    /// What the PNG remembers: enough to make this image again by itself.
    fn metadata(
        &self,
        engine: &Engine,
        request: &GenerateRequest,
        thought: Option<&Thought>,
        index: u32,
    ) -> Metadata {
        let alone = request.single(index);
        let mut json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": engine.name(),
            "device": engine.device_info().name,
            "emulator": build_kind(),
            "precision": format!("{:?}", self.precision).to_lowercase(),
            "kernels": self.device.kernels,
            "request": alone,
        });
        if let Some(thought) = thought {
            json["thought"] = serde_json::json!(thought);
        }
        Metadata { parameters: alone.webui_parameters(engine.name()), json: json.to_string() }
    }
}

/// Says before the work, not after it, that the picture could not be written.
pub fn check_output(path: &Path) -> Result<()> {
    if path.is_dir() {
        bail!("{} is a folder; -o takes the name of a PNG file", path.display());
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let info = std::fs::metadata(parent).with_context(|| format!("folder {}", parent.display()))?;
    if !info.is_dir() {
        bail!("{} is not a folder", parent.display());
    }
    Ok(())
}

/// `out.png` for one image, `out-3.png` for the fourth of several.
pub fn numbered(path: &Path, index: usize, count: usize) -> PathBuf {
    if count <= 1 {
        return path.to_path_buf();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or_else(|| "png".into(), |e| e.to_string_lossy());
    path.with_file_name(format!("{stem}-{index}.{extension}"))
}

fn progress_bar(tokens: u64) -> ProgressBar {
    // indicatif draws nothing when stderr is not a terminal.
    let bar = ProgressBar::with_draw_target(Some(tokens), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {per_sec}, {eta} left");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}
