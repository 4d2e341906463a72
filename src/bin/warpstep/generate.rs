//! `warpstep generate`: a caption in, PNGs out; and what `warpstep edit` shares with it.

use crate::args::{DeviceArgs, Precision, parse_size};
use crate::loading::{LoadArgs, load};
use crate::outputs::{OutputFiles, numbered, with_ending, with_number};
use crate::prompts::{Prompt, read_prompts};
use crate::think::{ThinkArgs, Thought};
use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::borrow::Cow;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use warpstep::Error;
use warpstep::device::Device;
use warpstep::device::emulated::build_kind;
use warpstep::engine::{Engine, EngineOptions, ModelSource, Plan};
use warpstep::event::{CancelToken, Control, Event};
use warpstep::image::{Metadata, RgbImage, write_png};
use warpstep::ops::DType;
use warpstep::reconstruct::decode_tokens;
use warpstep::request::{GenerateRequest, Preset, RequestFields};
use warpstep::rng::random_seed;
use warpstep::sampler::{GuidanceSchedule, Sampler};
use warpstep::session::Session;
use warpstep::tokens::ImageTokens;

/// Make pictures from a caption, or from every line of a file.
///
/// Settings that are not given come from the model's own defaults (or --preset); what was used is printed and
/// stored in the PNG, where `warpstep inspect` finds it.
///
///   warpstep generate "a small blue star on a yellow background" --seed 7 -n 4 -o stars.png
///
///   warpstep generate "a red panda" --model NextStep-1.1 --size 512x512 --steps 28 --cfg 7.5
///
///   warpstep generate --prompts captions.txt -o out.png        # out-0.png, out-1.png, ...
#[derive(Args)]
#[command(allow_negative_numbers = true)]
pub struct Generate {
    /// The caption.
    #[arg(required_unless_present_any = ["prompts", "from_tokens"], conflicts_with = "prompts")]
    prompt: Option<String>,

    /// Decode the image tokens of a file that --save-tokens wrote: the same pictures again, without the transformer.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "prompt", "prompts", "size", "negative", "positive", "cfg", "cfg_schedule", "steps", "sampler", "shift",
        "noise_level", "use_norm", "rescale", "seed", "n", "first_image", "preset", "preview", "save_tokens",
        "plan", "think", "refine",
    ])]
    from_tokens: Option<PathBuf>,

    #[command(flatten)]
    options: Options,
}

/// Everything but prompt and pictures.
#[derive(Args)]
pub struct Options {
    /// Take prompts from a file, one a line, all with the same settings and seed, instead of one from the command line.
    /// Empty lines and lines that start with # are passed over. A number is added to the names of what is written,
    /// from 0: out-0.png; with -n above 1 another for the image, out-0-0.png.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,

    /// Checkpoint folder in the official layout [default: the demo model inside this program].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// VAE folder [default: what config.json names, else vae/ in the model folder].
    #[arg(long, value_name = "DIR", requires = "model")]
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

    /// Images to make in one batch; each is what it would be alone. Their prompts are prefilled once for all.
    #[arg(short, value_name = "N", alias = "num-images-per-caption")]
    n: Option<u32>,

    /// Number of the first image: `--first-image 2` makes the third image of a batch by itself.
    #[arg(long, value_name = "I")]
    first_image: Option<u32>,

    /// Settings of the official examples instead of the model's defaults: t2i (text to image), edit.
    #[arg(long, value_name = "NAME", value_parser = named(Preset::from_name, "t2i, edit"))]
    preset: Option<Preset>,

    /// Element type of weights and activations.
    #[arg(long, value_enum, default_value = "bf16")]
    precision: Precision,

    /// Rewrite this PNG with the picture so far after each row of image tokens. Each costs a VAE decode of those rows,
    /// and differs a little from what they will be in the whole picture, which it does not change.
    #[arg(long, value_name = "FILE")]
    preview: Option<PathBuf>,

    /// Rows of image tokens between two previews.
    #[arg(long, value_name = "N", default_value = "1", requires = "preview")]
    preview_rows: NonZeroU32,

    /// Also store the image tokens, for `generate --from-tokens`: a safetensors file, whose ending is added to a name
    /// without one.
    #[arg(long, value_name = "FILE")]
    save_tokens: Option<PathBuf>,

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
    loading: LoadArgs,

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
        match &self.from_tokens {
            Some(path) => self.options.decode(path),
            None => self.options.run(self.prompt, None),
        }
    }
}

