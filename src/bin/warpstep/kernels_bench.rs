//! `warpstep kernels bench`: how fast every variant is, next to what the card can do.

use crate::args::{DeviceArgs, Precision};
use crate::measured::{Measured, open};
use anyhow::{Result, bail};
use clap::Args;
use std::process::ExitCode;
use warpstep::bench::ceilings::{Ceilings, Sizes};
use warpstep::bench::kernels::{Bench, Options, choose};
use warpstep::bench::report::Report;
use warpstep::bench::samples::Row;
use warpstep::ops::DType;
use warpstep::ops::harness::Scale;

/// Options of `kernels bench`.
#[derive(Args)]
pub struct KernelsBench {
    /// Only this op.
    #[arg(long)]
    op: Option<String>,

    /// Only this variant.
    #[arg(long)]
    variant: Option<String>,

    /// Only shapes that contain this, e.g. rows=2.
    #[arg(long, value_name = "TEXT")]
    shape: Option<String>,

    /// Only this element type.
    #[arg(long)]
    dtype: Option<Precision>,

    /// Size of the cases; an op without such a case is timed at its largest [default: real on a GPU, else small].
    #[arg(long, value_parser = ["small", "medium", "real"])]
    scale: Option<String>,

    /// Launches back to back in one graph, and copies that the cold figure rotates over at most (two at least)
    /// [default: 16 on a GPU, else 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    chain: Option<u32>,

    /// Seed of the random inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    #[command(flatten)]
    measured: Measured,

    #[command(flatten)]
    device: DeviceArgs,
}

impl KernelsBench {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        if let Some(kernel) = self.device.kernels.first() {
            bail!(warpstep::Error::request(
                "kernel",
                format!("{kernel}: every variant is timed here; --op and --variant choose among them")
            ));
        }
        self.measured.check()?;
        let probe = self.device.open()?;
        let gpu = probe.info().kind == "cuda";
        let scale = match self.scale.as_deref() {
            Some("small") => Scale::Small,
            Some("medium") => Scale::Medium,
            None if !gpu => Scale::Small,
            _ => Scale::Real,
        };
        // The shipped geometry needs as many SMs.
        let device = if scale == Scale::Real { open(&self.device, 132)? } else { probe };
        let effort = self.measured.effort(device.info().kind);
        let options = Options {
            op: self.op,
            variant: self.variant,
            shape: self.shape,
            dtype: self.dtype.map(DType::from),
            scale,
            effort,
            chain: self.chain.map_or(if gpu { 16 } else { 1 }, |chain| chain as usize),
            seed: self.seed,
        };
        let chosen = choose(&options)?;
        if chosen.is_empty() {
            bail!(warpstep::Error::request(
                "shape",
                "no case is of this op, variant, shape and element type"
            ));
        }
        let header = self.measured.header("kernels", "kernels", device.as_ref());
        let ceilings = Ceilings::measure(&device, &effort, Sizes::for_device(device.as_ref()))?;
        eprintln!(
            "ceilings: copy {:.2} GB/s, read {:.2} GB/s, bf16 product {:.3} TFLOP/s ({})",
            ceilings.copy.gb_per_s(),
            ceilings.read.gb_per_s(),
            ceilings.gemm.tflop_per_s(),
            ceilings.gemm.variant
        );
        let bench = Bench::new(device.clone())?;
        let mut report = Report { header, ceilings, rows: Vec::new() };
        report.header.notes.push(bench.note());
        let mut failed = 0;
        for choice in &chosen {
            match bench.run(choice, &options) {
                Ok(rows) => {
                    let [cold, hot] = rows.each_ref().map(Row::median);
                    let (test, variant, shape) = (&rows[0].test, &rows[0].variant, &rows[0].shape);
                    eprintln!("{test} {variant} {shape}: cold {cold:.4} ms, hot {hot:.4} ms");
                    report.rows.extend(rows);
                    self.measured.keep(&report)?;
                }
                Err(error) => {
                    failed += 1;
                    let case = &choice.case;
                    let name = format!("{} {} {}", choice.op.name, case.variant, case.dtype.name());
                    eprintln!("{name} {}: FAIL: {error}", case.label);
                    report.header.notes.push(format!("{name} {}: {error}", case.label));
                    // A launch that was refused left the device as it was; after a kernel that went wrong, what
                    // follows would tell nothing.
                    if device.stream().and_then(|mut stream| stream.synchronize()).is_err() {
                        break;
                    }
                }
            }
        }
        self.measured.write(&report)?;
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
