//! Files that are either whole or not there.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Tells the temporary files of one process apart.
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Lets `write` fill a temporary file in the destination's directory, flushes it to the disk and renames it. On any
/// error the destination is untouched and the temporary file is gone. A symbolic link is written through. A directory,
/// device or pipe is refused, because the rename would replace it, and so is a file that could not be written.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let destination = destination(path).map_err(Error::io(path))?;
    let (mut temporary, file) = create_beside(&destination).map_err(Error::io(path))?;
    let mut out = BufWriter::new(file);
    write(&mut out)?;
    let publish = |mut out: BufWriter<File>| {
        out.flush()?;
        out.get_ref().sync_all()?;
        fs::rename(&temporary.path, &destination)
    };
    publish(out).map_err(Error::io(path))?;
    temporary.renamed = true;
    // The rename itself survives a power cut only once the directory is flushed; not every file system can do that.
    if let Ok(directory) = File::open(directory_of(&destination)) {
        let _ = directory.sync_all();
    }
    Ok(())
}

/// Says before long work that the file could not be written after it: makes a temporary file where the writing would
/// make one, and removes it. What is there already is not touched.
pub fn check_destination(path: &Path) -> Result<()> {
    let check = || create_beside(&destination(path)?).map(drop);
    check().map_err(Error::io(path))
}

/// Where the file is to appear, links resolved.
fn destination(path: &Path) -> io::Result<PathBuf> {
    if path.file_name().is_none() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "names no file"));
    }
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(io::Error::new(ErrorKind::IsADirectory, "names a directory, expected a file name"));
    }
    let is_link = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
    let destination = if is_link { fs::canonicalize(path)? } else { path.to_path_buf() };
    match fs::metadata(&destination) {
        Ok(metadata) if metadata.is_dir() => {
            Err(io::Error::new(ErrorKind::IsADirectory, "is a directory, expected a file name"))
        }
        Ok(metadata) if !metadata.is_file() => {
            Err(io::Error::new(ErrorKind::InvalidInput, "is no regular file and is not replaced"))
        }
        // The rename asks the directory alone. Whoever took away the right to write meant it to stay, root or not.
        Ok(metadata) if metadata.permissions().readonly() => {
            Err(io::Error::new(ErrorKind::PermissionDenied, "is write-protected and is not replaced"))
        }
        Ok(_) => OpenOptions::new().write(true).open(&destination).map(|_| destination),
        _ => Ok(destination),
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn create_beside(destination: &Path) -> io::Result<(Temporary, File)> {
    let directory = directory_of(destination);
    loop {
        // Short whatever the destination's name is: that one may be as long as the file system allows.
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!(".warpstep-{}-{number}.tmp", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((Temporary { path, renamed: false }, file)),
            // Left by a process of the same id that was killed.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            Err(e) => {
                let reason = format!("cannot write into directory {}: {e}", directory.display());
                return Err(io::Error::new(e.kind(), reason));
            }
        }
    }
}

/// Removes the file when dropped, unless it has become the destination.
struct Temporary {
    path: PathBuf,
    renamed: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // Nobody to tell: the error that led here is already on its way.
            let _ = fs::remove_file(&self.path);
        }
    }
}
