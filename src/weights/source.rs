//! The bytes of one checkpoint file: a memory map, an open file that is read piece by piece, or bytes that were
//! linked into the binary. Owns the rules for opening files that somebody else made: only regular files, no
//! reading before the length is known, no trust in a file that shrinks.

use crate::error::{Error, Result};
use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How checkpoint files are brought into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Map files instead of reading them (the default). Tensors are then views of the page cache, at no cost, but
    /// a file that another process truncates while it is mapped kills this process (SIGBUS) on Linux. Without it
    /// tensors are read in pieces when they are converted, and a file that shrinks is an ordinary error.
    pub mmap: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { mmap: true }
    }
}

/// One opened file.
pub(super) struct Source {
    path: PathBuf,
    len: u64,
    bytes: SourceBytes,
}

enum SourceBytes {
    Mapped(memmap2::Mmap),
    File(File),
    Memory(Cow<'static, [u8]>),
}

impl Source {
    /// Opens a regular file. Directories, FIFOs and devices are refused before anything is read from them.
    pub(super) fn open(path: &Path, options: OpenOptions) -> Result<Source> {
        let file = open_regular(path)?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let bytes = if options.mmap && len > 0 {
            // SAFETY: the map is read-only and private to this Source. That the file must not be truncated while
            // it is mapped is the documented condition of `OpenOptions::mmap`.
            SourceBytes::Mapped(unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?)
        } else {
            SourceBytes::File(file)
        };
        Ok(Source { path: path.to_owned(), len, bytes })
    }

    /// Wraps bytes already in memory; `path` is what errors call them.
    pub(super) fn from_bytes(path: &Path, bytes: Cow<'static, [u8]>) -> Source {
        Source { path: path.to_owned(), len: bytes.len() as u64, bytes: SourceBytes::Memory(bytes) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// All bytes, if they are addressable without reading.
    fn memory(&self) -> Option<&[u8]> {
        match &self.bytes {
            SourceBytes::Mapped(map) => Some(map),
            SourceBytes::Memory(bytes) => Some(bytes),
            SourceBytes::File(_) => None,
        }
    }

    fn past_the_end(&self, offset: u64, len: usize) -> Error {
        Error::Checkpoint {
            path: self.path.clone(),
            reason: format!(
                "{len} bytes at offset {offset} reach past the end of the file ({} bytes)",
                self.len
            ),
        }
    }

    /// `len` bytes from `offset`: borrowed when mapped or in memory, read otherwise.
    pub(super) fn bytes_at(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>> {
        // Checked before the allocation below, so that a hostile length costs nothing.
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(self.past_the_end(offset, len));
        }
        if let Some(memory) = self.memory() {
            let view = memory.get(offset as usize..).and_then(|tail| tail.get(..len));
            return view.map(Cow::Borrowed).ok_or_else(|| self.past_the_end(offset, len));
        }
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
            what: format!("a piece of {}", self.path.display()),
            requested_bytes: len as u64,
            free_bytes: 0,
        })?;
        buffer.resize(len, 0);
        self.read_at(offset, &mut buffer)?;
        Ok(Cow::Owned(buffer))
    }

    /// Fills `out` from `offset`.
    pub(super) fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if let SourceBytes::File(file) = &self.bytes {
            return file.read_exact_at(out, offset).map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => self.past_the_end(offset, out.len()),
                _ => Error::Io { path: self.path.clone(), cause: error },
            });
        }
        out.copy_from_slice(&self.bytes_at(offset, out.len())?);
        Ok(())
    }

    /// A sequential reader over the whole file.
    pub(super) fn reader(&self) -> SourceReader<'_> {
        SourceReader { source: self, position: 0 }
    }
}

/// `Read + Seek` over a [`Source`], for parsers that want a stream.
pub(super) struct SourceReader<'a> {
    source: &'a Source,
    position: u64,
}

impl Read for SourceReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let left = self.source.len.saturating_sub(self.position);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(out.len());
        self.source.read_at(self.position, &mut out[..count]).map_err(std::io::Error::other)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for SourceReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.source.len.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position =
            position.ok_or_else(|| std::io::Error::other("seek before the start or past 2^64"))?;
        Ok(self.position)
    }
}