/// One prompt's request, and where its pictures go.
struct Job {
    prompt: Prompt,
    request: GenerateRequest,
    /// Tokens of one of its pictures.
    image_tokens: usize,
    /// Number of the prompt in its file.
    number: Option<usize>,
    files: Files,
}

/// What is written of one prompt, or of one file of image tokens.
struct Files {
    pictures: Vec<PathBuf>,
    tokens: Option<PathBuf>,
}

impl Files {
    fn add_to(&self, outputs: &mut OutputFiles) {
        outputs.add("output", &self.pictures);
        outputs.add("save-tokens", &self.tokens);
    }
}

impl Options {
    /// Whether the prompts come from a file.
    pub fn has_prompts(&self) -> bool {
        self.prompts.is_some()
    }

    /// Makes the pictures of `prompt`, or of the file of prompts.
    pub fn run(&self, prompt: Option<String>, edit: Option<EditInput>) -> Result<ExitCode> {
        self.think.check()?;
        let prompts = match (&self.prompts, prompt) {
            (Some(path), _) => read_prompts(path)?,
            (None, prompt) => vec![Prompt { text: prompt.unwrap_or_default(), place: None }],
        };
        let device = if self.plan { None } else { Some(self.device.open()?) };
        let jobs = self.jobs(prompts, edit.as_ref(), device.as_deref())?;
        let Some(device) = device else { return Ok(ExitCode::SUCCESS) };
        let mut outputs = OutputFiles::default();
        jobs.iter().for_each(|job| job.files.add_to(&mut outputs));
        let images = jobs.first().map_or(0, |job| job.files.pictures.len());
        outputs.add("preview", &self.preview_files(images));
        outputs.check(&self.prompts)?;
        let (source, options) = self.model()?;
        let engine = Arc::new(load(&source, device, options)?);
        let progress = progress_bar(jobs.iter().map(|job| job.image_tokens as u64).sum());
        let mut session = engine.session();
        let count = jobs.len();
        for mut job in jobs {
            if let Some(number) = job.number {
                progress.suspend(|| eprintln!("prompt {} of {count}: {}", number + 1, job.prompt.text));
            }
            job.request.images = edit.as_ref().map(|edit| edit.images.clone()).unwrap_or_default();
            let thought = job.prompt.about(self.think.apply(&mut session, &mut job.request))?;
            let made = self.make(&engine, &mut session, &job, thought.as_ref(), &progress);
            job.prompt.about(made)?;
        }
        progress.finish_and_clear();
        Ok(ExitCode::SUCCESS)
    }

    /// Checks all requests by an engine that only plans: what is wrong with one is said before weights are read, which
    /// may take minutes, and before the first picture. Without a device the plans are printed.
    fn jobs(
        &self,
        prompts: Vec<Prompt>,
        edit: Option<&EditInput>,
        device: Option<&dyn Device>,
    ) -> Result<Vec<Job>> {
        let sm_count = device.map_or_else(|| self.device.planned_sm_count(), |d| Ok(d.info().sm_count))?;
        let (source, options) = self.model()?;
        let engine = Engine::for_planning(&source, sm_count, options)?;
        // All get the seed that was drawn for the first.
        let seed = self.seed.unwrap_or_else(random_seed);
        let mut jobs = Vec::new();
        for (index, prompt) in prompts.into_iter().enumerate() {
            let mut request = prompt.about(self.request(&engine, &prompt.text, edit, seed))?;
            request.images = edit.map(|edit| edit.images.clone()).unwrap_or_default();
            let plan = prompt.about(engine.plan(&request).map_err(Into::into))?;
            prompt.about(self.think.plan(&engine, &request))?;
            // Every job has the same pictures: once is enough.
            request.images.clear();
            if device.is_none() {
                self.print_plan(&engine, &request, &plan);
            }
            let number = self.prompts.is_some().then_some(index);
            let files = self.files(number, request.n as usize);
            jobs.push(Job { prompt, request, image_tokens: plan.image_tokens, number, files });
        }
        Ok(jobs)
    }

    fn model(&self) -> Result<(ModelSource, EngineOptions)> {
        let source = match &self.model {
            Some(dir) => ModelSource::Dir(dir.clone()),
            None => ModelSource::Demo,
        };
        let options = EngineOptions {
            dtype: self.precision.into(),
            vae: self.vae.clone(),
            kernels: self.device.selection()?,
            text: self.think.writes(),
            ..self.loading.options()
        };
        Ok((source, options))
    }

