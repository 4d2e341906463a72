//! Files that a command writes: their names, checked before the work begins.

use anyhow::Result;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::canonicalize;
use std::path::{Path, PathBuf};
use warpstep::Error;
use warpstep::files::check_destination;

/// Endings of pictures that are not PNG files: other programs would believe them.
const OTHER_PICTURES: [&str; 8] = ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif"];

/// The files that a command will write, each with the option that names it.
#[derive(Default)]
pub struct OutputFiles(Vec<(&'static str, PathBuf)>);

impl OutputFiles {
    /// Adds files.
    pub fn add<'a>(&mut self, option: &'static str, paths: impl IntoIterator<Item = &'a PathBuf>) {
        self.0.extend(paths.into_iter().map(|path| (option, path.clone())));
    }

    /// Says before the work, not after it, that a file could not be written, or would take the place of another one: of
    /// those that are written too, or of those `read` along the way; or would not be what its name says.
    pub fn check<'a>(&self, read: impl IntoIterator<Item = &'a PathBuf>) -> Result<()> {
        let mut taken: HashMap<PathBuf, &str> = HashMap::new();
        for path in read {
            // Whoever reads it says what is wrong with it.
            if let Ok(path) = canonicalize(path) {
                taken.insert(path, "is read by this command too");
            }
        }
        for (option, path) in &self.0 {
            let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
            if OTHER_PICTURES.contains(&&*ending) {
                let reason = format!("{}: pictures are written as PNG, and as nothing else", path.display());
                return Err(Error::request(option, reason).into());
            }
            check_destination(path)?;
            if let Some(what) = taken.insert(real_path(path), "is the name of another output too") {
                return Err(Error::request(option, format!("{} {what}", path.display())).into());
            }
        }
        Ok(())
    }
}

/// The same for all names of one file, which need not exist yet in a folder that does.
fn real_path(path: &Path) -> PathBuf {
    let beside = || {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(canonicalize(folder).ok()?.join(path.file_name()?))
    };
    canonicalize(path).ok().or_else(beside).unwrap_or_else(|| path.to_path_buf())
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
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{index}."));
    name.push(path.extension().unwrap_or(OsStr::new("png")));
    path.with_file_name(name)
}

/// `tokens.safetensors` for `tokens`. A name that has an ending keeps it, and so does one of no file, to be refused.
pub fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let folder = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let file = path.is_file() || !(folder || path.exists());
    match path.extension() {
        None if file => path.with_extension(ending),
        _ => path.to_path_buf(),
    }
}
