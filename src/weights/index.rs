//! `model.safetensors.index.json`: which shard holds which tensor. Shard names come from somebody else's file, so
//! they may name nothing but plain files of the model directory (or the blobs of the hub cache it lies in).

use super::Checkpoint;
use super::source::{escape, read_text};
use crate::error::{Error, Result};
use serde::de::{MapAccess, Visitor};
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

/// The same limit as for a safetensors header: an index describes the same tensors.
const MAX_INDEX_BYTES: u64 = 100_000_000;
/// Shards are mapped at once; released models have a few dozen.
const MAX_SHARDS: usize = 4096;

#[derive(serde::Deserialize)]
struct IndexFile {
    #[serde(default)]
    metadata: Metadata,
    weight_map: WeightMap,
}

#[derive(Default, serde::Deserialize)]
struct Metadata {
    /// Bytes of all tensors. A float in files of older writers.
    total_size: Option<f64>,
}

/// (tensor, shard) pairs as written, so that a repeated tensor is seen.
struct WeightMap(Vec<(String, String)>);

impl<'de> serde::Deserialize<'de> for WeightMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object from tensor names to file names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// A parsed index whose shard names are plain file names.
pub(super) struct Index {
    path: PathBuf,
    total_size: Option<f64>,
    /// Sorted by tensor name; no name twice.
    weight_map: Vec<(String, String)>,
}

impl Index {
    pub(super) fn read(path: &Path) -> Result<Index> {
        let refuse = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
        let file: IndexFile = serde_json::from_str(&read_text(path, MAX_INDEX_BYTES)?)
            .map_err(|error| refuse(format!("not a safetensors index: {}", escape(&error.to_string()))))?;
        let WeightMap(mut weight_map) = file.weight_map;
        if weight_map.is_empty() {
            return Err(refuse("weight_map is empty".into()));
        }
        weight_map.sort();
        if let Some(pair) = weight_map.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(refuse(format!("weight_map names tensor {} twice", escape(&pair[0].0))));
        }
        for (_, shard) in &weight_map {
            let mut parts = Path::new(shard).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || shard.contains(|c: char| c.is_control() || c == '/') {
                return Err(refuse(format!(
                    "weight_map names the file {:?}; only plain file names inside the model directory are allowed",
                    escape(shard)
                )));
            }
        }
        Ok(Index { path: path.to_owned(), total_size: file.metadata.total_size, weight_map })
    }

    /// The shards' paths in `dir`, each once. A symbolic link must stay inside the directory, or inside the blobs
    /// of the hub cache that the directory is a snapshot of.
    pub(super) fn shard_paths(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let refuse = |reason: String| Error::Checkpoint { path: self.path.clone(), reason };
        let shards: BTreeSet<&str> = self.weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
        if shards.len() > MAX_SHARDS {
            return Err(refuse(format!("{} shards, more than {MAX_SHARDS}", shards.len())));
        }
        let roots = allowed_roots(dir)?;
        let mut paths = Vec::with_capacity(shards.len());
        for shard in shards {
            let path = dir.join(shard);
            let real = match path.canonicalize() {
                Ok(real) => real,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(refuse(format!("shard {} is missing in {}", escape(shard), dir.display())));
                }
                Err(error) => return Err(Error::Io { path, cause: error }),
            };
            if !roots.iter().any(|root| real.starts_with(root)) {
                return Err(refuse(format!(
                    "shard {} is a symbolic link that leaves {}; pass the directory that holds the files",
                    escape(shard),
                    dir.display()
                )));
            }
            paths.push(path);
        }
        Ok(paths)
    }

    /// Index and shards must tell the same story: the same tensors in the same files, of the stated total size.
    pub(super) fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        for (tensor, shard) in &self.weight_map {
            let path = checkpoint.path.join(shard);
            let found = checkpoint.position(tensor).map(|index| checkpoint.file_of(index));
            if found != Some(path.as_path()) {
                return Err(Error::MissingTensor { path, tensor: escape(tensor) });
            }
        }
        // Every listed tensor is there, so anything more is unlisted.
        if checkpoint.len() != self.weight_map.len() {
            let listed =
                |name: &str| self.weight_map.binary_search_by(|(tensor, _)| tensor.as_str().cmp(name));
            let extra = checkpoint.tensors.iter().position(|tensor| listed(&tensor.name).is_err());
            if let Some(index) = extra {
                return Err(Error::UnexpectedTensor {
                    path: checkpoint.file_of(index).to_owned(),
                    tensor: format!("{} (not in the index)", escape(&checkpoint.tensors[index].name)),
                });
            }
        }
        let bytes: u64 = checkpoint.tensors().map(|tensor| tensor.byte_len() as u64).sum();
        match self.total_size {
            Some(total_size) if total_size != bytes as f64 => Err(Error::Checkpoint {
                path: self.path.clone(),
                reason: format!(
                    "metadata.total_size is {total_size}, the shards hold {bytes} bytes of tensors"
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// Where the files of a model directory may really lie: inside it, or, for a snapshot of the hub cache
/// (`models--ORG--NAME/snapshots/COMMIT/file -> ../../blobs/HASH`), in that repository's `blobs`.
fn allowed_roots(dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = dir.canonicalize().map_err(Error::io(dir))?;
    let snapshots = dir.ancestors().find(|path| path.file_name().is_some_and(|name| name == "snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|repository| repository.join("blobs"));
    let blobs = blobs.filter(|blobs| blobs.is_dir());
    Ok([Some(dir.clone()), blobs].into_iter().flatten().collect())
}