    fn print_plan(&self, engine: &Engine, request: &GenerateRequest, plan: &Plan) {
        match self.json {
            true => println!("{}", serde_json::json!({ "request": request, "plan": plan })),
            false => println!("{}: {}\n{}", engine.name(), request.describe(), sizes(plan)),
        }
    }

    /// Makes and writes the pictures of one prompt.
    fn make(
        &self,
        engine: &Engine,
        session: &mut Session,
        job: &Job,
        thought: Option<&Thought>,
        progress: &ProgressBar,
    ) -> Result<()> {
        let request = &job.request;
        let plan = engine.plan(request)?;
        progress.suspend(|| eprintln!("{}: {}\n{}", engine.name(), request.describe(), sizes(&plan)));
        let mut unwritten = None;
        let result = session.generate(request, &CancelToken::new(), &mut |event| {
            let shown = match event {
                Event::Token { .. } => {
                    progress.inc(1);
                    Ok(())
                }
                Event::Preview { rows, of, images } => self.write_previews(images, (*rows, *of)),
                _ => Ok(()),
            };
            match shown {
                Ok(()) => Control::Continue,
                Err(error) => {
                    unwritten = Some(error);
                    Control::Stop
                }
            }
        });
        if let Some(error) = unwritten {
            return Err(error);
        }
        let result = result?;
        // Whoever watches the preview sees the end as well.
        let rows = request.height as usize / engine.limits().down_factor as usize;
        self.write_previews(&result.images, (rows, rows))?;
        let notes: Vec<Metadata> = match self.no_metadata {
            true => Vec::new(),
            false => (0..request.n).map(|index| self.metadata(engine, request, thought, index)).collect(),
        };
        write_pictures(&job.files.pictures, &result.images, &notes)?;
        if let (Some(path), Some(tokens)) = (&job.files.tokens, result.tokens) {
            ImageTokens { notes, ..tokens }.save(path)?;
        }
        // JSON holds no name that is not UTF-8 as it is.
        let files: Vec<Cow<str>> =
            job.files.pictures.iter().chain(&job.files.tokens).map(|file| file.to_string_lossy()).collect();
        let t = result.timings;
        progress.suspend(|| {
            files.iter().for_each(|file| eprintln!("wrote {file}"));
            eprintln!(
                "encode {:.0} ms, prefill {:.0} ms ({} tokens, {} repeated, {} kept), {} tokens in {:.0} ms \
                 ({:.1} tokens/s), VAE {:.0} ms, total {:.2} s",
                t.vae_encode_ms,
                t.prefill_ms,
                result.reuse.prefilled_tokens,
                result.reuse.repeated_tokens,
                result.reuse.kept_tokens,
                plan.image_tokens,
                t.decode_ms,
                plan.image_tokens as f64 / (t.decode_ms / 1e3).max(1e-9),
                t.vae_decode_ms,
                t.total_ms / 1e3
            );
        });
        if self.json {
            let value = serde_json::json!({
                "files": files, "request": request, "plan": result.plan, "timings": t, "reuse": result.reuse,
                "device": engine.device_info().name, "thought": thought,
            });
            println!("{value}");
        }
        Ok(())
    }

