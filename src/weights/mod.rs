//! Checkpoints: files of named tensors, checked before they are believed, viewed without copies.
//!
//! [`Checkpoint`] knows files (safetensors, sharded or not, and torch's `checkpoint.pt`); [`ModelWeights`] and
//! [`VaeWeights`] know which tensors a config asks for; [`convert`] turns what is stored into what kernels want.
//! Everything here treats the files as written by an adversary: sizes are checked arithmetic, names are escaped
//! before they are printed, and nothing is executed. No device code.

pub mod convert;
mod index;
mod names;
pub mod pack;
mod pickle;
mod safetensors;
mod slots;
mod source;
mod summary;
mod torch_zip;
mod vae_names;

pub use names::{ModelWeights, model_tensors};
pub use slots::{Part, TensorSpec};
pub use source::OpenOptions;
pub(crate) use source::{escape, read_text};
pub use summary::{CheckpointSummary, ModelSummary, describe};
pub use vae_names::{VaeWeights, vae_tensors};

use crate::error::{Error, Result};
use source::Source;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// Element type of a stored tensor: the three that checkpoints of this model use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    fn from_safetensors(name: &str) -> Option<Dtype> {
        match name {
            "F32" => Some(Dtype::F32),
            "F16" => Some(Dtype::F16),
            "BF16" => Some(Dtype::Bf16),
            _ => None,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        })
    }
}

/// One tensor's place in a file, with sizes that were checked against the file.
struct TensorEntry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    /// First byte, from the start of the file.
    offset: u64,
    /// Length: the product of `shape` times the element size.
    bytes: u64,
}

/// The opened files of one model or one VAE.
pub struct Checkpoint {
    /// What the user named: the directory, or the file.
    path: PathBuf,
    files: Vec<Source>,
    /// Every tensor of every file, sorted by name; no name twice.
    tensors: Vec<StoredTensor>,
}

struct StoredTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Index into `Checkpoint::files`.
    file: usize,
    data: StoredData,
}

enum StoredData {
    /// Contiguous, row-major bytes of the file.
    InFile { offset: u64, bytes: u64 },
    /// Gathered from a strided tensor of a `.pt` file while it was opened.
    Gathered(Vec<u8>),
}

/// One tensor, borrowed from its checkpoint.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    data: ViewData<'a>,
}

#[derive(Clone, Copy)]
enum ViewData<'a> {
    InFile { source: &'a Source, offset: u64, bytes: u64 },
    Memory { path: &'a Path, bytes: &'a [u8] },
}

impl<'a> TensorView<'a> {
    /// Canonical (official) name for tensors of [`ModelWeights`] and [`VaeWeights`], the stored name otherwise.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Stored element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.byte_len() / self.dtype.size()
    }

    /// Number of stored bytes.
    pub fn byte_len(&self) -> usize {
        match self.data {
            // Lossless: it was checked against the length of a file, and this crate is for 64-bit hosts.
            ViewData::InFile { bytes, .. } => bytes as usize,
            ViewData::Memory { bytes, .. } => bytes.len(),
        }
    }

    /// The file that holds the tensor.
    pub fn file(&self) -> &'a Path {
        match self.data {
            ViewData::InFile { source, .. } => source.path(),
            ViewData::Memory { path, .. } => path,
        }
    }

    /// All bytes, row-major, little endian, at any alignment. Borrowed when the file is mapped; otherwise read
    /// into a new buffer, so prefer [`convert::write_range_as`] for large tensors.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>> {
        self.bytes_at(0, self.byte_len())
    }

    fn check_range(&self, start: usize, len: usize) -> Result<()> {
        if start.checked_add(len).is_none_or(|end| end > self.byte_len()) {
            let (name, all) = (escape(self.name), self.byte_len());
            return Err(Error::Internal(format!("{len} bytes from {start} of {name}, which has {all}")));
        }
        Ok(())
    }

    /// Copies the bytes from byte `start` of the tensor into `out`, without a buffer in between.
    fn read_at(&self, start: usize, out: &mut [u8]) -> Result<()> {
        self.check_range(start, out.len())?;
        match self.data {
            ViewData::InFile { source, offset, .. } => source.read_at(offset + start as u64, out)?,
            ViewData::Memory { bytes, .. } => out.copy_from_slice(&bytes[start..start + out.len()]),
        }
        Ok(())
    }

    /// `len` bytes from byte `start` of the tensor.
    pub(crate) fn bytes_at(&self, start: usize, len: usize) -> Result<Cow<'a, [u8]>> {
        self.check_range(start, len)?;
        match self.data {
            ViewData::InFile { source, offset, .. } => source.bytes_at(offset + start as u64, len),
            ViewData::Memory { bytes, .. } => Ok(Cow::Borrowed(&bytes[start..start + len])),
        }
    }
}

impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?}", escape(self.name), self.dtype, self.shape)
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} files, {} tensors)", self.path.display(), self.files.len(), self.tensors.len())
    }
}

/// The single files that a directory may hold its tensors in, in the order of preference. `checkpoint.pt` comes
/// first because the official VAE code reads nothing else.
const SINGLE_FILES: [&str; 3] = ["checkpoint.pt", "model.safetensors", "diffusion_pytorch_model.safetensors"];
const INDEX_FILE: &str = "model.safetensors.index.json";

