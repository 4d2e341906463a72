//! Typed access to the fields of a JSON object, with errors that name the file, the field and what was found.

use super::{Error, MAX_CONFIG_BYTES, Path, PathBuf, Result};
use crate::weights::{escape, read_text};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// One JSON object of a config file.
pub(super) struct Fields {
    path: PathBuf,
    /// `""`, or the name of this object followed by a dot.
    prefix: String,
    map: Map<String, Value>,
}

/// Reads a config file; a missing or unreadable one is an error of its own kind.
pub(crate) fn read_config(path: &Path) -> Result<String> {
    read_text(path, MAX_CONFIG_BYTES).map_err(|error| match error {
        Error::Checkpoint { path, reason } => Error::InvalidConfig { path, field: "(file)".into(), reason },
        other => other,
    })
}

impl Fields {
    pub(super) fn parse(path: &Path, text: &str) -> Result<Fields> {
        let refuse =
            |reason: String| Error::InvalidConfig { path: path.to_owned(), field: "(file)".into(), reason };
        // Errors here include numbers beyond f64 (1e999) and the NaN and Infinity that Python may write.
        let value = serde_json::from_str(text).map_err(|error| refuse(format!("not JSON: {error}")))?;
        match value {
            Value::Object(map) => Ok(Fields { path: path.to_owned(), prefix: String::new(), map }),
            _ => Err(refuse("not a JSON object".into())),
        }
    }

    pub(super) fn error(&self, field: &str, reason: String) -> Error {
        Error::InvalidConfig { path: self.path.clone(), field: format!("{}{field}", self.prefix), reason }
    }

    /// The value as written; `null` and absent are the same, as they are to the official classes.
    pub(super) fn raw(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A wrong value, cut short: it may be a long list.
    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        self.error(key, format!("expected {expected}, found {}", escape(&value.to_string())))
    }

    fn missing(&self, key: &str) -> Error {
        let found = if self.map.contains_key(key) { "null" } else { "missing" };
        self.error(key, format!("{found}; the model cannot be laid out without it"))
    }

    pub(super) fn optional_size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        self.raw(key).map(|value| self.size_of(key, value, &range)).transpose()
    }

    fn size_of(&self, key: &str, value: &Value, range: &RangeInclusive<usize>) -> Result<usize> {
        let size =
            value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| range.contains(size));
        size.ok_or_else(|| {
            self.wrong(key, value, &format!("an integer from {} to {}", range.start(), range.end()))
        })
    }

    pub(super) fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        self.optional_size(key, range)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn sizes(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<Vec<usize>>> {
        match self.raw(key) {
            None => Ok(None),
            Some(Value::Array(values)) => {
                values.iter().map(|value| self.size_of(key, value, &range)).collect::<Result<_>>().map(Some)
            }
            Some(value) => Err(self.wrong(key, value, "a list of integers")),
        }
    }

    /// A token id or a list of them, as generation configs have it.
    pub(super) fn ids(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let ids = match self.raw(key) {
            Some(Value::Array(_)) => self.sizes(key, 0..=vocab_size - 1)?.unwrap_or_default(),
            _ => self.optional_size(key, 0..=vocab_size - 1)?.into_iter().collect(),
        };
        Ok(ids.into_iter().map(|id| id as u32).collect())
    }

    pub(super) fn optional_bool(&self, key: &str) -> Result<Option<bool>> {
        let expect = |value: &Value| value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"));
        self.raw(key).map(expect).transpose()
    }

    pub(super) fn optional_string(&self, key: &str) -> Result<Option<String>> {
        let expect = |value: &Value| {
            value.as_str().map(str::to_owned).ok_or_else(|| self.wrong(key, value, "a string"))
        };
        self.raw(key).map(expect).transpose()
    }

    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        let expect = |value: &Value| {
            value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.wrong(key, value, "a finite number"))
        };
        self.raw(key).map(expect).transpose()
    }

    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<f64>> {
        match self.optional_number(key)? {
            // Below f32's smallest normal number it would be 0 where it is used.
            Some(x) if x < f64::from(f32::MIN_POSITIVE) || x > f64::from(f32::MAX) => {
                Err(self.error(key, format!("{x}: expected a number > 0 within the range of f32")))
            }
            other => Ok(other),
        }
    }

    pub(super) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.optional_positive(key)?.or(default).ok_or_else(|| self.missing(key))
    }

    pub(super) fn optional_object(&self, key: &str) -> Result<Option<Fields>> {
        match self.raw(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                let prefix = format!("{}{key}.", self.prefix);
                Ok(Some(Fields { path: self.path.clone(), prefix, map: map.clone() }))
            }
            Some(value) => Err(self.wrong(key, value, "an object")),
        }
    }
}
