//! Text from the LM head: a prompt, with pictures in it if wanted, is continued token by token.
//!
//! The paper's self-CoT works with it: the model continues a caption from `<|begin_of_thinking|>` (or
//! `<|begin_of_prompt_refinement|>`) and then draws what it wrote; see [`Opening`]. The latency of text is not what
//! this engine is made for: logits come to the host for every token, which chooses there.

mod pieces;
mod sampling;

pub use sampling::{RandomSampling, TextSampling, argmax, choose};

use crate::engine::{Engine, MAX_POSITIONS};
use crate::error::{Error, Result};
use crate::event::{CancelToken, Control, Event, Timings, milliseconds};
use crate::image::RgbImage;
use crate::model::arena::Stage;
use crate::model::backbone::rope_frequencies;
use crate::model::sources::Sources;
use crate::model::text::{self, TextRun, TextSpec};
use crate::prompt::{text_row, with_marks};
use crate::request::{Limits, source_grids};
use crate::rng::{CudaRandn, H100_MAX_THREADS, random_seed};
use crate::session::{Listener, Session};
use crate::tokenizer::{BEGIN_OF_REFINEMENT, BEGIN_OF_THINKING, END_OF_REFINEMENT, END_OF_THINKING};
use pieces::Pieces;
use serde::Serialize;
use std::time::Instant;

/// What the model is made to write before it draws. The text ends at the mark's own end, and at any other special
/// token: it is to become (part of) a caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Opening {
    /// `<|begin_of_thinking|>` to `<|end_of_thinking|>`.
    Thinking,
    /// `<|begin_of_prompt_refinement|>` to `<|end_of_prompt_refinement|>`.
    Refinement,
}

impl Opening {
    /// The special tokens around the text.
    pub fn marks(self) -> [&'static str; 2] {
        match self {
            Opening::Thinking => [BEGIN_OF_THINKING, END_OF_THINKING],
            Opening::Refinement => [BEGIN_OF_REFINEMENT, END_OF_REFINEMENT],
        }
    }
}

/// A text to be continued.
#[derive(Clone, Debug, PartialEq)]
pub struct TextRequest {
    /// What is continued. May hold the four tokens of [`Opening`], no other special ones.
    pub prompt: String,
    /// Pictures, in the order of their `<image>` marks in the prompt; where it has none they stand in front of it.
    pub images: Vec<RgbImage>,
    /// Most tokens that are written.
    pub max_tokens: u32,
    /// How each is chosen.
    pub sampling: TextSampling,
    /// Of the draws, and of the noise of a VAE that samples its posterior; greedy text without pictures has neither.
    pub seed: u64,
    /// Put after the prompt, where the text begins.
    pub opening: Option<Opening>,
}

impl TextRequest {
    /// At most 256 tokens, greedy, with a random seed.
    pub fn new(prompt: impl Into<String>) -> TextRequest {
        TextRequest {
            prompt: prompt.into(),
            images: Vec::new(),
            max_tokens: 256,
            sampling: TextSampling::Greedy,
            seed: random_seed(),
            opening: None,
        }
    }

    /// Checks everything that needs no tokenizer.
    pub fn validate(&self, limits: &Limits) -> Result<()> {
        if self.prompt.len() > limits.max_prompt_bytes {
            let (bytes, most) = (self.prompt.len(), limits.max_prompt_bytes);
            return Err(Error::request("prompt", format!("has {bytes} bytes, at most {most} are taken")));
        }
        if let Some(position) = self.prompt.find('\0') {
            return Err(Error::request("prompt", format!("has a NUL character at byte {position}")));
        }
        if self.max_tokens == 0 || self.max_tokens as usize >= MAX_POSITIONS {
            let reason = format!("is {}; allowed are 1 to {}", self.max_tokens, MAX_POSITIONS - 1);
            return Err(Error::request("max_tokens", reason));
        }
        if let TextSampling::Random(random) = &self.sampling {
            random.validate()?;
        }
        source_grids(&self.images, limits).map(drop)
    }
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TextEnd {
    /// The model wrote this special token, which is no part of the text.
    Token(String),
    /// `max_tokens` were written.
    MaxTokens,
}

/// What a text request will take, computed without touching the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TextPlan {
    /// Weights, already on the device.
    pub weight_bytes: u64,
    /// Key/value cache of this request.
    pub cache_bytes: u64,
    /// Activations, tables and logits of this request.
    pub activation_bytes: u64,
    /// Tokens of the prompt, those of pictures included.
    pub prompt_tokens: usize,
    /// Most tokens that are written.
    pub max_tokens: usize,
}

impl TextPlan {
    /// Device bytes that the request allocates on top of the weights.
    pub fn request_bytes(&self) -> u64 {
        self.cache_bytes.saturating_add(self.activation_bytes)
    }
}

/// A text that was written.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The continuation, without the prompt.
    pub text: String,
    /// Its token ids.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub end: TextEnd,
    /// What was planned.
    pub plan: TextPlan,
    /// Where the time went.
    pub timings: Timings,
}

/// A request with all host arithmetic done.
struct Prepared {
    spec: TextSpec,
    plan: TextPlan,
}

impl Engine {
    /// Bytes and tokens of a text request; no device work.
    pub fn plan_text(&self, request: &TextRequest) -> Result<TextPlan> {
        Ok(self.prepare_text(request)?.plan)
    }

