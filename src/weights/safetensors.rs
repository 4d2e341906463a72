//! The safetensors header: `u64` length (little endian), a JSON object, then the tensors' bytes without gaps.
//!
//! Parsed here rather than by the `safetensors` crate for three reasons: the crate collects the object into a map,
//! so of two equal names the later one silently wins; it wants the whole file in memory; and its errors do not
//! name the tensor. The crate is the oracle of this file's tests instead.

use super::source::{Source, escape};
use super::{Dtype, TensorEntry};
use crate::error::{Error, Result};
use serde::de::{self, Deserializer as _, MapAccess, Visitor};
use std::path::Path;

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The highest rank that PyTorch allows.
const MAX_RANK: usize = 64;

/// What the header says of one tensor.
#[derive(serde::Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Reads and checks the header of `source`; the entries come in the order of their bytes.
pub(super) fn read_header(source: &Source) -> Result<Vec<TensorEntry>> {
    let refuse = |reason: String| Error::Checkpoint { path: source.path().to_owned(), reason };
    if source.len() < 8 {
        return Err(refuse(format!(
            "{} bytes: too short for a safetensors file, which starts with an 8-byte header length",
            source.len()
        )));
    }
    let mut length = [0; 8];
    source.read_at(0, &mut length)?;
    let header_len = u64::from_le_bytes(length);
    if header_len > MAX_HEADER_BYTES {
        return Err(refuse(format!(
            "header of {header_len} bytes, more than the format's {MAX_HEADER_BYTES}"
        )));
    }
    if header_len > source.len() - 8 {
        return Err(refuse(format!("header of {header_len} bytes in a file of {} bytes", source.len())));
    }
    let header = source.bytes_at(8, header_len as usize)?;
    let data_len = source.len() - 8 - header_len;
    parse_header(source.path(), &header, 8 + header_len, data_len)
}

/// Checks a header against the `data_len` bytes that follow it and start at `data_start` in the file.
fn parse_header(path: &Path, header: &[u8], data_start: u64, data_len: u64) -> Result<Vec<TensorEntry>> {
    let refuse = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let text =
        std::str::from_utf8(header).map_err(|error| refuse(format!("header is not UTF-8: {error}")))?;
    if !text.starts_with('{') {
        return Err(refuse("header does not start with {".into()));
    }
    let mut parser = serde_json::Deserializer::from_str(text);
    let infos =
        parser.deserialize_map(HeaderVisitor).and_then(|infos| parser.end().map(|()| infos)).map_err(
            |error| refuse(format!("header is not a safetensors header: {}", escape(&error.to_string()))),
        )?;

    let mut entries = Vec::with_capacity(infos.len());
    for (name, info) in infos {
        entries.push(check_info(path, name, info, data_start)?);
    }
    entries.sort_by_key(|entry| (entry.offset, entry.bytes));
    // Every byte belongs to exactly one tensor: no holes, no overlaps, nothing before, between or behind.
    let mut end = data_start;
    for entry in &entries {
        if entry.offset != end {
            let what = if entry.offset > end { "a hole of" } else { "an overlap of" };
            return Err(refuse(format!(
                "{what} {} bytes before tensor {}",
                entry.offset.abs_diff(end),
                escape(&entry.name)
            )));
        }
        end = entry.offset + entry.bytes;
    }
    if end != data_start + data_len {
        return Err(refuse(format!(
            "the header describes {} bytes of tensors, the file holds {data_len}: {}",
            end - data_start,
            if end > data_start + data_len { "truncated" } else { "trailing bytes" }
        )));
    }
    Ok(entries)
}

fn check_info(path: &Path, name: String, info: Info, data_start: u64) -> Result<TensorEntry> {
    let refuse = |reason: String| Error::Checkpoint {
        path: path.to_owned(),
        reason: format!("tensor {}: {reason}", escape(&name)),
    };
    let Some(dtype) = Dtype::from_safetensors(&info.dtype) else {
        let found = escape(&info.dtype);
        return Err(Error::UnsupportedDtype { path: path.to_owned(), tensor: escape(&name), found });
    };
    if info.shape.len() > MAX_RANK {
        return Err(refuse(format!("rank {}, more than {MAX_RANK}", info.shape.len())));
    }
    let bytes = info
        .shape
        .iter()
        .try_fold(1u64, |count, &dim| count.checked_mul(dim))
        .and_then(|count| count.checked_mul(dtype.size() as u64))
        .ok_or_else(|| refuse(format!("the size of shape {:?} overflows 64 bits", info.shape)))?;
    let (begin, end) = info.data_offsets;
    if end < begin {
        return Err(refuse(format!("data_offsets [{begin}, {end}] are reversed")));
    }
    if end - begin != bytes {
        return Err(refuse(format!(
            "shape {:?} of {dtype} takes {bytes} bytes, data_offsets [{begin}, {end}] span {}",
            info.shape,
            end - begin
        )));
    }
    // Offsets near 2^64 must not wrap into the file.
    let offset = data_start
        .checked_add(begin)
        .filter(|offset| offset.checked_add(bytes).is_some())
        .ok_or_else(|| refuse(format!("data_offsets [{begin}, {end}] overflow 64 bits")))?;
    let shape = info.shape.iter().map(|&dim| usize::try_from(dim));
    let shape = shape.collect::<Result<_, _>>().map_err(|_| refuse("a dimension exceeds usize".into()))?;
    Ok(TensorEntry { name, dtype, shape, offset, bytes })
}

