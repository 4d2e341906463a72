//! A request as users write it: any subset of the fields, under our names or the official ones.
//!
//! Read by hand rather than by derive, because refusals must name the field: unknown fields, a field given twice, an alias
//! that contradicts its canonical name, and values of the wrong kind are all errors.

use super::{Defaults, GenerateRequest, SamplerConfig};
use crate::error::{Error, Result};
use crate::rng::random_seed;
use crate::sampler::{GuidanceSchedule, Sampler};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// Largest request text; prompts are bounded much lower.
const MAX_JSON_BYTES: usize = 1 << 20;

/// The fields of a request, each given or not. `Default` gives none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestFields {
    /// The caption; `captions` in the official code.
    pub prompt: Option<String>,
    /// Empty switches a default off.
    pub negative_prompt: Option<String>,
    /// Empty switches a default off.
    pub positive_prompt: Option<String>,
    /// Pixels. Also as `size: "WxH"`, or as `hw: [height, width]`, the official order.
    pub width: Option<u32>,
    /// Pixels.
    pub height: Option<u32>,
    /// Number of pictures; also `num_images_per_prompt`, `num_images_per_caption`.
    pub n: Option<u32>,
    /// Index of the first picture in its batch.
    pub first_image: Option<u32>,
    /// Seed of the noise; a random one where none is given.
    pub seed: Option<u64>,
    /// Which sampler; also `sde_type`.
    pub sampler: Option<Sampler>,
    /// Network evaluations per token; also `num_inference_steps`, `num_sampling_steps`.
    pub steps: Option<u32>,
    /// Text guidance; also `cfg`.
    pub guidance_scale: Option<f64>,
    /// Picture guidance; also `cfg_img`.
    pub image_guidance_scale: Option<f64>,
    /// Guidance over the picture; also `cfg_schedule`.
    pub guidance_schedule: Option<GuidanceSchedule>,
    /// Warp of the time grid; also `shift`.
    pub timesteps_shift: Option<f64>,
    /// Noise of `sde` and `cps`.
    pub noise_level: Option<f64>,
    /// Normalise sampled tokens.
    pub use_norm: Option<bool>,
    /// Shrink over-long guided velocities.
    pub rescale: Option<bool>,
}

/// Canonical name and other accepted names of every field. `size` and `hw` stand for two fields and are taken apart first.
const NAMES: &[(&str, &[&str])] = &[
    ("prompt", &["caption", "captions"]),
    ("negative_prompt", &[]),
    ("positive_prompt", &[]),
    ("width", &[]),
    ("height", &[]),
    ("n", &["num_images_per_prompt", "num_images_per_caption"]),
    ("first_image", &[]),
    ("seed", &[]),
    ("sampler", &["sde_type"]),
    ("steps", &["num_inference_steps", "num_sampling_steps"]),
    ("guidance_scale", &["cfg"]),
    ("image_guidance_scale", &["cfg_img"]),
    ("guidance_schedule", &["cfg_schedule"]),
    ("timesteps_shift", &["shift"]),
    ("noise_level", &[]),
    ("use_norm", &[]),
    ("rescale", &[]),
];

impl RequestFields {
    /// Reads a JSON object. `null` is as good as leaving the field out.
    pub fn from_json(json: &str) -> Result<RequestFields> {
        if json.len() > MAX_JSON_BYTES {
            let reason = format!("has {} bytes, at most {MAX_JSON_BYTES} are read", json.len());
            return Err(Error::request("request", reason));
        }
        let Pairs(pairs) =
            serde_json::from_str(json).map_err(|e| Error::request("request", e.to_string()))?;
        RequestFields::from_pairs(pairs)
    }