    fn prepare_text(&self, request: &TextRequest) -> Result<Prepared> {
        let limits = self.limits();
        request.validate(&limits)?;
        if self.model.text.is_none() {
            let reason = "the LM head is not loaded: text needs an engine with EngineOptions::text";
            return Err(Error::request("text", reason));
        }
        self.check_pictures(&request.images)?;
        let grids = source_grids(&request.images, &limits)?;
        let prompt = with_marks(&request.prompt, grids.len());
        let opening = request.opening.map(|opening| opening.marks()[0]);
        let max_tokens = request.max_tokens as usize;
        let ids = text_row(&self.tokenizer, &prompt, &grids, opening, MAX_POSITIONS - max_tokens)?;
        let config = &self.model.config;
        let values: usize = grids.iter().map(|grid| grid.tokens() * config.token_dim()).sum();
        let draw = CudaRandn::new(request.seed, 0, values as u64, H100_MAX_THREADS);
        let prompts = vec![ids];
        let shown = [(0..grids.len()).collect()];
        let draws = self.vae_draws(&draw, values);
        let sources = Sources::new(&self.model, request.images.clone(), &shown, &prompts, 1, &draws)?;
        let spec = TextSpec {
            rope_offset: vec![0],
            prompts,
            sources,
            max_tokens,
            frequencies: rope_frequencies(config.rope_theta, config.head_dim),
            taps: false,
            poison: self.options.poison_dead_buffers,
        };
        let bytes = text::plan(&self.model, &self.device.info(), &spec)?;
        let plan = TextPlan {
            weight_bytes: self.model.weight_bytes(),
            cache_bytes: bytes.cache,
            activation_bytes: bytes.activations,
            prompt_tokens: spec.prompts[0].len(),
            max_tokens,
        };
        self.check_budget(plan.request_bytes())?;
        Ok(Prepared { spec, plan })
    }

    /// The text of the special token that `id` is, if a text of this kind ends at it: EOS, the tokens of pictures
    /// (which the LM head cannot draw), and within an opening every special token.
    fn text_end(&self, id: u32, opening: Option<Opening>) -> Option<String> {
        let tokenizer = &self.tokenizer;
        let config = &self.model.config;
        let eos = config.eos_token_ids.contains(&id) || tokenizer.eos().is_some_and(|token| token.id == id);
        let special = tokenizer.special(id);
        match (eos || tokenizer.is_of_picture(id), special) {
            (true, special) => Some(special.map_or_else(|| format!("token {id}"), str::to_owned)),
            (false, Some(special)) if opening.is_some() => Some(special.to_owned()),
            (false, _) => None,
        }
    }
}

impl Session {
    /// Continues a text. Every piece of it is sent as [`Event::Text`] when its characters are complete. `callback` is
    /// called on this thread; `cancel` may be set from any.
    pub fn complete(
        &mut self,
        request: &TextRequest,
        cancel: &CancelToken,
        callback: &mut dyn FnMut(&Event) -> Control,
    ) -> Result<Completion> {
        let start = Instant::now();
        let mut timings = Timings::default();
        let mut listener = Listener { callback, cancel, tokens_done: 0 };
        listener.check()?;
        let engine = self.shared_engine();
        let Prepared { spec, plan } = engine.prepare_text(request)?;
        timings.tokenize_ms = milliseconds(start.elapsed());

        let mark = Instant::now();
        let (model, kernels) = (&engine.model, &engine.options.kernels);
        let mut run = self.beside_kept(plan.request_bytes(), || {
            TextRun::new(model.clone(), &engine.device, kernels.clone(), spec.clone())
        })?;
        let (prefill, token) = (run.record_prefill()?, run.record_token()?);
        let (prefill, token) = (run.instantiate(prefill)?, run.instantiate(token)?);
        timings.setup_ms = milliseconds(mark.elapsed());
        listener.send(&Event::Started { prompt_tokens: plan.prompt_tokens, image_tokens: 0, images: 0 })?;

        let mark = Instant::now();
        run.encode_sources(&mut || listener.check())?;
        timings.vae_encode_ms = milliseconds(mark.elapsed());

        let mark = Instant::now();
        listener.check()?;
        run.stream().replay(prefill.as_ref())?;
        run.stream().synchronize()?;
        run.end_stage(Stage::Prefill)?;
        timings.prefill_ms = milliseconds(mark.elapsed());

        let mark = Instant::now();
        let (mut ids, mut text) = (Vec::new(), String::new());
        let mut pieces = Pieces::default();
        let end = loop {
            listener.check()?;
            let position = ids.len();
            let id = choose(&run.logits()?, &request.sampling, request.seed, position as u64)
                .ok_or(Error::NonFinite { stage: "LM head", token: position })?;
            if let Some(special) = engine.text_end(id, request.opening) {
                break TextEnd::Token(special);
            }
            ids.push(id);
            listener.tokens_done = ids.len();
            let piece = pieces.push(&engine.tokenizer, id)?;
            text += &piece;
            listener.send(&Event::Text { piece, tokens: ids.len() })?;
            if ids.len() == plan.max_tokens {
                break TextEnd::MaxTokens;
            }
            run.set_next(&[id])?;
            run.stream().replay(token.as_ref())?;
        };
        let rest = pieces.finish(&engine.tokenizer)?;
        if !rest.is_empty() {
            text += &rest;
            listener.send(&Event::Text { piece: rest, tokens: ids.len() })?;
        }
        timings.decode_ms = milliseconds(mark.elapsed());
        timings.total_ms = milliseconds(start.elapsed());
        listener.send(&Event::Finished { timings })?;
        Ok(Completion { text, ids, end, plan, timings })
    }
}
