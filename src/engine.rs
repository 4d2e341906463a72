//! A loaded model on a device, shared by any number of sessions.

use crate::device::planning::PlanningDevice;
use crate::device::{Device, DeviceInfo};
use crate::error::{Error, Result};
use crate::event::{Control, LoadProgress, milliseconds};
use crate::image::RgbImage;
use crate::model::backbone::rope_frequencies;
use crate::model::config::{ModelConfig, VaeConfig, check_vae_match, resolve_vae_dir};
use crate::model::flow_head::DrawSource;
use crate::model::nextstep::NextStep;
use crate::model::plan::{self, Draws, RunSpec};
use crate::model::sources::Sources;
use crate::model::upload::Uploader;
use crate::model::vae::VaeEncoder;
use crate::ops::{self, DType, Selection};
use crate::prompt::{Prompt, build_rows, with_marks};
use crate::request::{Defaults, GenerateRequest, Limits, RequestFields};
use crate::rng::{CudaRandn, DrawPlan, H100_MAX_THREADS, PosteriorDraw};
use crate::sampler::sinusoids;
use crate::session::Session;
use crate::tokenizer::{ModelTokenIds, Tokenizer};
use crate::tokens::TokenLayout;
use crate::weights::{Checkpoint, ModelWeights, OpenOptions, VaeWeights};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A folder in the official layout: `config.json`, tokenizer files, safetensors, `vae/`.
    Dir(PathBuf),
    /// The demo model inside the library (feature `demo-model`).
    Demo,
}

/// How a model is loaded and run.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Element type of weights, activations and cache.
    pub dtype: DType,
    /// Map weight files instead of reading copies. A file that is truncated while mapped is fatal on Linux; turn
    /// this off where files may change under the process.
    pub mmap: bool,
    /// Threads that convert and pack weights while they are loaded, at most 256; default: one per core that this process
    /// may use, at most 16, and one where that is not known. They are gone when the load returns, and what is loaded
    /// does not depend on their number.
    pub load_threads: Option<NonZeroUsize>,
    /// The VAE's folder; default: what `config.json` names, else `vae/` in the model's folder.
    pub vae: Option<PathBuf>,
    /// Variants chosen by name.
    pub kernels: Selection,
    /// Device bytes that weights and one generation may take together; a plan above it is refused.
    pub memory_budget_bytes: Option<u64>,
    /// Load the LM head, which text needs ([`Session::complete`]) and pictures do not: another 1.56 GB of the 14B model
    /// in bf16, unless it shares the embedding table. Without it text is refused.
    pub text: bool,
    /// Fill buffers with NaN when their planned life ends: for tests of the memory plan.
    pub poison_dead_buffers: bool,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            dtype: DType::Bf16,
            mmap: true,
            load_threads: None,
            vae: None,
            kernels: Selection::default(),
            memory_budget_bytes: None,
            text: false,
            poison_dead_buffers: false,
        }
    }
}

impl EngineOptions {
    /// Refuses what does not fit the memory budget beside the weights.
    fn check_budget(&self, weight_bytes: u64, request_bytes: u64) -> Result<()> {
        let Some(budget) = self.memory_budget_bytes else { return Ok(()) };
        let out_of_memory = |what: String, requested_bytes, free_bytes| {
            Err(Error::OutOfMemory { what, requested_bytes, free_bytes })
        };
        match budget.checked_sub(weight_bytes) {
            None => out_of_memory("the weights within the memory budget".into(), weight_bytes, budget),
            Some(left) if request_bytes > left => {
                let what = format!(
                    "the request, beside {weight_bytes} bytes of weights within a memory budget of {budget}"
                );
                out_of_memory(what, request_bytes, left)
            }
            Some(_) => Ok(()),
        }
    }
}

