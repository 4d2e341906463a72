//! Which token is written next, from the logits, on the host. Definitions and order are those of transformers'
//! generation: temperature, then top-k, then top-p, then one draw. The draws are our own stream, not torch's.

use crate::error::{Error, Result};
use crate::rng::philox::{counter, key, philox4x32_10};
use serde::Serialize;
use std::num::NonZeroU32;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TextSampling {
    /// The most probable token; of equal ones the lowest id, as torch's argmax.
    #[default]
    Greedy,
    /// Drawn from the distribution that is left.
    Random(RandomSampling),
}

/// What is left of the distribution that a token is drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RandomSampling {
    /// Logits are divided by it: above 0; 1 is the model's own distribution, less is more predictable.
    pub temperature: f64,
    /// Only so many most probable tokens are kept, and those that equal the last of them.
    pub top_k: Option<NonZeroU32>,
    /// Only the most probable tokens are kept whose probabilities together reach it: above 0, at most 1.
    pub top_p: Option<f64>,
}

impl Default for RandomSampling {
    fn default() -> RandomSampling {
        RandomSampling { temperature: 1.0, top_k: None, top_p: None }
    }
}

impl RandomSampling {
    /// Refuses values that no distribution has.
    pub fn validate(&self) -> Result<()> {
        let temperature = self.temperature;
        if !(temperature > 0.0 && temperature.is_finite()) {
            let reason = format!("is {temperature}; it must be above 0 and finite (greedy text needs none)");
            return Err(Error::request("temperature", reason));
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => {
                Err(Error::request("top_p", format!("is {p}; it must be above 0 and at most 1")))
            }
            _ => Ok(()),
        }
    }

    /// The tokens that may be drawn, by rising id, and their probabilities. `logits` are finite.
    pub fn distribution(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // Relative to the largest, so that no temperature overflows.
        let score = |logit: f32| (f64::from(logit) - f64::from(largest)) / self.temperature;
        let mut kept: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, &logit)| (id as u32, score(logit))).collect();
        // Most probable first; of equal ones the lowest id.
        let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = self.top_k.map(|k| k.get() as usize).filter(|&k| k < kept.len()) {
            let (_, &mut (_, last), _) = kept.select_nth_unstable_by(k - 1, order);
            kept.retain(|&(_, score)| score >= last);
        }
        kept.iter_mut().for_each(|(_, score)| *score = score.exp());
        normalise(&mut kept);
        if let Some(p) = self.top_p.filter(|&p| p < 1.0) {
            kept.sort_unstable_by(order);
            // Dropped is the longest tail whose sum is at most 1 - p; the first always stays.
            let mut tail = 0.0;
            let mut count = kept.len();
            while count > 1 {
                tail += kept[count - 1].1;
                if tail > 1.0 - p {
                    break;
                }
                count -= 1;
            }
            kept.truncate(count);
            normalise(&mut kept);
        }
        kept.sort_unstable_by_key(|&(id, _)| id);
        kept
    }
}

/// Makes the weights sum to 1.
fn normalise(weights: &mut [(u32, f64)]) {
    let sum: f64 = weights.iter().map(|&(_, weight)| weight).sum();
    weights.iter_mut().for_each(|(_, weight)| *weight /= sum);
}

/// The index of the first largest value; `None` if there is none or one is not finite.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    if logits.is_empty() || logits.iter().any(|logit| !logit.is_finite()) {
        return None;
    }
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = index;
        }
    }
    u32::try_from(best).ok()
}