    /// Reads the fields of a parsed object.
    pub fn from_value(value: &Value) -> Result<RequestFields> {
        let Value::Object(map) = value else {
            return Err(Error::request("request", format!("is {}; expected an object", brief(value))));
        };
        RequestFields::from_pairs(map.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    fn from_pairs(pairs: Vec<(String, Value)>) -> Result<RequestFields> {
        let mut given: Vec<Given> = Vec::new();
        for (index, (name, value)) in pairs.iter().enumerate() {
            if pairs[..index].iter().any(|(earlier, _)| earlier == name) {
                return Err(Error::request("request", format!("has the field {name:?} twice")));
            }
            if value.is_null() && name_of(name).is_some() {
                continue;
            }
            match name.as_str() {
                "size" => given.extend(split_size("size", value)?),
                "hw" => given.extend(split_hw("hw", value)?),
                _ => {
                    let field = name_of(name).ok_or_else(|| unknown(name))?;
                    given.push(Given { field, written: name, value: value.clone() });
                }
            }
        }
        let mut fields = RequestFields::default();
        for (index, item) in given.iter().enumerate() {
            if let Some(other) = given[..index].iter().find(|other| other.field == item.field) {
                if same(&other.value, &item.value) {
                    continue;
                }
                let reason = format!(
                    "is {} by {:?} and {} by {:?}",
                    brief(&other.value),
                    other.written,
                    brief(&item.value),
                    item.written
                );
                return Err(Error::request(item.field, reason));
            }
            fields.set(item)?;
        }
        Ok(fields)
    }

    fn set(&mut self, item: &Given) -> Result<()> {
        match item.field {
            "prompt" => self.prompt = Some(item.text()?),
            "negative_prompt" => self.negative_prompt = Some(item.text()?),
            "positive_prompt" => self.positive_prompt = Some(item.text()?),
            "width" => self.width = Some(item.u32()?),
            "height" => self.height = Some(item.u32()?),
            "n" => self.n = Some(item.u32()?),
            "first_image" => self.first_image = Some(item.u32()?),
            "seed" => {
                let expected = "an integer from 0 to 2^64 - 1";
                self.seed = Some(item.value.as_u64().ok_or_else(|| item.expected(expected))?);
            }
            "sampler" => {
                let names = Sampler::ALL.map(Sampler::name).join(", ");
                self.sampler = Some(Sampler::from_name(&item.text()?).ok_or_else(|| item.expected(&names))?);
            }
            "steps" => self.steps = Some(item.u32()?),
            "guidance_scale" => self.guidance_scale = Some(item.number()?),
            "image_guidance_scale" => self.image_guidance_scale = Some(item.number()?),
            "guidance_schedule" => {
                let names = GuidanceSchedule::ALL.map(GuidanceSchedule::name).join(", ");
                let schedule = GuidanceSchedule::from_name(&item.text()?);
                self.guidance_schedule = Some(schedule.ok_or_else(|| item.expected(&names))?);
            }
            "timesteps_shift" => self.timesteps_shift = Some(item.number()?),
            "noise_level" => self.noise_level = Some(item.number()?),
            "use_norm" => self.use_norm = Some(item.flag()?),
            "rescale" => self.rescale = Some(item.flag()?),
            other => return Err(Error::Internal(format!("request field {other} has no place"))),
        }
        Ok(())
    }

    /// These fields, with those of `base` where one is missing: `--from-image` under the command line's options.
    pub fn over(self, base: RequestFields) -> RequestFields {
        RequestFields {
            prompt: self.prompt.or(base.prompt),
            negative_prompt: self.negative_prompt.or(base.negative_prompt),
            positive_prompt: self.positive_prompt.or(base.positive_prompt),
            width: self.width.or(base.width),
            height: self.height.or(base.height),
            n: self.n.or(base.n),
            first_image: self.first_image.or(base.first_image),
            seed: self.seed.or(base.seed),
            sampler: self.sampler.or(base.sampler),
            steps: self.steps.or(base.steps),
            guidance_scale: self.guidance_scale.or(base.guidance_scale),
            image_guidance_scale: self.image_guidance_scale.or(base.image_guidance_scale),
            guidance_schedule: self.guidance_schedule.or(base.guidance_schedule),
            timesteps_shift: self.timesteps_shift.or(base.timesteps_shift),
            noise_level: self.noise_level.or(base.noise_level),
            use_norm: self.use_norm.or(base.use_norm),
            rescale: self.rescale.or(base.rescale),
        }
    }

    /// The complete request. A default that the given fields leave without effect is dropped, so that for example
    /// `guidance_scale: 1` alone does not collide with a default negative prompt; a given field never is.
    pub fn resolve(self, defaults: &Defaults) -> Result<GenerateRequest> {
        let prompt = self.prompt.ok_or_else(|| Error::request("prompt", "is missing"))?;
        let base = defaults.sampler;
        let sampler = self.sampler.unwrap_or(base.sampler);
        let guidance_scale = self.guidance_scale.unwrap_or(base.guidance_scale);
        let unguided = guidance_scale == 1.0;
        let text = |given: Option<String>, default: Option<&str>| {
            given.or(default.map(str::to_owned)).filter(|text| !text.is_empty())
        };
        Ok(GenerateRequest {
            prompt,
            negative_prompt: text(self.negative_prompt, defaults.negative_prompt.filter(|_| !unguided)),
            positive_prompt: text(self.positive_prompt, defaults.positive_prompt),
            width: self.width.unwrap_or(defaults.width),
            height: self.height.unwrap_or(defaults.height),
            n: self.n.unwrap_or(1),
            first_image: self.first_image.unwrap_or(0),
            seed: self.seed.unwrap_or_else(random_seed),
            images: Vec::new(),
            preview_every_rows: None,
            keep_tokens: false,
            sampler: SamplerConfig {
                sampler,
                steps: self.steps.unwrap_or(base.steps),
                guidance_scale,
                image_guidance_scale: self.image_guidance_scale.unwrap_or(if unguided {
                    1.0
                } else {
                    base.image_guidance_scale
                }),
                guidance_schedule: self.guidance_schedule.unwrap_or(match unguided {
                    true => GuidanceSchedule::Constant,
                    false => base.guidance_schedule,
                }),
                timesteps_shift: self.timesteps_shift.unwrap_or(base.timesteps_shift),
                noise_level: self.noise_level.or(base.noise_level.filter(|_| sampler.uses_noise_level())),
                use_norm: self.use_norm.unwrap_or(base.use_norm),
                rescale: self.rescale.unwrap_or(base.rescale && !unguided),
            },
        })
    }
}

/// A field as it was written.
struct Given<'a> {
    field: &'static str,
    written: &'a str,
    value: Value,
}

impl Given<'_> {
    fn expected(&self, what: &str) -> Error {
        Error::request(self.field, format!("is {}; expected {what}", brief(&self.value)))
    }

