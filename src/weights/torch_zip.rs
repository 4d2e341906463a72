//! `checkpoint.pt` as `torch.save` writes it: an uncompressed zip archive with the pickled dictionary `data.pkl`
//! and one record `data/KEY` per storage. Contiguous tensors stay views of the file; strided ones are gathered.

use super::pickle::{PickledTensor, read_state_dict};
use super::source::{Source, escape};
use super::{Dtype, StoredData, StoredTensor};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::io::BufReader;
use zip::{CompressionMethod, ZipArchive};

/// A VAE's pickle is 30 KB; this is room for 100,000 tensors.
const MAX_PICKLE_BYTES: u64 = 16 << 20;
/// Above this the zip format needs extensions that torch does not use for checkpoints of this size.
const MAX_RECORDS: usize = 65_534;
/// All strided tensors of a file together: they are copied when the file is opened. The largest VAE has 335 MB.
const MAX_GATHERED_BYTES: u64 = 1 << 30;

/// One record of the archive: where its bytes lie in the file.
#[derive(Clone, Copy)]
struct Record {
    offset: u64,
    bytes: u64,
}

/// Reads the tensors of a `.pt` file, which becomes file 0 of its checkpoint.
pub(super) fn read_tensors(source: &Source) -> Result<Vec<StoredTensor>> {
    let refuse = |reason: String| Error::Checkpoint { path: source.path().to_owned(), reason };
    let records = read_directory(source)?;
    let mut pickles =
        records.iter().filter_map(|(name, &record)| Some((name.strip_suffix("data.pkl")?, record)));
    let (prefix, pickle) = match (pickles.next(), pickles.next()) {
        (Some(found), None) if found.0.is_empty() || found.0.ends_with('/') => found,
        _ => return Err(refuse("a torch archive has exactly one data.pkl, this one has not".into())),
    };
    if let Some(&order) = records.get(&format!("{prefix}byteorder")) {
        let order = read_record(source, order, 16)?;
        if &*order != b"little" {
            let order = escape(&String::from_utf8_lossy(&order));
            return Err(refuse(format!("written on a machine of byte order {order:?}, expected \"little\"")));
        }
    }
    let pickle = read_record(source, pickle, MAX_PICKLE_BYTES)?;
    let mut gathered = 0u64;
    let tensors = read_state_dict(&pickle).map_err(refuse)?.into_iter();
    tensors
        .map(|(name, tensor)| {
            let dtype = dtype_of(&tensor.storage_class).ok_or_else(|| Error::UnsupportedDtype {
                path: source.path().to_owned(),
                tensor: escape(&name),
                found: escape(&tensor.storage_class),
            })?;
            let refuse = |reason: String| refuse(format!("tensor {}: {reason}", escape(&name)));
            let Some(&record) = records.get(&format!("{prefix}data/{}", tensor.key)) else {
                return Err(refuse(format!(
                    "its storage data/{} is not in the archive",
                    escape(&tensor.key)
                )));
            };
            let layout = Layout::check(&tensor, dtype, record).map_err(refuse)?;
            let data = if layout.contiguous {
                StoredData::InFile { offset: record.offset + layout.start, bytes: layout.bytes }
            } else {
                gathered = gathered.saturating_add(layout.bytes);
                if gathered > MAX_GATHERED_BYTES {
                    return Err(refuse(format!("more than {MAX_GATHERED_BYTES} bytes of strided tensors")));
                }
                StoredData::Gathered(gather(source, &tensor, dtype, record, &layout)?)
            };
            Ok(StoredTensor { name, dtype, shape: layout.shape, file: 0, data })
        })
        .collect()
}

fn dtype_of(storage_class: &str) -> Option<Dtype> {
    match storage_class {
        "FloatStorage" => Some(Dtype::F32),
        "HalfStorage" => Some(Dtype::F16),
        "BFloat16Storage" => Some(Dtype::Bf16),
        _ => None,
    }
}

/// Reads the archive's directory. Every record must be stored plainly and lie inside the file.
fn read_directory(source: &Source) -> Result<HashMap<String, Record>> {
    let refuse = |reason: String| Error::Checkpoint { path: source.path().to_owned(), reason };
    let mut magic = [0; 4];
    source.read_at(0, &mut magic[..source.len().min(4) as usize])?;
    match magic {
        [b'P', b'K', 3, 4] => {}
        // PROTO 2: the pickle stream that torch wrote before version 1.6.
        [0x80, 2, ..] => {
            return Err(refuse(
                "this is torch's old pickle format; load it with torch and save it again, as safetensors or with \
                 torch.save of torch 1.6 or later"
                    .into(),
            ));
        }
        _ => return Err(refuse("neither a zip archive nor anything else that torch.save writes".into())),
    }
    let broken =
        |error: zip::result::ZipError| refuse(format!("zip archive: {}", escape(&error.to_string())));
    let mut archive = ZipArchive::new(BufReader::new(source.reader())).map_err(broken)?;
    // The zip crate keeps the last of two records of one name; the count at the end of the file gives them away.
    let stated = stated_records(source, archive.comment().len())?;
    if archive.len() > MAX_RECORDS || stated != archive.len() {
        return Err(refuse(format!("{stated} records of {} different names", archive.len())));
    }
    let mut records = HashMap::with_capacity(archive.len());
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index).map_err(broken)?;
        let name = file.name().to_owned();
        let bytes = file.size();
        let plain = file.compression() == CompressionMethod::Stored && !file.encrypted();
        if !plain || file.compressed_size() != bytes {
            return Err(refuse(format!(
                "record {} is compressed or encrypted; torch stores plainly",
                escape(&name)
            )));
        }
        let offset =
            file.data_start().ok_or_else(|| refuse(format!("record {} has no data", escape(&name))))?;
        if offset.checked_add(bytes).is_none_or(|end| end > source.len()) {
            return Err(refuse(format!(
                "record {}: {bytes} bytes at {offset} reach past the end of the file ({} bytes)",
                escape(&name),
                source.len()
            )));
        }
        records.insert(name, Record { offset, bytes });
    }
    Ok(records)
}