/// A number in [0, 1) with 53 bits, a function of seed and position alone.
fn uniform(seed: u64, position: u64) -> f64 {
    let [low, high, ..] = philox4x32_10(counter(0, 0, position), key(seed));
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// The token at `position` of a text: `None` if a logit is not finite.
pub fn choose(logits: &[f32], sampling: &TextSampling, seed: u64, position: u64) -> Option<u32> {
    let most_probable = argmax(logits)?;
    let TextSampling::Random(random) = sampling else { return Some(most_probable) };
    let drawn = uniform(seed, position);
    let mut reached = 0.0;
    let kept = random.distribution(logits);
    // Rounding may leave the last sum below 1: the last token takes what is missing.
    let token = kept.iter().find(|(_, probability)| {
        reached += probability;
        drawn < reached
    });
    token.or(kept.last()).map(|&(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(sampling: RandomSampling, logits: &[f32]) -> Vec<u32> {
        sampling.distribution(logits).iter().map(|&(id, _)| id).collect()
    }

    /// Logits of the probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
    fn halves() -> Vec<f32> {
        [0.0625f32, 0.5, 0.0625, 0.25, 0.125].iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn ties_go_to_the_first_and_what_is_not_finite_to_nobody() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), Some(1));
        assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
        for bad in [&[][..], &[1.0, f32::NAN], &[f32::INFINITY, 1.0], &[1.0, f32::NEG_INFINITY]] {
            assert_eq!(argmax(bad), None);
            assert_eq!(choose(bad, &TextSampling::Random(RandomSampling::default()), 1, 2), None);
        }
    }

    #[test]
    fn top_k_keeps_the_ties_of_its_last_token() {
        let top = |k| RandomSampling { top_k: NonZeroU32::new(k), ..RandomSampling::default() };
        assert_eq!(ids(top(1), &halves()), [1]);
        assert_eq!(ids(top(3), &halves()), [1, 3, 4]);
        assert_eq!(ids(top(4), &halves()), [0, 1, 2, 3, 4]);
        assert_eq!(ids(top(99), &halves()), [0, 1, 2, 3, 4]);
        let kept = top(2).distribution(&halves());
        assert!((kept[0].1 - 2.0 / 3.0).abs() < 1e-6 && (kept[1].1 - 1.0 / 3.0).abs() < 1e-6, "{kept:?}");
    }

    #[test]
    fn top_p_keeps_what_reaches_it() {
        let top = |p| RandomSampling { top_p: Some(p), ..RandomSampling::default() };
        assert_eq!(ids(top(1e-9), &halves()), [1]);
        assert_eq!(ids(top(0.49), &halves()), [1]);
        assert_eq!(ids(top(0.51), &halves()), [1, 3]);
        assert_eq!(ids(top(0.76), &halves()), [1, 3, 4]);
        // Of the two last, which are equal, the higher id goes first.
        assert_eq!(ids(top(0.9), &halves()), [0, 1, 3, 4]);
        assert_eq!(ids(top(1.0), &halves()), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn top_p_counts_what_temperature_and_top_k_left() {
        // Squared: 64, 16, 4, 1, 1 of 86. The first two hold 93 %.
        let cold = RandomSampling { temperature: 0.5, top_p: Some(0.9), ..RandomSampling::default() };
        assert_eq!(ids(cold, &halves()), [1, 3]);
        // Of the first two alone the first holds two thirds.
        let both = RandomSampling { top_k: NonZeroU32::new(2), top_p: Some(0.66), temperature: 1.0 };
        assert_eq!(ids(both, &halves()), [1]);
    }

    #[test]
    fn any_temperature_above_zero_gives_a_distribution() {
        for temperature in [f64::MIN_POSITIVE, 1e-30, 1.0, 1e30, f64::MAX] {
            let sampling = RandomSampling { temperature, ..RandomSampling::default() };
            sampling.validate().unwrap();
            let sum: f64 = sampling.distribution(&[-3e38, 3e38, 0.0]).iter().map(|&(_, p)| p).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{temperature}: {sum}");
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        // 40 logits between -2 and 2; 40,000 draws.
        let logits: Vec<f32> = (0..40).map(|i| 2.0 * (i as f32 * 1.7).sin()).collect();
        for sampling in [
            RandomSampling::default(),
            RandomSampling { temperature: 0.6, top_k: NonZeroU32::new(25), top_p: Some(0.95) },
        ] {
            let expected = sampling.distribution(&logits);
            let draws = 40_000;
            for seed in [1, 2] {
                let mut counts = vec![0u32; logits.len()];
                for position in 0..draws {
                    let token = choose(&logits, &TextSampling::Random(sampling), seed, position);
                    counts[token.unwrap() as usize] += 1;
                }
                let mut chi = 0.0;
                for &(id, probability) in &expected {
                    let mean = probability * draws as f64;
                    chi += (f64::from(counts[id as usize]) - mean).powi(2) / mean;
                }
                let kept: u32 = expected.iter().map(|&(id, _)| counts[id as usize]).sum();
                assert_eq!(u64::from(kept), draws, "a dropped token was drawn");
                // Mean n, standard deviation sqrt(2n): four of them on either side.
                let freedom = expected.len() as f64 - 1.0;
                let deviation = 4.0 * (2.0 * freedom).sqrt();
                assert!((chi - freedom).abs() < deviation, "seed {seed}: chi-square {chi} of {freedom}");
            }
        }
    }

    #[test]
    fn senseless_settings_are_refused_by_name() {
        let field = |sampling: RandomSampling| match sampling.validate() {
            Err(Error::InvalidRequest { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        for temperature in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(field(RandomSampling { temperature, ..Default::default() }), "temperature");
        }
        for p in [0.0, -0.1, 1.0000001, f64::NAN] {
            assert_eq!(field(RandomSampling { top_p: Some(p), ..Default::default() }), "top_p");
        }
    }
}