    fn text(&self) -> Result<String> {
        self.value.as_str().map(str::to_owned).ok_or_else(|| self.expected("a string"))
    }

    fn number(&self) -> Result<f64> {
        self.value.as_f64().ok_or_else(|| self.expected("a number"))
    }

    fn flag(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.expected("true or false"))
    }

    fn u32(&self) -> Result<u32> {
        let number = self.value.as_u64().and_then(|n| u32::try_from(n).ok());
        number.ok_or_else(|| self.expected("an integer from 0 to 2^32 - 1"))
    }
}

/// `"WxH"`: width first.
fn split_size<'a>(written: &'a str, value: &Value) -> Result<[Given<'a>; 2]> {
    let sides = value.as_str().and_then(|text| text.split_once('x')).and_then(|(width, height)| {
        // Digits only: parse would take a sign.
        let side =
            |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u32>().ok()).flatten();
        Some((side(width)?, side(height)?))
    });
    let (width, height) = sides.ok_or_else(|| {
        Error::request("size", format!("is {}; expected \"WIDTHxHEIGHT\" in pixels", brief(value)))
    })?;
    Ok([
        Given { field: "width", written, value: width.into() },
        Given { field: "height", written, value: height.into() },
    ])
}

/// `[h, w]`: height first, as in the official code.
fn split_hw<'a>(written: &'a str, value: &Value) -> Result<[Given<'a>; 2]> {
    match value.as_array().map(Vec::as_slice) {
        Some([height, width]) => Ok([
            Given { field: "height", written, value: height.clone() },
            Given { field: "width", written, value: width.clone() },
        ]),
        _ => {
            let reason = format!("hw is {}; expected [height, width] in pixels", brief(value));
            Err(Error::request("size", reason))
        }
    }
}

/// The canonical name of a written one; `size` and `hw` are their own.
fn name_of(written: &str) -> Option<&'static str> {
    if matches!(written, "size" | "hw") {
        return Some("size");
    }
    NAMES.iter().find(|(name, aliases)| *name == written || aliases.contains(&written)).map(|(name, _)| *name)
}

fn unknown(name: &str) -> Error {
    let known: Vec<&str> = NAMES.iter().map(|(name, _)| *name).chain(["size", "hw"]).collect();
    let name: String = name.chars().take(80).collect();
    Error::request("request", format!("has no field {name:?}; known are {}", known.join(", ")))
}

/// Equal as JSON, with 7 and 7.0 the same number.
fn same(a: &Value, b: &Value) -> bool {
    a == b || (a.is_number() && b.is_number() && a.as_f64() == b.as_f64())
}

/// A value short enough for a message.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The members of an object in the order written, duplicates included: a map would swallow them.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Pairs, D::Error> {
        struct PairsVisitor;

        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of request fields")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(PairsVisitor)
    }
}

impl<'de> Deserialize<'de> for RequestFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RequestFields, D::Error> {
        let Pairs(pairs) = Pairs::deserialize(deserializer)?;
        RequestFields::from_pairs(pairs).map_err(serde::de::Error::custom)
    }
}