/// The record count in the end-of-directory block, which lies 22 bytes before the archive's comment.
fn stated_records(source: &Source, comment: usize) -> Result<usize> {
    let mut count = [0; 2];
    let end = source.len().checked_sub(22 + comment as u64);
    let end = end.ok_or_else(|| Error::Checkpoint {
        path: source.path().to_owned(),
        reason: "too short for a zip archive".into(),
    })?;
    source.read_at(end + 10, &mut count)?;
    Ok(u16::from_le_bytes(count).into())
}

fn read_record(source: &Source, record: Record, limit: u64) -> Result<std::borrow::Cow<'_, [u8]>> {
    if record.bytes > limit {
        let reason = format!("a record of {} bytes where at most {limit} are expected", record.bytes);
        return Err(Error::Checkpoint { path: source.path().to_owned(), reason });
    }
    source.bytes_at(record.offset, record.bytes as usize)
}

/// A tensor's window onto its storage record, checked to lie inside it.
struct Layout {
    shape: Vec<usize>,
    /// First byte, from the start of the record.
    start: u64,
    /// Bytes of the tensor itself.
    bytes: u64,
    contiguous: bool,
}

impl Layout {
    fn check(tensor: &PickledTensor, dtype: Dtype, record: Record) -> Result<Layout, String> {
        let PickledTensor { storage_elements, offset, shape, stride, .. } = tensor;
        let size = dtype.size() as u64;
        if storage_elements.checked_mul(size) != Some(record.bytes) {
            return Err(format!(
                "storage of {storage_elements} {dtype} in a record of {} bytes",
                record.bytes
            ));
        }
        if shape.len() != stride.len() {
            return Err(format!("{} sizes and {} strides", shape.len(), stride.len()));
        }
        let overflow =
            || format!("the extent of shape {shape:?}, strides {stride:?}, offset {offset} overflows");
        let elements =
            shape.iter().try_fold(1u64, |count, &dim| count.checked_mul(dim)).ok_or_else(overflow)?;
        // One past the last element that the window touches, in elements of the storage.
        let end = if elements == 0 {
            Some(*offset)
        } else {
            shape
                .iter()
                .zip(stride)
                .try_fold(offset.checked_add(1).ok_or_else(overflow)?, |end, (&dim, &stride)| {
                    end.checked_add((dim - 1).checked_mul(stride)?)
                })
        };
        let end = end.ok_or_else(overflow)?;
        if end > *storage_elements {
            return Err(format!(
                "shape {shape:?}, strides {stride:?}, offset {offset} reach element {end} of a storage of {storage_elements}"
            ));
        }
        let mut expected = 1;
        let contiguous = elements == 0
            || shape.iter().zip(stride).rev().all(|(&dim, &stride)| {
                let fits = dim == 1 || stride == expected;
                expected *= dim;
                fits
            });
        Ok(Layout {
            shape: shape
                .iter()
                .map(|&dim| usize::try_from(dim))
                .collect::<Result<_, _>>()
                .map_err(|_| overflow())?,
            start: offset * size,
            bytes: elements.checked_mul(size).ok_or_else(overflow)?,
            contiguous,
        })
    }
}

/// Copies a strided tensor into row-major order.
fn gather(
    source: &Source,
    tensor: &PickledTensor,
    dtype: Dtype,
    record: Record,
    layout: &Layout,
) -> Result<Vec<u8>> {
    let size = dtype.size();
    let storage = source.bytes_at(record.offset, record.bytes as usize)?;
    let mut out = Vec::with_capacity(layout.bytes as usize);
    let mut index = vec![0; layout.shape.len()];
    while out.len() < layout.bytes as usize {
        let element: u64 = tensor.offset
            + index.iter().zip(&tensor.stride).map(|(&i, &stride)| i as u64 * stride).sum::<u64>();
        let at = element as usize * size;
        out.extend_from_slice(&storage[at..at + size]);
        // The next index in row-major order: increment the last dimension, carry to the left.
        for (i, &dim) in index.iter_mut().zip(&layout.shape).rev() {
            *i += 1;
            if *i < dim {
                break;
            }
            *i = 0;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
