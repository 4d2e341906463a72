//! The random draws of one request, in the order of the official code; and recorded draws for golden tests.

use super::cuda_randn::{CudaRandn, H100_MAX_THREADS};
use crate::error::{Error, Result};
use crate::prompt::Generation;
use crate::sampler::Sampler;
use half::bf16;

/// Most images that may share one draw. At 64 numbers each they stay below the thread cap of every card with 32 SMs or
/// more, so that a draw depends on the seed alone, not on the card nor on how many images are made together.
pub const MAX_IMAGES_PER_BATCH: u32 = 1024;

/// A generator offset beyond every draw of every request.
const UNREACHED_OFFSET: u64 = 1 << 48;

/// The draw of the VAE posterior in editing. It is taken even where the VAE ignores it, and moves every later draw of
/// the codes that seed before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosteriorDraw {
    /// Latent values drawn at once: pictures (repeated for every image and every branch that holds one) x C x H x W.
    pub numel: u64,
    /// SMs times threads per SM of the card to be matched.
    pub max_threads: u64,
}

/// Where each draw of a request stands in the seed's stream.
///
/// Draw j of image token t is one `torch.randn` of shape [images, token_dim]: draw 0 is the initial noise, draw k + 1
/// belongs to solver step k. Element (image, k) is element `image * token_dim + k` of the call, so an image's noise does
/// not depend on how many are made beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrawPlan {
    /// Seed of the request.
    pub seed: u64,
    /// Generator offset before the first draw of token 0, in 32-bit outputs; a multiple of 4.
    pub base_offset: u64,
    /// `torch.randn` calls per image token.
    pub draws_per_token: u32,
    /// Numbers per image token.
    pub token_dim: u32,
    /// Images of this run.
    pub images: u32,
    /// Index of the first of them in the batch whose noise is reproduced.
    pub first_image: u32,
    /// Draws are rounded to bf16: the February code draws in the model's dtype.
    pub round_bf16: bool,
    posterior: Option<PosteriorDraw>,
}

impl DrawPlan {
    /// The plan of a request for `images` images from `first_image` on. `model_is_bf16`: the dtype in which the official
    /// run to be matched holds the model. `posterior`: the editing draw, if pictures were given.
    pub fn new(
        sampler: Sampler,
        num_sampling_steps: u32,
        seed: u64,
        (first_image, images): (u32, u32),
        token_dim: u32,
        model_is_bf16: bool,
        posterior: Option<PosteriorDraw>,
    ) -> Result<DrawPlan> {
        let last = u64::from(first_image) + u64::from(images);
        if images == 0 || last > u64::from(MAX_IMAGES_PER_BATCH) {
            let reason = format!(
                "images {first_image}..{last} of a batch, allowed are 1 to {MAX_IMAGES_PER_BATCH} images in all"
            );
            return Err(Error::request("n", reason));
        }
        let february = sampler.generation() == Generation::February;
        // February seeds after the pictures are encoded, so their draw comes from another stream.
        let base_offset = match posterior {
            Some(draw) if !february => CudaRandn::new(seed, 0, draw.numel, draw.max_threads).next_offset(),
            _ => 0,
        };
        let draws_per_token = sampler.draws_per_token(num_sampling_steps);
        let round_bf16 = february && model_is_bf16;
        Ok(DrawPlan {
            seed,
            base_offset,
            draws_per_token,
            token_dim,
            images,
            first_image,
            round_bf16,
            posterior,
        })
    }

    /// Generator offset before draw `draw` of token `token`. Every draw stays below the thread cap and moves it by 4.
    pub fn offset(&self, token: u32, draw: u32) -> u64 {
        self.base_offset + 4 * (u64::from(token) * u64::from(self.draws_per_token) + u64::from(draw))
    }

    /// Draw `draw` of token `token`, [images, token_dim].
    pub fn draw(&self, token: u32, draw: u32) -> Vec<f32> {
        let row = u64::from(self.token_dim);
        let numel = u64::from(self.first_image + self.images) * row;
        let call = CudaRandn::new(self.seed, self.offset(token, draw), numel, H100_MAX_THREADS);
        let mut out = vec![0.0; self.images as usize * self.token_dim as usize];
        call.fill(u64::from(self.first_image) * row, &mut out);
        if self.round_bf16 {
            for value in &mut out {
                *value = bf16::from_f32(*value).to_f32();
            }
        }
        out
    }

