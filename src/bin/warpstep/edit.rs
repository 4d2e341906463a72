//! `warpstep edit`: pictures and an instruction in, PNGs out.

use crate::generate::{EditInput, Options};
use crate::picture::read_picture;
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Change pictures as a text says.
///
/// Each picture is where the instruction says <image>, or in front of it if it says so nowhere. The result has the size
/// of the first picture unless --size is given.
///
///   warpstep edit circle.png "make the circle black" --cfg 3 --cfg-img 1.5 -o black.png
///
///   warpstep edit photo.png "remove the car" --model NextStep-1-Large-Edit --preset edit
#[derive(Args)]
pub struct Edit {
    /// Pictures: PNG, JPEG or WebP files whose sides divide by the model's token size (16).
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,

    /// The instruction.
    prompt: String,

    /// Guidance towards the pictures: 1 is none.
    #[arg(long, alias = "image-guidance-scale", value_name = "F")]
    cfg_img: Option<f64>,

    #[command(flatten)]
    options: Options,
}

impl Edit {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        let images = self.images.iter().map(|path| read_picture(path)).collect::<Result<_>>()?;
        self.options.run(&self.prompt, Some(EditInput { images, cfg_img: self.cfg_img }))
    }
}
