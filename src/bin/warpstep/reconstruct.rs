//! `warpstep reconstruct`: pictures through the VAE and back, and what is lost on the way.

use crate::args::{DeviceArgs, Precision};
use crate::loading::{LoadArgs, load};
use crate::outputs::{OutputFiles, numbered};
use crate::picture::{PictureArgs, expand_folders, read_picture};
use anyhow::{Context, Result};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use warpstep::Error;
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::image::write_png;
use warpstep::metrics::{psnr, ssim};
use warpstep::reconstruct::{ChannelStats, LatentNoise, plan_reconstruction, reconstruct};

/// Encode and decode pictures; print PSNR and SSIM (11x11 Gaussian window), and the latents' statistics.
///
/// The encoder's mean is decoded, with noise added if asked for. Several pictures, or a folder of them, give a table
/// with means.
///
///   warpstep reconstruct photo.png -o decoded.png
///
///   warpstep reconstruct photos --resize bucket:512 --noise 0.2 -o noisy.png
#[derive(Args)]
pub struct Reconstruct {
    /// Pictures, or folders of them: PNG, JPEG or WebP files whose sides divide by the model's token size (16) unless
    /// --resize is given.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,

    /// Standard deviation of Gaussian noise added to the latent that the model reads.
    #[arg(long, value_name = "SIGMA", default_value_t = 0.0)]
    noise: f32,

    /// Seed of that noise [default: 0].
    #[arg(long, value_name = "U64")]
    seed: Option<u64>,

    /// Checkpoint folder in the official layout [default: the demo model inside this program].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// VAE folder [default: what config.json names, else vae/ in the model folder].
    #[arg(long, value_name = "DIR", requires = "model")]
    vae: Option<PathBuf>,

    /// Element type of weights and activations.
    #[arg(long, value_enum, default_value = "bf16")]
    precision: Precision,

    /// Print a JSON description of the result on stdout instead of the table.
    #[arg(long)]
    json: bool,

    /// PNG to write; with several pictures a number is added: out-0.png, out-1.png.
    #[arg(short, long, value_name = "FILE", default_value = "reconstruction.png")]
    output: PathBuf,

    #[command(flatten)]
    pictures: PictureArgs,

    #[command(flatten)]
    loading: LoadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// One picture's figures.
#[derive(serde::Serialize)]
struct Row {
    // JSON holds no name that is not UTF-8 as it is.
    image: String,
    file: String,
    psnr_db: f64,
    ssim: f64,
    channels: Vec<ChannelStats>,
}

impl Reconstruct {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        if self.seed.is_some() && self.noise == 0.0 {
            return Err(Error::request("seed", "has no effect without --noise").into());
        }
        let source = match &self.model {
            Some(dir) => ModelSource::Dir(dir.clone()),
            None => ModelSource::Demo,
        };
        let options = EngineOptions {
            dtype: self.precision.into(),
            vae: self.vae.clone(),
            kernels: self.device.selection()?,
            ..self.loading.options()
        };
        let noise = LatentNoise { sigma: self.noise, seed: self.seed.unwrap_or(0) };
        let images = expand_folders(&self.images)?;
        let read = |path: &PathBuf| read_picture(path, self.pictures.resize);
        let about = |path: &PathBuf| format!("picture {}", path.display());
        let device = self.device.open()?;
        // What is wrong with a picture is said before weights are read, which may take minutes, and before the first
        // one's work. Pictures are read again later: a folder of them need not fit the memory.
        let engine = Engine::for_planning(&source, device.info().sm_count, options.clone())?;
        for path in &images {
            let image = read(path)?;
            plan_reconstruction(&engine, &image, noise).with_context(|| about(path))?;
        }
        let file = |index| numbered(&self.output, index, images.len());
        let mut files = OutputFiles::default();
        files.add("output", &(0..images.len()).map(file).collect::<Vec<_>>());
        files.check(&images)?;
        let engine = Arc::new(load(&source, device, options)?);
        let mut rows = Vec::new();
        for (index, path) in images.iter().enumerate() {
            let image = read(path)?;
            let made = reconstruct(&engine, &image, noise).with_context(|| about(path))?;
            let file = file(index);
            write_png(&file, &made.image, None)?;
            eprintln!("wrote {}", file.display());
            rows.push(Row {
                image: path.display().to_string(),
                file: file.display().to_string(),
                psnr_db: psnr(&image, &made.image)?,
                ssim: ssim(&image, &made.image)?,
                channels: made.channels,
            });
        }
        match self.json {
            true => println!("{}", serde_json::json!({ "noise": self.noise, "pictures": rows })),
            false => print_table(&rows),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_table(rows: &[Row]) {
    let width = rows.iter().map(|row| row.image.chars().count()).max().unwrap_or(0).max(5);
    println!("{:width$}  PSNR dB    SSIM", "image");
    for row in rows {
        println!("{:width$}  {:7.2}  {:6.4}", row.image, row.psnr_db, row.ssim);
    }
    let mean = |of: &dyn Fn(&Row) -> f64| rows.iter().map(of).sum::<f64>() / rows.len().max(1) as f64;
    if rows.len() > 1 {
        println!("{:width$}  {:7.2}  {:6.4}", "mean", mean(&|r| r.psnr_db), mean(&|r| r.ssim));
    }
    println!("\nlatent channel      mean       std");
    for channel in 0..rows.first().map_or(0, |row| row.channels.len()) {
        let (m, s) = (mean(&|r| r.channels[channel].mean), mean(&|r| r.channels[channel].std));
        println!("{channel:14}  {m:8.4}  {s:8.4}");
    }
}