impl Checkpoint {
    /// Opens the checkpoint of a directory (one of `checkpoint.pt`, `model.safetensors`,
    /// `diffusion_pytorch_model.safetensors`, or the shards of `model.safetensors.index.json`) or of a single
    /// `.safetensors` or `.pt` file.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Checkpoint> {
        let path = path.as_ref();
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            return Self::open_file(path, path, options);
        }
        if let Some(file) = SINGLE_FILES.iter().map(|name| path.join(name)).find(|file| file.exists()) {
            return Self::open_file(path, &file, options);
        }
        let index_path = path.join(INDEX_FILE);
        if !index_path.exists() {
            return Err(Error::Checkpoint {
                path: path.to_owned(),
                reason: format!("no weights here: looked for {} and {INDEX_FILE}", SINGLE_FILES.join(", ")),
            });
        }
        let index = index::Index::read(&index_path)?;
        let mut checkpoint = Checkpoint { path: path.to_owned(), files: Vec::new(), tensors: Vec::new() };
        for shard in index.shard_paths(path)? {
            checkpoint.add_safetensors(Source::open(&shard, options)?)?;
        }
        checkpoint.sort_and_check_names()?;
        index.check(&checkpoint)?;
        Ok(checkpoint)
    }

    /// A safetensors file that is already in memory, such as the embedded demo model. `name` is what errors call it.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Checkpoint> {
        let path = PathBuf::from(name);
        let mut checkpoint = Checkpoint { path: path.clone(), files: Vec::new(), tensors: Vec::new() };
        checkpoint.add_safetensors(Source::from_bytes(&path, bytes.into()))?;
        checkpoint.sort_and_check_names()?;
        Ok(checkpoint)
    }

    /// Tensors that are nothing but names and shapes: reading one is an error. For models whose values are made on the
    /// device.
    pub(crate) fn of_shapes(specs: &[TensorSpec]) -> Result<Checkpoint> {
        let path = PathBuf::from("<shapes>");
        let empty = Source::from_bytes(&path, Cow::Borrowed(&[]));
        let mut checkpoint = Checkpoint { path, files: vec![empty], tensors: Vec::new() };
        for spec in specs {
            let elements = spec.shape.iter().try_fold(2u64, |product, &dim| product.checked_mul(dim as u64));
            let too_large = || Error::Internal(format!("size of {} overflows", spec.name));
            checkpoint.tensors.push(StoredTensor {
                name: spec.name.clone(),
                dtype: Dtype::Bf16,
                shape: spec.shape.clone(),
                file: 0,
                data: StoredData::InFile { offset: 0, bytes: elements.ok_or_else(too_large)? },
            });
        }
        checkpoint.sort_and_check_names()?;
        Ok(checkpoint)
    }

    fn open_file(path: &Path, file: &Path, options: OpenOptions) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { path: path.to_owned(), files: Vec::new(), tensors: Vec::new() };
        let source = Source::open(file, options)?;
        if file.extension().is_some_and(|extension| extension == "pt") {
            checkpoint.tensors = torch_zip::read_tensors(&source)?;
            checkpoint.files.push(source);
        } else {
            checkpoint.add_safetensors(source)?;
        }
        checkpoint.sort_and_check_names()?;
        Ok(checkpoint)
    }

    fn add_safetensors(&mut self, source: Source) -> Result<()> {
        let file = self.files.len();
        self.tensors.extend(safetensors::read_header(&source)?.into_iter().map(|entry| {
            let data = StoredData::InFile { offset: entry.offset, bytes: entry.bytes };
            StoredTensor { name: entry.name, dtype: entry.dtype, shape: entry.shape, file, data }
        }));
        self.files.push(source);
        Ok(())
    }

    /// Sorts by name for lookups; the same name twice, in one file or in two, is an error, because nothing says
    /// which of the two is meant.
    fn sort_and_check_names(&mut self) -> Result<()> {
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        for pair in self.tensors.windows(2) {
            if pair[0].name == pair[1].name {
                return Err(Error::DuplicateTensor {
                    tensor: escape(&pair[0].name),
                    first: self.files[pair[0].file].path().to_owned(),
                    second: self.files[pair[1].file].path().to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The directory or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(Source::path)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Every tensor, sorted by stored name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        (0..self.tensors.len()).map(|index| self.view(index))
    }

    /// The tensor stored under exactly this name.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>> {
        let index = self.position(name).ok_or_else(|| self.missing(name))?;
        Ok(self.view(index))
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    fn missing(&self, name: &str) -> Error {
        Error::MissingTensor { path: self.path.clone(), tensor: escape(name) }
    }

    fn view(&self, index: usize) -> TensorView<'_> {
        let tensor = &self.tensors[index];
        let source = &self.files[tensor.file];
        let data = match &tensor.data {
            StoredData::InFile { offset, bytes } => {
                ViewData::InFile { source, offset: *offset, bytes: *bytes }
            }
            StoredData::Gathered(bytes) => ViewData::Memory { path: source.path(), bytes },
        };
        TensorView { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape, data }
    }

    /// The file that holds tensor `index`.
    fn file_of(&self, index: usize) -> &Path {
        self.files[self.tensors[index].file].path()
    }
}