    /// The editing draw, before its cast to the VAE's dtype; empty without pictures. February draws it before seeding, so
    /// that a seed does not decide it; here it is taken from a part of the seed's stream that no token reaches.
    pub fn posterior(&self) -> CudaRandn {
        let draw = self.posterior.unwrap_or(PosteriorDraw { numel: 0, max_threads: H100_MAX_THREADS });
        let offset = if self.base_offset > 0 { 0 } else { UNREACHED_OFFSET };
        CudaRandn::new(self.seed, offset, draw.numel, draw.max_threads)
    }
}

/// Draws recorded from a run of the official code, [tokens, draws, images, token_dim].
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedDraws {
    tokens: usize,
    draws: usize,
    images: usize,
    token_dim: usize,
    values: Vec<f32>,
}

impl RecordedDraws {
    /// Wraps values in the layout above.
    pub fn new([tokens, draws, images, token_dim]: [usize; 4], values: Vec<f32>) -> Result<RecordedDraws> {
        check_len("recorded draws", &[tokens, draws, images, token_dim], values.len())?;
        Ok(RecordedDraws { tokens, draws, images, token_dim, values })
    }

    /// Joins the initial noise, [tokens, rows, token_dim], and the step noise, [tokens, steps, rows, token_dim] (empty
    /// for a sampler that draws none). Recorded rows are repeated to `images` rows: the August code shares its draws
    /// between captions, whose images follow one another caption by caption.
    pub fn from_noise_and_steps(
        [tokens, steps, rows, token_dim]: [usize; 4],
        noise: &[f32],
        step_noise: &[f32],
        images: usize,
    ) -> Result<RecordedDraws> {
        check_len("recorded initial noise", &[tokens, rows, token_dim], noise.len())?;
        check_len("recorded step noise", &[tokens, steps, rows, token_dim], step_noise.len())?;
        if rows == 0 || images == 0 || !images.is_multiple_of(rows) {
            return Err(invalid(format!("{rows} recorded rows of noise do not repeat to {images} images")));
        }
        let row_values = rows * token_dim;
        let mut values = Vec::with_capacity(tokens * (steps + 1) * images * token_dim);
        let mut push = |draw: &[f32]| {
            for _ in 0..images / rows {
                values.extend_from_slice(draw);
            }
        };
        for token in 0..tokens {
            push(&noise[token * row_values..][..row_values]);
            for step in 0..steps {
                push(&step_noise[(token * steps + step) * row_values..][..row_values]);
            }
        }
        RecordedDraws::new([tokens, steps + 1, images, token_dim], values)
    }

    /// [tokens, draws, images, token_dim].
    pub fn shape(&self) -> [usize; 4] {
        [self.tokens, self.draws, self.images, self.token_dim]
    }

    /// All values, as the device's sampler takes them.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Draw `draw` of token `token`, [images, token_dim]; `None` if it was not recorded.
    pub fn draw(&self, token: usize, draw: usize) -> Option<&[f32]> {
        if token >= self.tokens || draw >= self.draws {
            return None;
        }
        let len = self.images * self.token_dim;
        self.values.get((token * self.draws + draw) * len..)?.get(..len)
    }
}

fn invalid(reason: String) -> Error {
    Error::InvalidCase { path: "recorded draws".into(), reason }
}