/// What a request will take, computed without touching the device.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Plan {
    /// Weights, which all sessions share: on the device once the engine is loaded.
    pub weight_bytes: u64,
    /// Key/value cache of this request.
    pub cache_bytes: u64,
    /// Activations, tables and pictures of this request.
    pub activation_bytes: u64,
    /// Images in the batch.
    pub images: usize,
    /// Guidance branches per image.
    pub branches: usize,
    /// Prompt tokens of each branch.
    pub prompt_tokens: Vec<usize>,
    /// Image tokens per image.
    pub image_tokens: usize,
    /// Network evaluations per image token.
    pub evaluations: usize,
}

impl Plan {
    /// Device bytes that the request allocates on top of the weights.
    pub fn request_bytes(&self) -> u64 {
        self.cache_bytes.saturating_add(self.activation_bytes)
    }
}

/// A model on a device. Shared freely between threads; each [`Session`] is used by one thread at a time.
pub struct Engine {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) model: Arc<NextStep>,
    pub(crate) options: EngineOptions,
    pub(crate) tokenizer: Tokenizer,
    name: String,
    defaults: Defaults,
    loading: Loading,
}

/// What loading an engine took.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Loading {
    /// Bytes of the checkpoint's tensors that were read, in the element types of its files.
    pub read_bytes: u64,
    /// Bytes of weights that were written to the device, in the element type that it keeps.
    pub weight_bytes: u64,
    /// Threads that converted and packed them.
    pub threads: usize,
    /// Milliseconds to open and check configs, tokenizer and the headers of weight files, before any weight is read.
    pub open_ms: f64,
    /// Milliseconds from there until the device held all weights.
    pub weights_ms: f64,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({}, {})", self.name, self.options.dtype.name())
    }
}

/// Most positions of a row. The models themselves have no limit (rotary embedding); this bounds the cache that one
/// request can ask for.
pub const MAX_POSITIONS: usize = 32_768;

/// The ids in `config.json` that the tokenizer must agree with.
pub(crate) fn token_ids(config: &ModelConfig) -> ModelTokenIds {
    ModelTokenIds {
        vocab_size: config.vocab_size,
        boi: config.boi,
        eoi: config.eoi,
        image_placeholder_id: config.image_placeholder_id,
    }
}

/// A model's and a VAE's config, each with its opened weight files.
pub(crate) type Opened = ((ModelConfig, Checkpoint), (VaeConfig, Checkpoint));

/// Opens the files of a model's folder; the tensors in them are not read.
pub(crate) fn open_files(dir: &Path, options: &EngineOptions) -> Result<Opened> {
    let config = ModelConfig::load(dir)?;
    let vae_dir = resolve_vae_dir(dir, &config, options.vae.as_deref())?;
    let vae_config = VaeConfig::load(&vae_dir)?;
    let open = OpenOptions { mmap: options.mmap };
    let checkpoint = Checkpoint::open(dir, open)?;
    Ok(((config, checkpoint), (vae_config, Checkpoint::open(&vae_dir, open)?)))
}

/// A caller's function that is told how far loading has come.
type OnProgress<'a> = dyn FnMut(&LoadProgress<'_>) -> Control + 'a;

/// A call that loads.
pub(crate) struct Load<'a> {
    device: Arc<dyn Device>,
    options: EngineOptions,
    progress: &'a mut OnProgress<'a>,
    start: Instant,
}