    /// Makes the pictures of stored image tokens.
    fn decode(&self, path: &PathBuf) -> Result<ExitCode> {
        let tokens = ImageTokens::load(path)?;
        let device = self.device.open()?;
        let (source, options) = self.model()?;
        let engine = Engine::for_planning(&source, device.info().sm_count, options.clone())?;
        tokens.check_layout(path, &engine.token_layout())?;
        let files = self.files(None, tokens.images);
        let mut outputs = OutputFiles::default();
        files.add_to(&mut outputs);
        outputs.check([path])?;
        let engine = load(&source, device, options)?;
        if tokens.model != engine.name() {
            eprintln!("the tokens are of model {:?} and are decoded by {:?}", tokens.model, engine.name());
        }
        let precision = DType::from(self.precision);
        if tokens.dtype != precision {
            eprintln!(
                "the tokens are in {} and are decoded in {}: the pictures differ a little from the first ones",
                tokens.dtype.name(),
                precision.name()
            );
        }
        let images = decode_tokens(&engine, &tokens)?;
        let notes = if self.no_metadata { &[][..] } else { &tokens.notes };
        write_pictures(&files.pictures, &images, notes)?;
        let files: Vec<Cow<str>> = files.pictures.iter().map(|file| file.to_string_lossy()).collect();
        files.iter().for_each(|file| eprintln!("wrote {file}"));
        if self.json {
            let (rows, columns) = tokens.grid;
            println!("{}", serde_json::json!({ "files": files, "rows": rows, "columns": columns }));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Where the pictures of a prompt and their tokens go.
    fn files(&self, prompt: Option<usize>, images: usize) -> Files {
        let place = |path: &Path| prompt.map_or_else(|| path.to_path_buf(), |n| with_number(path, n));
        let tokens = self.save_tokens.as_ref().map(|path| with_ending(path, "safetensors"));
        Files {
            pictures: all_numbered(&place(&self.output), images),
            tokens: tokens.map(|path| place(&path)),
        }
    }

    /// Where previews go: those of the next prompt take the place of the last one's.
    fn preview_files(&self, images: usize) -> Vec<PathBuf> {
        self.preview.iter().flat_map(|path| all_numbered(path, images)).collect()
    }

    /// What was given, over the preset's or the model's defaults.
    fn request(
        &self,
        engine: &Engine,
        prompt: &str,
        edit: Option<&EditInput>,
        seed: u64,
    ) -> Result<GenerateRequest> {
        // An edited picture keeps the size of the first one.
        let first = edit.and_then(|edit| edit.images.first()).map(|image| (image.width(), image.height()));
        let factor = engine.limits().down_factor;
        if let Some((width, height)) =
            first.filter(|(w, h)| !w.is_multiple_of(factor) || !h.is_multiple_of(factor))
        {
            let reason = format!(
                "the first is {width}x{height} pixels; both sides must divide by {factor}: choose a resize mode (--resize)"
            );
            return Err(Error::request("images", reason).into());
        }
        let size = self.size.or(first);
        let fields = RequestFields {
            prompt: Some(prompt.into()),
            negative_prompt: self.negative.clone(),
            positive_prompt: self.positive.clone(),
            width: size.map(|(width, _)| width),
            height: size.map(|(_, height)| height),
            n: self.n,
            first_image: self.first_image,
            seed: Some(seed),
            sampler: self.sampler,
            steps: self.steps,
            guidance_scale: self.cfg,
            // An editing model or preset has a default that without a picture guides towards nothing.
            image_guidance_scale: edit.map_or(Some(1.0), |edit| edit.cfg_img),
            guidance_schedule: self.cfg_schedule,
            timesteps_shift: self.shift,
            noise_level: self.noise_level,
            use_norm: self.use_norm,
            rescale: self.rescale,
        };
        let defaults = self.preset.map_or_else(|| *engine.defaults(), Preset::defaults);
        let mut request = fields.resolve(&defaults)?;
        request.preview_every_rows = self.preview.as_ref().map(|_| self.preview_rows);
        request.keep_tokens = self.save_tokens.is_some();
        Ok(request)
    }

    /// Pictures that show `rows` of `of` rows of tokens, if they are wanted. They carry that and no parameters.
    fn write_previews(&self, images: &[RgbImage], (rows, of): (usize, usize)) -> Result<()> {
        if self.preview.is_none() {
            return Ok(());
        }
        let label = Metadata {
            parameters: format!("Preview: {rows} of {of} rows of image tokens"),
            json: serde_json::json!({ "preview": { "rows": rows, "of": of } }).to_string(),
        };
        write_pictures(&self.preview_files(images.len()), images, &vec![label; images.len()])
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
        let device = engine.device_info();
        let mut json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": engine.name(),
            "device": device.name,
            // Sums are split among so many, and rounded where they are.
            "sm_count": device.sm_count,
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

/// The names of `count` pictures.
fn all_numbered(path: &Path, count: usize) -> Vec<PathBuf> {
    (0..count).map(|index| numbered(path, index, count)).collect()
}

/// Writes pictures with what each remembers.
fn write_pictures(files: &[PathBuf], images: &[RgbImage], notes: &[Metadata]) -> Result<()> {
    for (index, (file, image)) in files.iter().zip(images).enumerate() {
        write_png(file, image, notes.get(index))?;
    }
    Ok(())
}

fn sizes(plan: &Plan) -> String {
    format!(
        "{} image tokens x {}, {} branches, {:.1} MB of weights, {:.1} MB for this request",
        plan.image_tokens,
        plan.images,
        plan.branches,
        plan.weight_bytes as f64 / 1e6,
        plan.request_bytes() as f64 / 1e6
    )
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
