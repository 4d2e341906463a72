//! The one error type of the library: every failure is a value that says what was expected, what was found
//! and where. Nothing in the library panics on input, aborts, or prints.

use std::path::PathBuf;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "every variant's message names its fields")]
pub enum Error {
    /// A request field is outside what the engine (or the official code) defines.
    #[error("invalid request: {field}: {reason}")]
    InvalidRequest { field: &'static str, reason: String },
    /// A field of `config.json` (model or VAE) is missing, of the wrong kind or out of range.
    #[error("invalid config {}: {field}: {reason}", path.display())]
    InvalidConfig { path: PathBuf, field: String, reason: String },
    /// The tokenizer files cannot be used with this model.
    #[error("invalid tokenizer {}: {reason}", path.display())]
    Tokenizer { path: PathBuf, reason: String },
    /// A checkpoint file is malformed: header, offsets, index, pickle, duplicates.
    #[error("invalid checkpoint {}: {reason}", path.display())]
    Checkpoint { path: PathBuf, reason: String },
    /// The checkpoint has no tensor of this name.
    #[error("missing tensor {tensor} in {}", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    /// The checkpoint holds a tensor that this model does not have.
    #[error("unexpected tensor {tensor} in {}: the config describes no such part", path.display())]
    UnexpectedTensor { path: PathBuf, tensor: String },
    /// The same tensor stands in the checkpoint twice.
    #[error("duplicate tensor {tensor}: in {} and in {}", first.display(), second.display())]
    DuplicateTensor { tensor: String, first: PathBuf, second: PathBuf },
    /// A tensor's shape does not follow from the config.
    #[error("tensor {tensor} in {}: expected shape {expected:?}, found {found:?}", path.display())]
    ShapeMismatch { path: PathBuf, tensor: String, expected: Vec<usize>, found: Vec<usize> },
    /// A tensor's element type is not one that the loader converts.
    #[error("tensor {tensor} in {}: element type {found} is not one of f32, f16, bf16", path.display())]
    UnsupportedDtype { path: PathBuf, tensor: String, found: String },
    /// Device memory ran out, or a plan exceeds the budget.
    #[error("out of memory for {what}: needs {requested_bytes} bytes, {free_bytes} free")]
    OutOfMemory { what: String, requested_bytes: u64, free_bytes: u64 },
    /// An op was asked for something that no chosen variant does.
    #[error("op {op}, variant {variant}: {reason}")]
    Unsupported { op: &'static str, variant: String, reason: String },
    /// A kernel launch failed; on the emulated device `reason` is the emulator's report.
    #[error("launch of {kernel} failed: {reason}")]
    Launch { kernel: String, reason: String },
    /// The device failed outside a launch.
    #[error("device error: {0}")]
    Device(String),
    /// There is no CUDA device to open: no driver, no such device, too old a driver, another kind of GPU, or a build
    /// without GPU kernels.
    #[error("no CUDA device: {0}")]
    NoDevice(String),
    /// A call into the CUDA driver failed and left the device usable.
    #[error("{call} failed: CUDA error {code} ({reason})")]
    Driver { call: &'static str, code: i32, reason: String },
    /// The CUDA context is dead. Every call on the device fails from then on, in all sessions; the driver needs a new
    /// process to go on.
    #[error("device lost, CUDA error {code}; a new process is needed: {reason}")]
    DeviceLost { code: i32, reason: String },
    /// A sampled token is not finite.
    #[error("non-finite values in {stage} at token {token}")]
    NonFinite { stage: &'static str, token: usize },
    /// The VAE decoder made a value that is not finite; nothing of the picture can be relied on.
    #[error(
        "non-finite values from the VAE decoder, first in picture {picture} at row {row}, column {column}"
    )]
    NonFinitePixel { picture: usize, row: usize, column: usize },
    /// The blocks of a persistent kernel waited in vain for each other's values; the token is useless.
    #[error(
        "op {op}: blocks waited in vain for each other at image token {token}, so some of them never ran or stopped"
    )]
    Stalled { op: &'static str, token: usize },
    /// The caller asked to stop.
    #[error("cancelled after {tokens} tokens")]
    Cancelled { tokens: usize },
    /// The caller asked to stop loading. Nothing of the model is left on the device.
    #[error("loading was cancelled after {done_bytes} of {of_bytes} bytes")]
    LoadCancelled { done_bytes: u64, of_bytes: u64 },
    /// The caller's callback panicked. The panic goes no further: what the generation or the load held is freed, and
    /// engine and session are as good as new.
    #[error("the callback panicked: {message}")]
    CallbackPanicked { message: String },
    /// A recorded case for `verify` is malformed.
    #[error("invalid case {}: {reason}", path.display())]
    InvalidCase { path: PathBuf, reason: String },
    /// An image could not be read or written.
    #[error("image {}: {reason}", path.display())]
    Image { path: PathBuf, reason: String },
    /// A file of image tokens is malformed, or of another kind of model.
    #[error("image tokens {}: {reason}", path.display())]
    Tokens { path: PathBuf, reason: String },
    /// A file could not be opened, read or written.
    ///
    /// The message holds its cause; a field named `source` would have whoever prints a chain of errors print it twice.
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: std::io::Error },
    /// A mistake of ours: an invariant of the library does not hold.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// Wraps an I/O error with the path it happened on.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |cause| Error::Io { path, cause }
    }

    /// An [`Error::InvalidRequest`].
    pub fn request(field: &'static str, reason: impl Into<String>) -> Error {
        Error::InvalidRequest { field, reason: reason.into() }
    }
}
