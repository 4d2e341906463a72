//! Files that a command writes: their names, checked before the work begins.

use anyhow::Result;
use std::path::{Path, PathBuf};
use warpstep::image::check_destination;

/// Says before the work, not after it, that the file could not be written.
pub fn check_output(path: &Path) -> Result<()> {
    Ok(check_destination(path)?)
}

/// `out.png` for one image, `out-3.png` for the fourth of several.
pub fn numbered(path: &Path, index: usize, count: usize) -> PathBuf {
    if count <= 1 {
        return path.to_path_buf();
    }
    with_number(path, index)
}

/// `out-3.png`.
pub fn with_number(path: &Path, index: usize) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or_else(|| "png".into(), |e| e.to_string_lossy());
    path.with_file_name(format!("{stem}-{index}.{extension}"))
}
