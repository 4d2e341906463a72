//! `warpstep edit`: pictures and an instruction in, PNGs out.

use crate::generate::{EditInput, Options};
use crate::picture::{PictureArgs, read_picture};
use anyhow::Result;
use clap::Args;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use warpstep::Error;

/// Change pictures as a text says.
///
/// Each picture is where the instruction says <image>, or in front of it if it says so nowhere. The result has the size
/// of the first picture unless --size is given.
///
///   warpstep edit circle.png "make the circle black" --cfg 3 --cfg-img 1.5 -o black.png
///
///   warpstep edit photo.jpg "remove the car" --resize bucket:512 --model NextStep-1-Large-Edit --preset edit
///
///   warpstep edit circle.png --prompts instructions.txt -o out.png        # out-0.png, out-1.png, ...
#[derive(Args)]
#[command(
    allow_negative_numbers = true,
    override_usage = "warpstep edit [OPTIONS] <IMAGE>... <PROMPT>\n       warpstep edit [OPTIONS] <IMAGE>... --prompts <FILE>"
)]
pub struct Edit {
    /// Pictures (PNG, JPEG or WebP files whose sides divide by the model's token size, 16, unless --resize is given),
    /// then the instruction.
    #[arg(value_name = "IMAGE", required = true)]
    arguments: Vec<OsString>,

    /// Guidance towards the pictures: 1 is none.
    #[arg(long, alias = "image-guidance-scale", value_name = "F")]
    cfg_img: Option<f64>,

    #[command(flatten)]
    pictures: PictureArgs,

    #[command(flatten)]
    options: Options,
}

impl Edit {
    /// Runs the verb.
    pub fn run(mut self) -> Result<ExitCode> {
        let prompt = match self.options.has_prompts() {
            true => None,
            false => self.arguments.pop(),
        };
        if self.arguments.is_empty() {
            let reason = "is missing: give pictures and then an instruction, or --prompts FILE";
            return Err(Error::request("prompt", reason).into());
        }
        let prompt = prompt.map(|text| text.into_string());
        let prompt = prompt.transpose().map_err(|_| Error::request("prompt", "is not UTF-8"))?;
        let read = |path: &OsString| read_picture(Path::new(path), self.pictures.resize);
        let images = self.arguments.iter().map(read).collect::<Result<_>>()?;
        self.options.run(prompt, Some(EditInput { images, cfg_img: self.cfg_img }))
    }
}
