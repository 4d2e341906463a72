//! Options that several verbs share.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use std::sync::Arc;
use warpstep::device::Device;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::ops::{DType, Selection};

/// Which device, and how the emulated one is set up.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// Device: auto takes a GPU if this build can drive one, else the emulated device.
    #[arg(long, default_value = "auto", value_parser = ["auto", "emulated"])]
    pub device: String,

    /// SMs that the emulated device reports; 132 is the shipped geometry, 4 is quick.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=264))]
    pub sm_count: Option<u32>,

    /// Variant of an op, e.g. attention=splitkv; may be repeated.
    #[arg(long = "kernel", value_name = "OP=VARIANT")]
    pub kernels: Vec<String>,
}

impl DeviceArgs {
    /// Opens the device.
    pub fn open(&self) -> Result<Arc<dyn Device>> {
        let mut options = EmulatedOptions::default();
        if let Some(sm_count) = self.sm_count {
            options.sm_count = sm_count;
        }
        Ok(Arc::new(EmulatedDevice::new(options)?))
    }

    /// The chosen variants.
    pub fn selection(&self) -> Result<Selection> {
        Ok(Selection::parse(&self.kernels)?)
    }
}

/// Element type on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// bfloat16 weights, activations and cache.
    Bf16,
    /// Single precision throughout, for verification.
    F32,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> DType {
        match precision {
            Precision::Bf16 => DType::Bf16,
            Precision::F32 => DType::F32,
        }
    }
}

/// `WIDTHxHEIGHT` in pixels.
pub fn parse_size(text: &str) -> Result<(u32, u32)> {
    let Some((width, height)) = text.split_once(['x', 'X']) else {
        bail!("{text:?} is not of the form WIDTHxHEIGHT, such as 128x128");
    };
    Ok((width.trim().parse()?, height.trim().parse()?))
}