/// Opens `path` if it is a regular file.
fn open_regular(path: &Path) -> Result<File> {
    // The kind is looked at before opening, because opening a FIFO waits for a writer, and again afterwards,
    // because the name may have been pointed elsewhere in between.
    check_regular(path, &std::fs::metadata(path).map_err(Error::io(path))?)?;
    let file = File::open(path).map_err(Error::io(path))?;
    check_regular(path, &file.metadata().map_err(Error::io(path))?)?;
    Ok(file)
}

fn check_regular(path: &Path, metadata: &std::fs::Metadata) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    let found = if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "not a regular file"
    };
    Err(Error::Checkpoint {
        path: path.to_owned(),
        reason: format!("expected a regular file, found {found}"),
    })
}

/// Reads a small text file (configs, indexes) of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    let file = open_regular(path)?;
    let refuse = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let len = file.metadata().map_err(Error::io(path))?.len();
    if len > limit {
        return Err(refuse(format!("{len} bytes, more than the limit of {limit} for this kind of file")));
    }
    let mut bytes = Vec::new();
    // `take`, because the file may grow between the check and the read.
    file.take(limit).read_to_end(&mut bytes).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|error| refuse(format!("not UTF-8: {}", error.utf8_error())))
}

/// A name from a file, made safe to print: control characters escaped, long names cut.
pub(crate) fn escape(name: &str) -> String {
    const MAX_CHARS: usize = 200;
    let mut shown: String = name.chars().take(MAX_CHARS).flat_map(escape_char).collect();
    let count = name.chars().count();
    if count > MAX_CHARS {
        shown.push_str(&format!("... ({count} characters)"));
    }
    shown
}

/// Escapes what could move a terminal's cursor or hide text: controls, and everything outside ASCII that
/// `escape_debug` calls unprintable (bidirectional overrides among them). Quotes stay as they are.
fn escape_char(c: char) -> impl Iterator<Item = char> {
    let (plain, escaped) = match c {
        '\'' | '"' => (Some(c), None),
        _ => (None, Some(c.escape_debug())),
    };
    plain.into_iter().chain(escaped.into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_cut() {
        assert_eq!(escape("layers.0.norm.weight"), "layers.0.norm.weight");
        assert_eq!(escape("a\nb\u{1b}[31m\0\u{202e}"), "a\\nb\\u{1b}[31m\\0\\u{202e}");
        let long = escape(&"x".repeat(1_000_000));
        assert_eq!(long, format!("{}... (1000000 characters)", "x".repeat(200)));
    }

    #[test]
    fn both_ways_of_opening_give_the_same_bytes() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("tempdir"))?;
        let path = dir.path().join("file");
        std::fs::write(&path, b"0123456789").map_err(Error::io(&path))?;
        for mmap in [true, false] {
            let source = Source::open(&path, OpenOptions { mmap })?;
            assert_eq!(&*source.bytes_at(3, 4)?, b"3456", "mmap {mmap}");
            assert_eq!(&*source.bytes_at(10, 0)?, b"");
            for (offset, len) in [(7, 4), (11, 0), (u64::MAX, 1), (0, usize::MAX)] {
                let error = source.bytes_at(offset, len).unwrap_err();
                assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
            }
            let mut text = String::new();
            source.reader().read_to_string(&mut text).map_err(Error::io(&path))?;
            assert_eq!(text, "0123456789");
        }
        Ok(())
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_when_it_is_read() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("tempdir"))?;
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; 4096]).map_err(Error::io(&path))?;
        let source = Source::open(&path, OpenOptions { mmap: false })?;
        File::options().write(true).open(&path).and_then(|f| f.set_len(100)).map_err(Error::io(&path))?;
        assert!(matches!(source.bytes_at(0, 4096), Err(Error::Checkpoint { .. })));
        // Unlinking is harmless: the open file keeps its bytes.
        std::fs::remove_file(&path).map_err(Error::io(&path))?;
        assert_eq!(&*source.bytes_at(0, 100)?, &[7; 100]);
        Ok(())
    }

    #[test]
    fn text_files_are_bounded() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("tempdir"))?;
        let path = dir.path().join("text");
        std::fs::write(&path, b"four").map_err(Error::io(&path))?;
        assert_eq!(read_text(&path, 4)?, "four");
        assert!(matches!(read_text(&path, 3), Err(Error::Checkpoint { .. })));
        std::fs::write(&path, b"\xff\xfe").map_err(Error::io(&path))?;
        assert!(matches!(read_text(&path, 100), Err(Error::Checkpoint { .. })));
        Ok(())
    }
}