/// Collects the header's pairs in file order, duplicates included; the caller compares names across files anyway.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Vec<(String, Info)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensor names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut infos = Vec::new();
        let mut seen_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut seen_metadata, true) {
                    return Err(de::Error::custom("__metadata__ stands there twice"));
                }
                // Nothing in it changes the weights; only its form is checked.
                map.next_value::<std::collections::HashMap<String, String>>()?;
            } else {
                infos.push((name, map.next_value()?));
            }
        }
        Ok(infos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::borrow::Cow;

    fn read(bytes: Vec<u8>) -> Result<Vec<TensorEntry>> {
        read_header(&Source::from_bytes(Path::new("memory"), Cow::Owned(bytes)))
    }

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn tensor() -> impl Strategy<Value = (Dtype, Vec<usize>)> {
        let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
        (dtype, proptest::collection::vec(0usize..5, 0..4))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// What the reference crate writes, we read: names, types, shapes and the very bytes.
        #[test]
        fn reads_what_the_reference_crate_writes(
            tensors in proptest::collection::btree_map("[ -~\u{e9}\u{4e2d}\n\"]{1,12}", tensor(), 0..8)
        ) {
            let made: Vec<_> = tensors.iter().enumerate().map(|(i, (name, (dtype, shape)))| {
                let len = shape.iter().product::<usize>() * dtype.size();
                (name.clone(), *dtype, shape.clone(), vec![i as u8 + 1; len])
            }).collect();
            let views = made.iter().map(|(name, dtype, shape, data)| {
                let dtype = match dtype {
                    Dtype::F32 => ::safetensors::Dtype::F32,
                    Dtype::F16 => ::safetensors::Dtype::F16,
                    Dtype::Bf16 => ::safetensors::Dtype::BF16,
                };
                (name, ::safetensors::tensor::TensorView::new(dtype, shape.clone(), data).unwrap())
            });
            let bytes = ::safetensors::serialize(views, None).unwrap();
            let entries = read(bytes.clone()).unwrap();
            prop_assert_eq!(entries.len(), made.len());
            for (name, dtype, shape, data) in made {
                let entry = entries.iter().find(|entry| entry.name == name).unwrap();
                prop_assert_eq!(entry.dtype, dtype);
                prop_assert_eq!(&entry.shape, &shape);
                prop_assert_eq!(&bytes[entry.offset as usize..][..entry.bytes as usize], &data[..]);
            }
        }

        /// One changed byte of the header never panics, and whatever we accept the reference accepts too.
        #[test]
        fn accepts_no_more_than_the_reference_crate(at in 0usize..150, value in any::<u8>()) {
            let header = r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#;
            let mut bytes = file(header, &[0; 32]);
            let at = at % bytes.len();
            bytes[at] = value;
            if super::super::Checkpoint::from_bytes("memory", bytes.clone()).is_ok() {
                prop_assert!(::safetensors::SafeTensors::deserialize(&bytes).is_ok());
            }
        }
    }

    #[test]
    fn metadata_must_be_strings_and_single() {
        let tensor = r#""a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}"#;
        assert!(read(file(&format!(r#"{{"__metadata__":{{"format":"pt"}},{tensor}}}"#), &[0; 4])).is_ok());
        assert!(read(file(&format!(r#"{{"__metadata__":{{"format":1}},{tensor}}}"#), &[0; 4])).is_err());
        let twice = format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},{tensor}}}"#);
        assert!(read(file(&twice, &[0; 4])).is_err());
    }

    #[test]
    fn trailing_spaces_pad_a_header() {
        let header = r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   "#;
        assert!(read(file(header, &[0; 4])).is_ok());
    }
}
