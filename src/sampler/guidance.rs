//! Classifier-free guidance: how many branches a request has, and how strong guidance is at every image token.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Largest guidance scale; far above anything that still gives pictures.
pub const MAX_GUIDANCE_SCALE: f64 = 100.0;

/// How guidance changes from the first image token to the last. The official name `linear` means the falling one in
/// August and the rising one in February, so ours are two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuidanceSchedule {
    /// The scales as given, at every token.
    Constant,
    /// August: falls linearly from the scale towards 1.
    Linear,
    /// February: rises linearly to the scale, from half of it or from 1, whichever is larger.
    LinearRising,
}

impl GuidanceSchedule {
    /// All schedules.
    pub const ALL: [GuidanceSchedule; 3] =
        [GuidanceSchedule::Constant, GuidanceSchedule::Linear, GuidanceSchedule::LinearRising];

    /// The name in requests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            GuidanceSchedule::Constant => "constant",
            GuidanceSchedule::Linear => "linear",
            GuidanceSchedule::LinearRising => "linear-rising",
        }
    }

    /// The schedule of a name.
    pub fn from_name(name: &str) -> Option<GuidanceSchedule> {
        GuidanceSchedule::ALL.into_iter().find(|schedule| schedule.name() == name)
    }

    /// The scale in force when `produced` of `total` image tokens exist.
    fn scale_at(self, scale: f64, produced: usize, total: usize) -> f64 {
        let (produced, total) = (produced as f64, total as f64);
        match self {
            GuidanceSchedule::Constant => scale,
            GuidanceSchedule::Linear => 1.0 + (scale - 1.0) * (total - produced) / total,
            GuidanceSchedule::LinearRising => (scale / 2.0).max(1.0 + (scale - 1.0) * produced / total),
        }
    }
}

/// Text and image guidance for every image token, [T, 2].
pub fn guidance_table(
    schedule: GuidanceSchedule,
    guidance_scale: f64,
    image_guidance_scale: f64,
    tokens: usize,
) -> Vec<[f32; 2]> {
    (0..tokens)
        .map(|n| {
            [guidance_scale, image_guidance_scale].map(|scale| schedule.scale_at(scale, n, tokens) as f32)
        })
        .collect()
}

/// The rows that guidance compares. Fixed for the request: where a schedule passes through 1 the official February code
/// drops a branch in mid-image and fails; with the branch kept, the formula gives the conditional velocity by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Branches {
    /// Conditional only: no guidance.
    Conditional,
    /// Conditional and negative: v = v_u + cfg (v_c - v_u).
    Text,
    /// Conditional, image-only and negative: v = v_n + cfg_img (v_i - v_n) + cfg (v_c - v_i).
    TextAndImage,
}

impl Branches {
    /// The branches of a pair of scales.
    ///
    /// Refused are the pairs for which the official code breaks: its pipeline adds rows when a scale differs from 1, its
    /// sampler uses them when it is above 1, so a scale below 1, or image guidance without text guidance, gives rows
    /// that nobody reads or readers without rows.
    pub fn from_scales(guidance_scale: f64, image_guidance_scale: f64) -> Result<Branches> {
        for (field, scale) in
            [("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)]
        {
            // Written so that NaN fails.
            if !(1.0..=MAX_GUIDANCE_SCALE).contains(&scale) {
                let reason = format!("is {scale}; it must be from 1 (no guidance) to {MAX_GUIDANCE_SCALE}");
                return Err(Error::request(field, reason));
            }
        }
        match (guidance_scale > 1.0, image_guidance_scale > 1.0) {
            (false, false) => Ok(Branches::Conditional),
            (true, false) => Ok(Branches::Text),
            (true, true) => Ok(Branches::TextAndImage),
            (false, true) => Err(Error::request(
                "image_guidance_scale",
                format!(
                    "is {image_guidance_scale} while guidance_scale is 1; image guidance needs text guidance above 1"
                ),
            )),
        }
    }

    /// 1, 2 or 3.
    pub fn count(self) -> usize {
        match self {
            Branches::Conditional => 1,
            Branches::Text => 2,
            Branches::TextAndImage => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_and_end_where_they_should() {
        let scales = |schedule, cfg| {
            let table = guidance_table(schedule, cfg, 1.0, 4);
            assert!(table.iter().all(|row| row[1] == 1.0), "no image guidance stays none");
            table.into_iter().map(|row| row[0]).collect::<Vec<_>>()
        };
        assert_eq!(scales(GuidanceSchedule::Constant, 5.0), [5.0; 4]);
        assert_eq!(scales(GuidanceSchedule::Linear, 5.0), [5.0, 4.0, 3.0, 2.0]);
        assert_eq!(scales(GuidanceSchedule::LinearRising, 5.0), [2.5, 2.5, 3.0, 4.0]);
        // At 2 and below the rising schedule starts at 1; the branches stay.
        assert_eq!(scales(GuidanceSchedule::LinearRising, 2.0)[0], 1.0);
        assert_eq!(guidance_table(GuidanceSchedule::Linear, 3.0, 2.0, 0), Vec::<[f32; 2]>::new());
    }

    #[test]
    fn branches_follow_the_scales() {
        let count = |cfg, cfg_img| Branches::from_scales(cfg, cfg_img).unwrap().count();
        assert_eq!((count(1.0, 1.0), count(1.5, 1.0), count(7.5, 2.0)), (1, 2, 3));
    }

    #[test]
    fn scales_that_break_the_official_code_are_refused() {
        let field = |cfg, cfg_img| match Branches::from_scales(cfg, cfg_img) {
            Err(Error::InvalidRequest { field, .. }) => field,
            other => panic!("{cfg} {cfg_img}: {other:?}"),
        };
        for cfg in [f64::NAN, f64::INFINITY, -1.0, 0.0, 0.5, 100.5, 1e30] {
            assert_eq!(field(cfg, 1.0), "guidance_scale");
            assert_eq!(field(7.5, cfg), "image_guidance_scale");
        }
        assert_eq!(field(1.0, 2.0), "image_guidance_scale");
    }

    #[test]
    fn names_round_trip() {
        for schedule in GuidanceSchedule::ALL {
            assert_eq!(GuidanceSchedule::from_name(schedule.name()), Some(schedule));
            assert_eq!(serde_json::to_value(schedule).unwrap(), schedule.name());
        }
    }
}