fn check_len(what: &str, shape: &[usize], found: usize) -> Result<()> {
    let expected = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    if expected == Some(found) {
        return Ok(());
    }
    Err(invalid(format!("{what}: shape {shape:?} does not hold {found} values")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(sampler: Sampler, steps: u32, images: (u32, u32), posterior: Option<PosteriorDraw>) -> DrawPlan {
        DrawPlan::new(sampler, steps, 42, images, 64, true, posterior).unwrap()
    }

    #[test]
    fn draws_follow_one_another_through_the_stream() {
        let p = plan(Sampler::Aug, 28, (0, 1), None);
        assert_eq!((p.base_offset, p.draws_per_token), (0, 28));
        assert_eq!(p.offset(3, 5), 4 * (3 * 28 + 5));
        // ecosystem.md's known answers: calls one and two of seed 42.
        assert!((p.draw(0, 0)[1] - 2.161374).abs() < 2e-6);
        assert!((p.draw(0, 1)[1] - -0.108216).abs() < 2e-6);
        assert_eq!(p.draw(1, 0), CudaRandn::new(42, 4 * 28, 64, H100_MAX_THREADS).all());
    }

    #[test]
    fn draws_per_token_of_every_sampler() {
        let counts = [Sampler::Aug, Sampler::Hf11, Sampler::Sde, Sampler::Cps, Sampler::Ode]
            .map(|sampler| plan(sampler, 10, (0, 1), None).draws_per_token);
        assert_eq!(counts, [10, 11, 11, 11, 1]);
    }

    #[test]
    fn one_image_of_a_batch_can_be_drawn_alone() {
        let batch = plan(Sampler::Hf11, 4, (0, 5), None).draw(2, 3);
        let alone = plan(Sampler::Hf11, 4, (3, 1), None).draw(2, 3);
        assert_eq!(batch[3 * 64..4 * 64], alone[..]);
    }

    #[test]
    fn february_draws_in_the_models_dtype() {
        let rounded = plan(Sampler::Ode, 4, (0, 2), None);
        assert!(rounded.round_bf16);
        let single = DrawPlan::new(Sampler::Ode, 4, 42, (0, 2), 64, false, None).unwrap();
        assert!(!single.round_bf16);
        for (r, s) in rounded.draw(1, 0).into_iter().zip(single.draw(1, 0)) {
            assert_eq!(r, bf16::from_f32(s).to_f32());
        }
        assert!(!plan(Sampler::Aug, 4, (0, 1), None).round_bf16, "August draws floats whatever the model is");
    }

    #[test]
    fn the_editing_draw_moves_august_and_not_february() {
        // 512x512, two pictures: 2 x 16 x 64 x 64.
        let draw = PosteriorDraw { numel: 2 * 16 * 64 * 64, max_threads: H100_MAX_THREADS };
        let august = plan(Sampler::Aug, 50, (0, 1), Some(draw));
        assert_eq!(august.base_offset, 4);
        assert_eq!(august.posterior().numel(), 131_072);
        // Above four elements per thread the draw takes a second round.
        let large = PosteriorDraw { numel: 4 * 270_336 + 1, ..draw };
        assert_eq!(plan(Sampler::Hf11, 50, (0, 1), Some(large)).base_offset, 8);
        let february = plan(Sampler::Sde, 50, (0, 1), Some(draw));
        assert_eq!(february.base_offset, 0);
        assert_ne!(february.posterior().at(0), february.draw(0, 0)[0], "a stream of its own");
    }

    #[test]
    fn batches_that_would_depend_on_the_card_are_refused() {
        for images in [(0, 0), (0, 1025), (1000, 25), (u32::MAX, u32::MAX)] {
            let refused = DrawPlan::new(Sampler::Aug, 4, 0, images, 64, true, None);
            assert!(matches!(refused, Err(Error::InvalidRequest { field: "n", .. })), "{images:?}");
        }
    }

    #[test]
    fn recorded_rows_are_tiled_over_captions() {
        let noise: Vec<f32> = (0..2 * 2 * 3).map(|v| v as f32).collect();
        let steps: Vec<f32> = (100..100 + 2 * 2 * 3).map(|v| v as f32).collect();
        let recorded = RecordedDraws::from_noise_and_steps([2, 1, 2, 3], &noise, &steps, 4).unwrap();
        assert_eq!(recorded.shape(), [2, 2, 4, 3]);
        assert_eq!(recorded.draw(1, 0).unwrap(), [6., 7., 8., 9., 10., 11., 6., 7., 8., 9., 10., 11.]);
        assert_eq!(recorded.draw(0, 1).unwrap()[..3], [100., 101., 102.]);
        assert_eq!((recorded.draw(2, 0), recorded.draw(0, 2)), (None, None));
        assert!(RecordedDraws::from_noise_and_steps([2, 1, 2, 3], &noise, &steps, 3).is_err());
        assert!(RecordedDraws::new([2, 2, 2, 3], noise).is_err());
        assert!(RecordedDraws::new([usize::MAX, 2, 2, 3], steps).is_err());
    }
}
