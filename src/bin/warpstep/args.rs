//! Options that several verbs share.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::sync::Arc;
use warpstep::Error;
use warpstep::device::Device;
use warpstep::device::cuda::{CudaDevice, CudaOptions};
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::device::planning::HOPPER_SMS;
use warpstep::ops::{DType, Selection};

/// Environment variable with the path of the CUDA driver's library, for machines that keep it elsewhere, and tests.
const LIBRARY_VARIABLE: &str = "WARPSTEP_CUDA_LIBRARY";

/// Why an option for GPUs is refused.
const EMULATED_WANTED: &str = "is for a GPU; the emulated device was asked for";

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU where there is one that can be driven, else the emulated device.
    Auto,
    /// The GPU of this number.
    Cuda(u32),
    /// The emulated device.
    Emulated,
}

/// Which device, and how it is set up.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// Device: cuda, cuda:N (the GPU of that number), emulated, or auto: a Hopper GPU where there is one, else the
    /// emulated device.
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,

    /// Folder of MODULE.cubin files to run on a GPU instead of those of the same names inside this program, compiled with
    /// the same kernels/params.h: kernels/README.md says how.
    #[arg(long, value_name = "DIR")]
    pub cubins: Option<PathBuf>,

    /// Start no kernel on a GPU before its predecessors have ended: to find out whether a dependent launch is at
    /// fault.
    #[arg(long)]
    pub no_dependent_launch: bool,

    /// Per cent of a GPU's L1 that every kernel prefers as shared memory: where it differs from kernel to kernel, an SM
    /// must be idle to change it, and cannot begin a dependent launch meanwhile [default: the driver's choice].
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub shared_carveout: Option<u8>,

    /// SMs that the emulated device reports; 132 is the shipped geometry, 4 is quick. A GPU has the SMs it has:
    /// with this option, auto means emulated.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=264))]
    pub sm_count: Option<u32>,

    /// Variant of an op, e.g. attention=splitkv; may be repeated.
    #[arg(long = "kernel", value_name = "OP=VARIANT")]
    pub kernels: Vec<String>,
}

impl DeviceArgs {
    /// Opens the device. Where auto finds no GPU, one line says why.
    pub fn open(&self) -> Result<Arc<dyn Device>> {
        let gpu = |ordinal| CudaDevice::open(self.cuda_options(ordinal));
        match (self.device, self.sm_count) {
            (DeviceChoice::Cuda(_), Some(_)) => {
                Err(Error::request("sm-count", "is for the emulated device; a GPU has the SMs it has").into())
            }
            (DeviceChoice::Cuda(ordinal), None) => Ok(Arc::new(gpu(ordinal)?)),
            (DeviceChoice::Auto, None) => match gpu(0) {
                Ok(device) => Ok(Arc::new(device)),
                Err(error @ Error::NoDevice(_)) => {
                    self.refuse_gpu_options(&format!("is for a GPU; {error}"))?;
                    eprintln!("{error}; using the emulated device");
                    self.emulated()
                }
                Err(error) => Err(error.into()),
            },
            (DeviceChoice::Auto, Some(_)) | (DeviceChoice::Emulated, _) => {
                self.refuse_gpu_options(EMULATED_WANTED)?;
                self.emulated()
            }
        }
    }

    /// Refuses what has no effect on the emulated device.
    fn refuse_gpu_options(&self, reason: &str) -> Result<()> {
        let given = [
            ("cubins", self.cubins.is_some()),
            ("no-dependent-launch", self.no_dependent_launch),
            ("shared-carveout", self.shared_carveout.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(Error::request(option, reason).into()),
            None => Ok(()),
        }
    }

    /// Refuses --kernel where every variant has its turn.
    pub fn refuse_kernels(&self, reason: &str) -> Result<()> {
        match self.kernels.first() {
            Some(kernel) => Err(Error::request("kernel", format!("{kernel}: {reason}")).into()),
            None => Ok(()),
        }
    }

    fn emulated(&self) -> Result<Arc<dyn Device>> {
        let mut options = EmulatedOptions::default();
        if let Some(sm_count) = self.sm_count {
            options.sm_count = sm_count;
        }
        Ok(Arc::new(EmulatedDevice::new(options)?))
    }

    fn cuda_options(&self, ordinal: u32) -> CudaOptions {
        CudaOptions {
            ordinal,
            cubins: self.cubins.clone(),
            dependent_launch: !self.no_dependent_launch,
            shared_carveout: self.shared_carveout,
            ..cuda_options()
        }
    }

    /// SMs to plan for: those of the GPU that was named, the given number, or an H100's.
    pub fn planned_sm_count(&self) -> Result<u32> {
        match (self.device, self.sm_count) {
            (DeviceChoice::Auto, None) => Ok(HOPPER_SMS),
            (DeviceChoice::Cuda(_), _) => Ok(self.open()?.info().sm_count),
            (DeviceChoice::Auto, Some(_)) | (DeviceChoice::Emulated, _) => {
                self.refuse_gpu_options(EMULATED_WANTED)?;
                Ok(self.sm_count.unwrap_or(HOPPER_SMS))
            }
        }
    }

    /// The chosen variants.
    pub fn selection(&self) -> Result<Selection> {
        Ok(Selection::parse(&self.kernels)?)
    }
}

/// The options of the first GPU, with the driver's library that the environment names.
pub fn cuda_options() -> CudaOptions {
    let library = std::env::var_os(LIBRARY_VARIABLE).map(PathBuf::from);
    CudaOptions { library, ..CudaOptions::default() }
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceChoice::Auto),
        None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
        None if text == "emulated" => Ok(DeviceChoice::Emulated),
        Some(("cuda", number)) => number
            .parse()
            .map(DeviceChoice::Cuda)
            .map_err(|_| format!("{number:?} is not the number of a GPU; they count from 0")),
        _ => Err("known: auto, cuda, cuda:N, emulated".into()),
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