/// Brings a model to `device`, and says how far it is of so many bytes, if anybody wants to know.
fn upload(
    device: &Arc<dyn Device>,
    options: &EngineOptions,
    (model, vae): ((&ModelConfig, &ModelWeights), (&VaeConfig, &VaeWeights)),
    progress: Option<(u64, &mut OnProgress<'_>)>,
) -> Result<NextStep> {
    let mut up = Uploader::new(device.clone(), options.dtype, &options.kernels)?;
    if let (Some((of_bytes, callback)), true) = (progress, device.holds_data()) {
        up = up.with_threads(options.load_threads)?.with_progress(of_bytes, callback);
    }
    NextStep::load(up, model, vae, options.text)
}

/// A request with all host arithmetic done.
pub(crate) struct Prepared {
    pub(crate) spec: RunSpec,
    pub(crate) plan: Plan,
}

impl Engine {
    /// Reads the checkpoint, checks it against its config and uploads the weights: by several threads
    /// ([`EngineOptions::load_threads`]), each converting f32, f16 or bf16 to the element type of the device on the way,
    /// with at most 256 MiB of memory beside the mapped files.
    pub fn load(source: &ModelSource, device: Arc<dyn Device>, options: EngineOptions) -> Result<Engine> {
        Engine::load_with(source, device, options, &mut |_| Control::Continue)
    }

    /// The same with a callback on this thread, which is told how far loading has come and may stop it: then the device
    /// is as it was before, and [`Error::LoadCancelled`] says how much had been loaded. If the callback panics, the load
    /// ends with [`Error::CallbackPanicked`].
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
    /// use warpstep::engine::{Engine, EngineOptions, ModelSource};
    /// use warpstep::event::Control;
    /// # fn main() -> warpstep::Result<()> {
    /// # let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default())?);
    /// let (source, options) = (ModelSource::Demo, EngineOptions::default());
    /// let mut percent = 0;
    /// let engine = Engine::load_with(&source, device, options, &mut |progress| {
    ///     percent = progress.done_bytes * 100 / progress.of_bytes.max(1);
    ///     Control::Continue
    /// })?;
    /// assert_eq!(percent, 100);
    /// # Ok(())
    /// # }
    /// ```
    pub fn load_with(
        source: &ModelSource,
        device: Arc<dyn Device>,
        options: EngineOptions,
        progress: &mut dyn FnMut(&LoadProgress<'_>) -> Control,
    ) -> Result<Engine> {
        let load = Load { device, options, progress, start: Instant::now() };
        match source {
            ModelSource::Dir(dir) => Engine::load_dir(dir, load),
            ModelSource::Demo => crate::demo::load(load),
        }
    }

    /// Opens and checks a model exactly as [`load`](Self::load) does, but reads no weights and takes no device: in a
    /// moment and with little memory the engine answers [`plan`](Self::plan), [`limits`](Self::limits),
    /// [`defaults`](Self::defaults) and [`request`](Self::request) as the loaded one would on a GPU of `sm_count` SMs
    /// ([`HOPPER_SMS`](crate::device::planning::HOPPER_SMS) for an H100 or H200). Generating with it is an error.
    ///
    /// For a server that decides where a model goes, and which requests to take, before it loads anything.
    pub fn for_planning(source: &ModelSource, sm_count: u32, options: EngineOptions) -> Result<Engine> {
        Engine::load(source, Arc::new(PlanningDevice::new(sm_count)), options)
    }

    fn load_dir(dir: &Path, load: Load<'_>) -> Result<Engine> {
        let ((config, checkpoint), vae) = open_files(dir, &load.options)?;
        let tokenizer = Tokenizer::from_dir(dir, token_ids(&config))?;
        let name =
            dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
        Engine::assemble(name, (config, checkpoint), vae, tokenizer, load)
    }

    /// Builds an engine from opened parts.
    pub(crate) fn assemble(
        name: String,
        (config, checkpoint): (ModelConfig, Checkpoint),
        (vae_config, vae_checkpoint): (VaeConfig, Checkpoint),
        tokenizer: Tokenizer,
        load: Load<'_>,
    ) -> Result<Engine> {
        check_vae_match(&config, &vae_config)?;
        let weights = ModelWeights::new(checkpoint, &config)?;
        let vae_weights = VaeWeights::new(vae_checkpoint, &vae_config)?;
        let Load { device, options, progress, start } = load;
        let weights = ((&config, &weights), (&vae_config, &vae_weights));
        let opened = Instant::now();
        let of_bytes = match device.holds_data() {
            true => {
                // Laid out on paper first, which takes a few milliseconds.
                let planning: Arc<dyn Device> = Arc::new(PlanningDevice::new(device.info().sm_count));
                upload(&planning, &options, weights, None)?.weight_bytes()
            }
            false => 0,
        };
        // No request would have room: said before minutes of reading. On the planning device requests' plans say it.
        options.check_budget(of_bytes, 0)?;
        let model = upload(&device, &options, weights, Some((of_bytes, progress)))?;
        let loading = Loading {
            read_bytes: model.read_bytes(),
            weight_bytes: model.weight_bytes(),
            threads: model.load_threads(),
            open_ms: milliseconds(opened - start),
            weights_ms: milliseconds(opened.elapsed()),
        };
        let defaults = Defaults::for_checkpoint(&name, config.hidden_size);
        Ok(Engine { device, model: Arc::new(model), options, tokenizer, name, defaults, loading })
    }

    /// What loading took.
    pub fn loading(&self) -> Loading {
        self.loading
    }

    /// The model on the device, for measuring it.
    pub fn model(&self) -> Arc<NextStep> {
        self.model.clone()
    }

    /// The model's name, as stored with pictures.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device.
    pub fn device_info(&self) -> DeviceInfo {
        self.device.info()
    }

    /// The committed defaults of this model.
    pub fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    /// What requests to this model are checked against.
    pub fn limits(&self) -> Limits {
        Limits::new(
            self.model.down_factor() as u32,
            match self.model.config.use_gen_pos_embed {
                true => Some(self.model.backbone.pos_rows()),
                false => None,
            },
        )
    }

    /// What this model's image tokens are.
    pub fn token_layout(&self) -> TokenLayout {
        let (config, vae) = (&self.model.config, &self.model.vae_config);
        TokenLayout {
            channels: config.latent_channels,
            patch: config.latent_patch_size,
            scale: vae.scaling_factor,
            shift: vae.shift_factor,
        }
    }

    /// Bytes, tokens and branches of a request; no device work.
    pub fn plan(&self, request: &GenerateRequest) -> Result<Plan> {
        Ok(self.prepare(request)?.plan)
    }

    /// A request with this model's defaults and a random seed.
    pub fn request(&self, prompt: &str) -> Result<GenerateRequest> {
        let fields = RequestFields { prompt: Some(prompt.into()), ..RequestFields::default() };
        fields.resolve(&self.defaults)
    }

    /// A new session.
    pub fn session(self: &Arc<Engine>) -> Session {
        Session::new(self.clone())
    }

    /// Refuses pictures that this model's VAE cannot encode.
    pub(crate) fn check_pictures(&self, pictures: &[RgbImage]) -> Result<()> {
        if pictures.is_empty() {
            return Ok(());
        }
        let Some(encoder) = &self.model.encoder else {
            return Err(Error::request("images", "this model's VAE has no encoder, so it reads none"));
        };
        // A patch of the norm and a token's patch need not divide one another.
        for unit in [self.model.down_factor() as u32, encoder.size_unit() as u32] {
            let fits = |p: &RgbImage| p.width().is_multiple_of(unit) && p.height().is_multiple_of(unit);
            if let Some(picture) = pictures.iter().find(|p| !fits(p)) {
                let (width, height) = (picture.width(), picture.height());
                let reason = format!(
                    "one is {width}x{height} pixels; both sides must divide by {unit}: choose a resize mode"
                );
                return Err(Error::request("images", reason));
            }
        }
        Ok(())
    }

    /// The draws of all places, in the VAE's element type; none where it takes the posterior's mean.
    pub(crate) fn vae_draws(&self, draws: &CudaRandn, values: usize) -> Vec<f32> {
        if !self.model.encoder.as_ref().is_some_and(VaeEncoder::draws) {
            return Vec::new();
        }
        let mut out = vec![0.0; values];
        draws.fill(0, &mut out);
        ops::harness::encode(self.options.dtype, out).1
    }

    /// Validates a request and does its host arithmetic.
    pub(crate) fn prepare(&self, request: &GenerateRequest) -> Result<Prepared> {
        let limits = self.limits();
        request.validate(&limits)?;
        let config = &self.model.config;
        let sampler = &request.sampler;
        let branches = sampler.branches()?;
        let target = request.grid(&limits)?;
        let grid = (target.height as usize, target.width as usize);
        let source_grids = request.source_grids(&limits)?;
        self.check_pictures(&request.images)?;
        let caption = with_marks(&request.prompt, source_grids.len());
        let prompt = Prompt {
            caption: &caption,
            positive_prompt: request.positive_prompt.as_deref(),
            negative_prompt: request.negative_prompt.as_deref(),
            images: &source_grids,
            target,
            branches,
        };
        let generation = sampler.sampler.generation();
        let rows = build_rows(&self.tokenizer, generation, &prompt, MAX_POSITIONS)?;
        let images = request.n as usize;
        let solver = sampler.solver()?;
        let times = match self.options.dtype {
            DType::F32 => solver.times.clone(),
            DType::Bf16 => solver.times_bf16(),
        };
        let shown: Vec<Vec<usize>> = rows.iter().map(|row| row.images.clone()).collect();
        // As in an official run for one image, so that no picture depends on how many are made beside it.
        let values: usize =
            shown.iter().flatten().map(|&i| source_grids[i].tokens() * config.token_dim()).sum();
        let posterior =
            (values > 0).then_some(PosteriorDraw { numel: values as u64, max_threads: H100_MAX_THREADS });
        let draws = DrawPlan::new(
            sampler.sampler,
            sampler.steps,
            request.seed,
            (request.first_image, request.n),
            config.token_dim() as u32,
            self.options.dtype == DType::Bf16,
            posterior,
        )?;
        let tokens = grid.0 * grid.1;
        let prompts: Vec<Vec<u32>> =
            rows.iter().flat_map(|row| std::iter::repeat_n(row.ids.clone(), images)).collect();
        let posterior = self.vae_draws(&draws.posterior(), values);
        let pictures = request.images.clone();
        let sources = Sources::new(&self.model, pictures, &shown, &prompts, images, &posterior)?;
        let spec = RunSpec {
            rope_offset: vec![0; prompts.len()],
            sources,
            prompts,
            images,
            branches: branches.count(),
            grid,
            steps: solver.steps.iter().map(Into::into).collect(),
            sinusoid: sinusoids(&times),
            guidance: sampler.guidance(tokens),
            draws_per_token: draws.draws_per_token as usize,
            draws: Draws::Philox(DrawSource {
                seed: draws.seed,
                base_offset: draws.base_offset,
                first_image: draws.first_image,
                round_bf16: draws.round_bf16,
            }),
            use_norm: sampler.use_norm,
            rescale: sampler.rescale,
            frequencies: rope_frequencies(config.rope_theta, config.head_dim),
            pos_embed: config.use_gen_pos_embed,
            preview_every_rows: request.preview_every_rows,
            taps: false,
            poison: self.options.poison_dead_buffers,
        };
        let bytes = plan::plan(&self.model, &self.device.info(), &spec)?;
        let plan = Plan {
            weight_bytes: self.model.weight_bytes(),
            cache_bytes: bytes.cache,
            activation_bytes: bytes.activations,
            images,
            branches: branches.count(),
            prompt_tokens: rows.iter().map(|row| row.ids.len()).collect(),
            image_tokens: tokens,
            evaluations: spec.steps.len(),
        };
        self.check_budget(plan.request_bytes())?;
        Ok(Prepared { spec, plan })
    }

    /// Refuses a request whose bytes do not fit the memory budget beside the weights.
    pub(crate) fn check_budget(&self, request_bytes: u64) -> Result<()> {
        self.options.check_budget(self.model.weight_bytes(), request_bytes)
    }
}
