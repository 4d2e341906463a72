//! `warpstep compare`: how alike two pictures are.

use crate::picture::read_picture;
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use warpstep::metrics::{psnr, ssim};

/// Compare two pictures of one size: PSNR, SSIM and the largest difference of a value.
///
/// Equal requests make equal bytes on one device. On another number of SMs, or by other kernels, sums are added up in
/// another order: such pictures are alike, and this says how much.
///
///   warpstep compare expected.png found.png --at-least 40
#[derive(Args)]
pub struct Compare {
    /// Two PNG, JPEG or WebP files.
    #[arg(num_args = 2, required = true, value_names = ["A", "B"])]
    pictures: Vec<PathBuf>,

    /// Fail, with exit code 1, if the PSNR is lower.
    #[arg(long, value_name = "DB")]
    at_least: Option<f64>,
}

impl Compare {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        let (a, b) = (read_picture(&self.pictures[0], None)?, read_picture(&self.pictures[1], None)?);
        let decibels = psnr(&a, &b)?;
        let largest = a.data().iter().zip(b.data()).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
        // Smaller pictures than its window have none.
        let structure = ssim(&a, &b).map_or_else(|_| String::new(), |ssim| format!("SSIM {ssim:.4}, "));
        println!("PSNR {decibels:.2} dB, {structure}largest difference {largest} of 255");
        // Written so that NaN fails.
        let alike = self.at_least.is_none_or(|least| decibels >= least);
        Ok(if alike { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
