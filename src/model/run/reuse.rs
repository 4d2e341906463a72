//! A run from one generation to the next: the same memory and lists for another spec, what is wiped in between, and the
//! prompts whose keys and values are still in the cache.
//!
//! A prompt is kept by its ids alone, which with the weights decide its keys and values to the last bit: kernels of a
//! stage sum in the same order whatever else is in the batch. Where they do not, nothing is kept. Prompts that show
//! pictures are not kept either. What a sequence repeats of another one is kept where that one's is.

use super::{Run, own, stage_selection};
use crate::device::{Copies, Span};
use crate::error::Result;
use crate::model::arena::Stage;
use crate::model::plan::{RunSpec, plan_memory};

/// What memory is overwritten with: NaN in every element type, so that whatever is read before it is written shows.
const WIPED: u8 = 0xff;

/// What a prefill list depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillShape {
    fresh: Vec<usize>,
    rows: usize,
    /// Which sequences these are is in a table.
    repeats: bool,
}

/// Prompt tokens over all sequences, by what prefill does with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// They go through the transformer.
    pub prefilled: usize,
    /// Their keys and values are copied from another sequence, which has the same prompt.
    pub repeated: usize,
    /// Nothing: the cache holds their keys and values from the last generation.
    pub kept: usize,
}

impl Run {
    /// Whether [`rebind`](Self::rebind) takes `spec`: it has the same memory plan, and records the same lists of
    /// tokens, pictures and images but for the node of [`record_draws`](Self::record_draws).
    pub fn fits(&self, spec: &RunSpec) -> Result<bool> {
        let planned = plan_memory(&self.model, &self.info, spec)?;
        Ok(planned.layout == *self.arena.layout()
            && planned.capacity == self.cache.capacity
            && planned.splits == self.splits
            && planned.cache_bytes == self.cache.keys.bytes
            && spec.records_like(&self.spec))
    }

    /// Begins another generation, after [`wipe`](Self::wipe), with a spec that [`fits`](Self::fits). Prompts that the
    /// cache still holds are not prefilled again.
    pub fn rebind(&mut self, spec: RunSpec) -> Result<()> {
        let first = spec.origins();
        let kept = |sequence: usize| self.cached[sequence].as_ref() == Some(&spec.prompts[sequence]);
        // What is in the cache stays where it is, and the first of it serves the sequences that lack it.
        let mut holder = first.clone();
        for sequence in (0..first.len()).rev().filter(|&sequence| kept(sequence)) {
            holder[first[sequence]] = sequence;
        }
        let origin: Vec<usize> =
            (0..first.len()).map(|s| if kept(s) { s } else { holder[first[s]] }).collect();
        let all = own(&first);
        let fresh: Vec<usize> = own(&origin).into_iter().filter(|&sequence| !kept(sequence)).collect();
        let rows = |sequences: &[usize]| sequences.iter().map(|&s| spec.prompts[s].len()).sum();
        // The same bits as a session would give that had none of them.
        let alike = self.rows_alike(rows(&fresh))? && self.rows_alike(rows(&all))?;
        (self.fresh, self.origin) = if alike { (fresh, origin) } else { (all, first) };
        self.spec = spec;
        self.upload_tables()
    }

    /// Whether a sequence takes the prompt of another one.
    pub(super) fn repeats(&self) -> bool {
        self.origin.iter().enumerate().any(|(sequence, &origin)| origin != sequence)
    }

    /// Whether the bits of each of `rows` prompt rows are what they are in any other number of rows.
    fn rows_alike(&self, rows: usize) -> Result<bool> {
        let selection = stage_selection(&self.model, &self.selection, Stage::Prefill)?;
        self.model.backbone.rows_alike(&self.launch(&selection), rows)
    }

    /// What the list of [`record_prefill`](Self::record_prefill) depends on beside the memory plan.
    pub fn prefill_shape(&self) -> PrefillShape {
        PrefillShape { fresh: self.fresh.clone(), rows: self.prefill_rows().rows, repeats: self.repeats() }
    }

    /// What prefill does with the prompt tokens of all sequences.
    pub fn prompt_tokens(&self) -> PromptTokens {
        let mut tokens = PromptTokens { prefilled: self.prefill_rows().rows, repeated: 0, kept: 0 };
        for (sequence, prompt) in self.spec.prompts.iter().enumerate() {
            if self.origin[sequence] != sequence {
                tokens.repeated += prompt.len();
            } else if !self.fresh.contains(&sequence) {
                tokens.kept += prompt.len();
            }
        }
        tokens
    }

    /// Device bytes of this run.
    pub fn bytes(&self) -> u64 {
        let cache: usize = self.cache_buffers.iter().map(|buffer| buffer.bytes()).sum();
        (cache + self.arena.whole().bytes) as u64
    }

