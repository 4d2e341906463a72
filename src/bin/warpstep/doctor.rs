//! `warpstep doctor`: what this machine and this build can do, for bug reports.

use crate::args::cuda_options;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
use warpstep::Error;
use warpstep::device::cuda::{CudaDevice, probe};
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions, build_kind};
use warpstep::device::{Device, cubins};
use warpstep::{conformance, ops};

/// Report what this machine and this build can do.
#[derive(Args)]
pub struct Doctor {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        let emulated = EmulatedDevice::new(EmulatedOptions::default())?.info();
        let gpu = probe(&cuda_options());
        // Opening needs more than a device: the right kind, and kernels in this build.
        let usable = CudaDevice::open(cuda_options()).map(drop);
        let variants: usize =
            ops::registry().iter().flat_map(|op| op.variants).map(|v| v.kernels.len()).sum();
        let cpu = std::thread::available_parallelism().map_or(0, |n| n.get());
        if self.json {
            println!(
                "{}",
                serde_json::json!({
                    "version": env!("CARGO_PKG_VERSION"),
                    "cubins": cubins::CUBINS.len(),
                    "nvcc": cubins::NVCC_VERSION,
                    "kernels": variants,
                    "emulator": build_kind(),
                    "emulated_sm_count": emulated.sm_count,
                    "cuda": gpu.as_ref().ok(),
                    "cuda_unusable": usable.as_ref().err().map(ToString::to_string),
                    "primitives_verified_on": conformance::VERIFIED_ON,
                    "cpu_threads": cpu,
                    "demo_model": cfg!(feature = "demo-model"),
                })
            );
            return Ok(ExitCode::SUCCESS);
        }
        println!(
            "warpstep {} ({} ops, {variants} kernels)",
            env!("CARGO_PKG_VERSION"),
            ops::registry().len()
        );
        match cubins::CUBINS.len() {
            0 => println!("cubins: none; no nvcc was found at build time (tools/setup.sh installs one)"),
            n => println!("cubins: {n} for sm_90a, by {}", cubins::NVCC_VERSION),
        }
        println!(
            "emulated device: {} build, {} SMs by default, {cpu} CPU threads here",
            build_kind(),
            emulated.sm_count
        );
        let primitives = conformance::UNITS.iter().map(|unit| unit.primitives.len()).sum::<usize>();
        match conformance::VERIFIED_ON {
            [] => println!("primitives: {primitives}, none compared with a GPU yet (kernels conformance)"),
            gpus => println!("primitives: {primitives}, compared with {}", gpus.join(", ")),
        }
        if let Ok(facts) = &gpu {
            let ((major, minor), (cc, cc_minor)) = (facts.driver_cuda, facts.capability);
            println!("NVIDIA driver: for CUDA {major}.{minor}, shows {} device(s)", facts.devices);
            println!(
                "GPU 0: {}, compute capability {cc}.{cc_minor}, {} SMs, {:.1} GB",
                facts.name,
                facts.sm_count,
                facts.memory_bytes as f64 / 1e9
            );
        }
        match &usable {
            Ok(()) => println!("CUDA device: can be opened; driving one has only been tested against a stub"),
            Err(error @ Error::NoDevice(_)) => println!("{error}; commands use the emulated device"),
            // --device auto goes on without a GPU only where there is none.
            Err(error) => println!("CUDA device: {error}; commands fail but for --device emulated"),
        }
        println!("demo model: {}", if cfg!(feature = "demo-model") { "embedded" } else { "not embedded" });
        Ok(ExitCode::SUCCESS)
    }
}
