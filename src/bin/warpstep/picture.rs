//! Pictures that a command is given.

use crate::args::parse_size;
use anyhow::{Context, Result};
use clap::Args;
use std::path::{Path, PathBuf};
use warpstep::Error;
use warpstep::image::{ImageLimits, ResizeMode, RgbImage, load_image, prepare};

/// What is done to pictures before they are encoded.
#[derive(Args)]
pub struct PictureArgs {
    /// Bring pictures to a size that the model takes: crop:WxH (fill it and crop the middle, as the August code does),
    /// bucket:256 or bucket:512 (the nearest of the 17 aspect ratios that the model was trained on, as the February
    /// code does). Without it other sizes are an error.
    #[arg(long, value_name = "MODE", value_parser = parse_resize)]
    pub resize: Option<ResizeMode>,
}

fn parse_resize(text: &str) -> Result<ResizeMode, String> {
    let known = || "known: crop:WIDTHxHEIGHT, bucket:256, bucket:512".to_owned();
    match text.split_once(':') {
        Some(("crop", size)) => {
            let (width, height) = parse_size(size).map_err(|e| format!("{e:#}"))?;
            Ok(ResizeMode::Crop { width, height })
        }
        Some(("bucket", "256")) => Ok(ResizeMode::Bucket { base: 16 }),
        Some(("bucket", "512")) => Ok(ResizeMode::Bucket { base: 32 }),
        _ => Err(known()),
    }
}

/// Reads a PNG, JPEG or WebP file, whose name is in every error. Whether its size will do is for the model to say.
pub fn read_picture(path: &Path, resize: Option<ResizeMode>) -> Result<RgbImage> {
    let image = load_image(path, &ImageLimits::default())?;
    Ok(match resize {
        Some(mode) => prepare(&image, mode).with_context(|| format!("picture {}", path.display()))?,
        None => image,
    })
}

/// The pictures of a command line, with every folder replaced by the pictures in it, in the order of their names.
pub fn expand_folders(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let about = || format!("folder {}", path.display());
        let mut found = Vec::new();
        for entry in std::fs::read_dir(path).with_context(about)? {
            let file = entry.with_context(about)?.path();
            if is_picture(&file) {
                found.push(file);
            }
        }
        if found.is_empty() {
            let reason = format!("folder {} holds no PNG, JPEG or WebP file", path.display());
            return Err(Error::request("images", reason).into());
        }
        found.sort();
        files.extend(found);
    }
    Ok(files)
}

/// By its name: what the file holds is found out when it is read.
fn is_picture(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    path.is_file() && extension.is_some_and(|e| matches!(e.as_str(), "png" | "jpg" | "jpeg" | "webp"))
}