    /// Ends a generation that went well: overwrites all that it left behind, but for the keys, values and last rows of
    /// its prompts, which the next may use. Every other run is to be dropped.
    pub fn wipe(&mut self) -> Result<()> {
        let keeps = self.rows_alike(self.prefill_rows().rows)?;
        let placeholder = self.model.config.image_placeholder_id;
        for (sequence, prompt) in self.spec.prompts.iter().enumerate() {
            let kept = match self.fresh.contains(&self.origin[sequence]) {
                true => keeps && !prompt.contains(&placeholder),
                false => true,
            };
            self.cached[sequence] = kept.then(|| prompt.clone());
        }
        let config = &self.model.config;
        let prompt_x = self.arena.span(self.slots.prompt_x);
        let row_bytes = prompt_x.bytes / self.cached.len();
        let mut spans = self.arena.left_behind();
        let forgotten = (0..self.cached.len()).filter(|&sequence| self.cached[sequence].is_none());
        spans.extend(forgotten.map(|sequence| prompt_x.slice(sequence * row_bytes, row_bytes)));
        for span in spans {
            self.stream.set(span, WIPED)?;
        }
        // Keys and values lie as [layers, sequences, heads, slots]; those of neighbours with prompts of one length,
        // such as the images of a batch, are a grid of rows.
        let (heads, capacity) = (config.num_key_value_heads, self.cache.capacity);
        let slot_bytes = config.head_dim * self.model.dtype.bytes();
        let lengths: Vec<usize> =
            self.cached.iter().map(|prompt| prompt.as_ref().map_or(0, Vec::len)).collect();
        for buffer in [self.cache.keys, self.cache.values] {
            for layer in 0..config.num_hidden_layers {
                let mut row = layer * lengths.len() * heads;
                for equal in lengths.chunk_by(|a, b| a == b) {
                    let (length, rows) = (equal[0], equal.len() * heads);
                    let first: Span = buffer
                        .slice((row * capacity + length) * slot_bytes, (capacity - length) * slot_bytes);
                    self.stream.set_rows(first, capacity * slot_bytes, rows, WIPED)?;
                    row += rows;
                }
            }
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "demo-model"))]
mod tests {
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};
    use crate::device::{Device, NodeList};
    use crate::engine::{Engine, EngineOptions, ModelSource};
    use crate::image::RgbImage;
    use crate::ops::Selection;
    use crate::request::GenerateRequest;
    use std::sync::Arc;

    fn engine() -> (Arc<dyn Device>, Engine) {
        let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
        let engine = Engine::load(&ModelSource::Demo, device.clone(), EngineOptions::default()).unwrap();
        (device, engine)
    }

    /// Two images of two tokens.
    fn request(engine: &Engine) -> GenerateRequest {
        let mut request = engine.request("a red circle on a blue background").unwrap();
        (request.width, request.height, request.seed, request.n) = (32, 16, 3, 2);
        request.sampler.steps = 2;
        request.negative_prompt = Some("blurry, low quality".into());
        request
    }

    fn run(device: &Arc<dyn Device>, engine: &Engine, request: &GenerateRequest) -> Run {
        let spec = engine.prepare(request).unwrap().spec;
        Run::new(engine.model.clone(), device, Selection::default(), spec).unwrap()
    }

    fn generate(run: &mut Run) {
        run.encode_sources().unwrap();
        let lists = [
            run.record_prefill(true).unwrap(),
            run.record_token(false).unwrap(),
            run.record_token(true).unwrap(),
            run.record_image().unwrap().0,
        ];
        for list in lists {
            let executable = run.instantiate(list).unwrap();
            run.stream().replay(executable.as_ref()).unwrap();
        }
    }

    fn wiped(run: &mut Run, span: Span) -> bool {
        let mut bytes = vec![0; span.bytes];
        run.stream().get(span, &mut bytes).unwrap();
        bytes.iter().all(|&byte| byte == WIPED)
    }

    /// Looks at every slot of the cache and at every piece of the arena.
    fn check_memory(run: &mut Run) {
        for span in run.arena.left_behind() {
            assert!(wiped(run, span), "{span:?} of the arena");
        }
        assert!(!wiped(run, run.arena.span(run.slots.rope)));
        let config = run.model.config.clone();
        let lengths: Vec<usize> = run.cached.iter().map(|ids| ids.as_ref().map_or(0, Vec::len)).collect();
        let prompt_x = run.arena.span(run.slots.prompt_x);
        let row_bytes = prompt_x.bytes / lengths.len();
        let slot_bytes = config.head_dim * run.model.dtype.bytes();
        let (heads, capacity) = (config.num_key_value_heads, run.cache.capacity);
        assert!(lengths.iter().all(|&length| length < capacity));
        for (sequence, &length) in lengths.iter().enumerate() {
            assert_eq!(wiped(run, prompt_x.slice(sequence * row_bytes, row_bytes)), length == 0);
            for buffer in [run.cache.keys, run.cache.values] {
                for layer in 0..config.num_hidden_layers {
                    for head in 0..heads {
                        let row = (layer * lengths.len() + sequence) * heads + head;
                        for slot in 0..capacity {
                            let span = buffer.slice((row * capacity + slot) * slot_bytes, slot_bytes);
                            assert_eq!(wiped(run, span), slot >= length, "layer {layer}, {sequence}, {slot}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn only_prompts_outlive_a_generation() {
        let (device, engine) = engine();
        let mut first = run(&device, &engine, &request(&engine));
        generate(&mut first);
        first.wipe().unwrap();
        let prompts = first.spec.prompts.clone();
        assert!(prompts[0] == prompts[1] && prompts[0].len() != prompts[2].len());
        assert!(first.cached.iter().zip(&prompts).all(|(kept, ids)| kept.as_ref() == Some(ids)));
        check_memory(&mut first);
        // A longer caption over the shorter one, and the other way round.
        for prompt in ["two small white squares on a large black background", "a circle"] {
            let other = GenerateRequest { prompt: prompt.into(), ..request(&engine) };
            let spec = engine.prepare(&other).unwrap().spec;
            assert!(first.fits(&spec).unwrap());
            first.rebind(spec).unwrap();
            assert_eq!((&first.fresh[..], &first.origin[..]), (&[0][..], &[0, 0, 2, 3][..]));
            generate(&mut first);
            first.wipe().unwrap();
            check_memory(&mut first);
        }
        // Rows that show pictures are not kept.
        let mut edit = request(&engine);
        edit.images = vec![RgbImage::new(32, 16, vec![99; 32 * 16 * 3]).unwrap()];
        edit.sampler.image_guidance_scale = 1.5;
        let mut edit = run(&device, &engine, &edit);
        generate(&mut edit);
        edit.wipe().unwrap();
        let kept: Vec<bool> = edit.cached.iter().map(Option::is_some).collect();
        assert_eq!(kept, [false, false, false, false, true, true]);
        check_memory(&mut edit);
    }

    fn downloaded(run: &mut Run, span: Span) -> Vec<u8> {
        let mut bytes = vec![0; span.bytes];
        run.stream().get(span, &mut bytes).unwrap();
        bytes
    }

    /// Keys, values and last rows of all prompts.
    fn prompts_of(run: &mut Run) -> Vec<u8> {
        let mut bytes = downloaded(run, run.arena.span(run.slots.prompt_x));
        let lengths: Vec<usize> = run.spec.prompts.iter().map(Vec::len).collect();
        let config = run.model.config.clone();
        let slot_bytes = config.head_dim * run.model.dtype.bytes();
        let (heads, capacity) = (config.num_key_value_heads, run.cache.capacity);
        for buffer in [run.cache.keys, run.cache.values] {
            for row in 0..config.num_hidden_layers * lengths.len() * heads {
                let length = lengths[row / heads % lengths.len()];
                bytes.extend(downloaded(run, buffer.slice(row * capacity * slot_bytes, length * slot_bytes)));
            }
        }
        bytes
    }

    /// More than requests ask for, whose images have one prompt: prompts of images alone, from the cache, and from
    /// sequences that come later.
    #[test]
    fn every_prompt_is_prefilled_once_and_the_first_that_is_there_serves_all() {
        let (device, engine) = engine();
        let three = GenerateRequest { n: 3, ..request(&engine) };
        let words = ["a circle", "a red square", "blurry", "two white stars on black", "a blue triangle"];
        let ids = words.map(|prompt| {
            let other = GenerateRequest { prompt: prompt.into(), ..three.clone() };
            engine.prepare(&other).unwrap().spec.prompts[0].clone()
        });
        let spec = |which: [usize; 6]| {
            let prompts = which.map(|index| ids[index].clone()).to_vec();
            RunSpec { prompts, ..engine.prepare(&three).unwrap().spec }
        };
        let new = |spec| Run::new(engine.model.clone(), &device, Selection::default(), spec).unwrap();
        let rounds = [
            ([0, 1, 0, 2, 2, 2], &[0, 1, 3][..], [0, 1, 0, 3, 3, 3]),
            ([0, 0, 3, 2, 2, 2], &[2], [0, 0, 2, 3, 4, 5]),
            ([4, 0, 4, 2, 2, 0], &[0], [0, 1, 0, 3, 4, 1]),
            ([0, 0, 4, 2, 0, 2], &[], [1, 1, 2, 3, 1, 3]),
        ];
        let mut kept = new(spec(rounds[0].0));
        for (round, (which, fresh, origin)) in rounds.into_iter().enumerate() {
            if round > 0 {
                assert!(kept.fits(&spec(which)).unwrap());
                kept.rebind(spec(which)).unwrap();
            }
            assert_eq!((&kept.fresh[..], &kept.origin[..]), (fresh, &origin[..]), "round {round}");
            let tokens = |of: &dyn Fn(usize) -> bool| -> usize {
                (0..6).filter(|&sequence| of(sequence)).map(|sequence| ids[which[sequence]].len()).sum()
            };
            let expected = PromptTokens {
                prefilled: tokens(&|sequence| fresh.contains(&sequence)),
                repeated: tokens(&|sequence| origin[sequence] != sequence),
                kept: tokens(&|sequence| origin[sequence] == sequence && !fresh.contains(&sequence)),
            };
            assert_eq!(kept.prompt_tokens(), expected);
            generate(&mut kept);
            // With the buffers that verification reads every sequence goes through the transformer.
            let mut all = new(RunSpec { taps: true, ..spec(which) });
            assert_eq!((all.fresh.len(), all.repeats()), (6, false));
            generate(&mut all);
            assert!(prompts_of(&mut kept) == prompts_of(&mut all), "round {round}");
            let mut other = new(spec(which));
            assert_eq!(other.fresh.len(), 3);
            generate(&mut other);
            let [mine, theirs] = [&mut kept, &mut other].map(|run| downloaded(run, run.buffers().tokens));
            assert!(mine == theirs, "round {round}");
            kept.wipe().unwrap();
            assert!(kept.cached.iter().all(Option::is_some));
            check_memory(&mut kept);
        }
        // Nothing was fresh and nothing is, but a list that copies is not one that does not.
        let copies = kept.prefill_shape();
        kept.rebind(spec(rounds[3].0)).unwrap();
        assert_eq!((kept.fresh.len(), kept.repeats()), (0, false));
        assert_ne!(kept.prefill_shape(), copies);
    }

    /// The same ids are not the same prompt where other image tokens stand behind them or angles differ.
    #[test]
    fn prompts_that_differ_in_what_they_show_or_where_are_not_shared() {
        let (_, engine) = engine();
        let mut edit = request(&engine);
        edit.images = vec![RgbImage::new(32, 16, vec![99; 32 * 16 * 3]).unwrap()];
        let spec = engine.prepare(&edit).unwrap().spec;
        assert_eq!(spec.origins(), [0, 0, 2, 2]);
        let length = spec.prompts[0].len();
        let shown = spec.sources.rows.iter().position(|&row| row != crate::ops::embed::TEXT).unwrap();
        let mut other = spec.clone();
        other.sources.rows[length + shown] += 1;
        assert_eq!(other.origins(), [0, 1, 2, 2]);
        let mut other = spec.clone();
        other.rope_offset[3] = 1;
        assert_eq!(other.origins(), [0, 0, 2, 3]);
        let mut other = spec.clone();
        other.prompts[1][0] += 1;
        assert_eq!(other.origins(), [0, 1, 2, 2]);
        assert_eq!(RunSpec { taps: true, ..spec }.origins(), [0, 1, 2, 3]);
    }

    /// What is not changed in a list that is kept needs no change.
    #[test]
    fn lists_of_a_spec_that_fits_differ_in_the_draws_alone() {
        let (device, engine) = engine();
        let mut first = run(&device, &engine, &request(&engine));
        let lists = |run: &Run| -> [NodeList; 3] {
            [run.record_token(false).unwrap(), run.record_token(true).unwrap(), run.record_image().unwrap().0]
        };
        let before = lists(&first);
        let mut other = request(&engine);
        (other.seed, other.first_image, other.prompt) = (9, 4, "a square".into());
        (other.sampler.guidance_scale, other.sampler.timesteps_shift) = (5.0, 2.0);
        let spec = engine.prepare(&other).unwrap().spec;
        assert!(first.fits(&spec).unwrap());
        first.wipe().unwrap();
        first.rebind(spec).unwrap();
        let draws = first.record_draws().unwrap().unwrap();
        for (mut kept, new) in before.into_iter().zip(lists(&first)) {
            if let Some(index) = kept.nodes().iter().position(|node| node.label == draws.label) {
                assert_ne!(kept.nodes()[index].params.as_slice(), draws.params.as_slice());
                kept.set_params(index, &draws).unwrap();
            }
            assert_eq!(kept.len(), new.len());
            for (kept, new) in kept.nodes().iter().zip(new.nodes()) {
                kept.check_same_launch(new).unwrap();
                assert_eq!(kept.params.as_slice(), new.params.as_slice(), "{new:?}");
            }
        }
    }
}
