//! `warpstep kernels`: what there is, and whether it is right.

use crate::args::{DeviceArgs, Precision};
use crate::kernels_bench::KernelsBench;
use crate::outputs::OutputFiles;
use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use warpstep::Error;
use warpstep::conformance::{self, Outputs};
use warpstep::device::cubins;
use warpstep::ops::harness::{Rig, Scale};
use warpstep::ops::{self, DType, Op};

/// Verbs on kernels.
#[derive(Subcommand)]
pub enum Kernels {
    /// Print every op and variant: element types, what it does, what bounds it, registers if compiled.
    List(List),
    /// Run every case of every variant against the f64 reference, one line each.
    Test(Test),
    /// Check the device's primitives against the PTX manual, and against outputs kept from another device.
    Conformance(Conformance),
    /// Time every variant, with cold and hot caches, against the copy bandwidth of the same run.
    Bench(KernelsBench),
}

/// Options of `kernels list`.
#[derive(Args)]
pub struct List {
    /// Print JSON lines instead of a table.
    #[arg(long)]
    json: bool,
}

/// Options of `kernels test`.
#[derive(Args)]
#[command(mut_arg("kernels", |kernels| kernels.hide(true)))]
pub struct Test {
    /// Only this op.
    #[arg(long)]
    op: Option<String>,

    /// Only this variant.
    #[arg(long)]
    variant: Option<String>,

    /// Only this element type.
    #[arg(long)]
    precision: Option<Precision>,

    /// Only cases whose label contains this, e.g. rows=3.
    #[arg(long, value_name = "TEXT")]
    case: Option<String>,

    /// Largest cases to run: small ones take milliseconds, real ones are the 14B shapes on 132 SMs.
    #[arg(long, default_value = "medium", value_parser = ["small", "medium", "real"])]
    scale: String,

    /// Run only cases of exactly that scale.
    #[arg(long)]
    only_scale: bool,

    /// Seed of the random inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Print only failures and the closing line.
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

/// Options of `kernels conformance`.
#[derive(Args)]
#[command(mut_arg("kernels", |kernels| kernels.hide(true)))]
pub struct Conformance {
    /// Only this unit.
    #[arg(long)]
    unit: Option<String>,

    /// Print the names of all units and run none.
    #[arg(long, conflicts_with_all = ["unit", "out", "against"])]
    list: bool,

    /// Keep all outputs in this file, for --against elsewhere.
    #[arg(long, value_name = "FILE", conflicts_with = "unit")]
    out: Option<PathBuf>,

    /// Compare with the outputs in this file as well, bit for bit.
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,
}

impl Kernels {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        match self {
            Kernels::List(list) => list.run(),
            Kernels::Test(test) => test.run(),
            Kernels::Conformance(conformance) => conformance.run(),
            Kernels::Bench(bench) => bench.run(),
        }
    }
}

impl List {
    fn run(self) -> Result<ExitCode> {
        for op in ops::registry() {
            if !self.json {
                println!("{}: {}\n    bound: {}", op.name, op.summary, op.bound);
            }
            for variant in op.variants {
                for (dtype, kernel) in variant.kernels {
                    let usage = cubins::resources().iter().find(|r| r.symbol == kernel.symbol);
                    if self.json {
                        println!(
                            "{}",
                            serde_json::json!({
                                "op": op.name, "variant": variant.name, "dtype": dtype.name(),
                                "symbol": kernel.symbol, "summary": variant.summary, "bound": op.bound,
                                "registers": usage.map(|u| u.registers),
                                "spill_bytes": usage.map(|u| u.spill_store_bytes + u.spill_load_bytes),
                            })
                        );
                    } else {
                        let compiled = usage.map_or("not compiled for sm_90a".to_string(), |u| {
                            format!("{} registers, {} B static shared", u.registers, u.shared_bytes)
                        });
                        println!(
                            "    {:8} {:5} {} ({compiled})",
                            variant.name,
                            dtype.name(),
                            variant.summary
                        );
                    }
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Conformance {
    fn run(self) -> Result<ExitCode> {
        if self.list {
            conformance::UNITS.iter().for_each(|unit| println!("{}", unit.name));
            return Ok(ExitCode::SUCCESS);
        }
        self.device.refuse_kernels("conformance is of the device; it runs no variant of an op")?;
        let mut files = OutputFiles::default();
        files.add("out", &self.out);
        files.check(&self.against)?;
        let device = self.device.open()?;
        let kept = self.against.as_deref().map(Outputs::load).transpose()?;
        let only = self.unit.as_deref().map(conformance::find).transpose()?;
        let mut outputs = Outputs { device: device.info().name, units: Vec::new() };
        let (mut passed, mut failed) = (0, 0);
        for unit in conformance::UNITS.iter().filter(|u| only.is_none_or(|only| only.name == u.name)) {
            let words = match unit.run(device.as_ref()) {
                Ok(words) => words,
                Err(error) => {
                    failed += 1;
                    println!("{}: {error}: FAIL ({})", unit.name, unit.primitives.join(" "));
                    if device.stream().and_then(|mut s| s.synchronize()).is_err() {
                        bail!("the device is in error after {}; run the other units alone", unit.name);
                    }
                    continue;
                }
            };
            let mut verdict = unit.check(&words).map(|wrong| (wrong, "the manual"));
            if let (None, Some(kept)) = (&verdict, &kept) {
                let theirs = kept.units.iter().find(|(name, _)| name == unit.name);
                verdict = theirs
                    .and_then(|(_, theirs)| unit.compare(&words, theirs))
                    .map(|wrong| (wrong, kept.device.as_str()));
            }
            let primitives = unit.primitives.join(" ");
            match verdict {
                None => {
                    passed += 1;
                    println!("{}: {} words: ok ({primitives})", unit.name, words.len());
                }
                Some((wrong, source)) => {
                    failed += 1;
                    println!(
                        "{}: {} of {} words differ from {source}, first word {}: {}: FAIL ({primitives})",
                        unit.name,
                        wrong.count,
                        words.len(),
                        wrong.at,
                        wrong.detail
                    );
                }
            }
            outputs.units.push((unit.name.into(), words));
        }
        println!("{passed} passed, {failed} failed");
        if let Some(path) = &self.out {
            match outputs.units.len() == conformance::UNITS.len() {
                true => outputs.save(path)?,
                false => eprintln!("not every unit ran: {} is not written", path.display()),
            }
        }
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Test {
    fn run(self) -> Result<ExitCode> {
        let scale = match self.scale.as_str() {
            "small" => Scale::Small,
            "real" => Scale::Real,
            _ => Scale::Medium,
        };
        self.device.refuse_kernels("every variant is tested here; --op and --variant choose among them")?;
        let only = self.op.as_deref().map(ops::find).transpose()?;
        let of_op = |op: &&&Op| only.is_none_or(|only| only.name == op.name);
        if let Some(variant) = &self.variant {
            check_variant(variant, ops::registry().iter().filter(of_op))?;
        }
        let dtype = self.precision.map(DType::from);
        let device = self.device.open()?;
        // A GPU has its real number of SMs already.
        let real = if scale == Scale::Real && device.info().kind == "emulated" {
            let mut args = self.device.clone();
            args.sm_count = Some(args.sm_count.unwrap_or(132));
            args.open()?
        } else {
            device.clone()
        };
        let (mut passed, mut failed) = (0, 0);
        for op in ops::registry().iter().filter(of_op) {
            for case in (op.cases)() {
                let wanted = self.variant.as_ref().is_none_or(|v| v == case.variant)
                    && dtype.is_none_or(|d| d == case.dtype)
                    && self.case.as_ref().is_none_or(|text| case.label.contains(text.as_str()))
                    && (if self.only_scale { case.scale == scale } else { case.scale <= scale });
                if !wanted {
                    continue;
                }
                let device = if case.scale == Scale::Real { &real } else { &device };
                let start = Instant::now();
                let mut rig = Rig::new(device.clone(), self.seed)?;
                let result = (case.run)(&mut rig).and_then(|checks| rig.check_guards().map(|()| checks));
                let name = format!("{} {} {} {}", op.name, case.variant, case.dtype.name(), case.label);
                let ms = start.elapsed().as_secs_f64() * 1e3;
                match result {
                    Ok(checks) if !checks.is_empty() && checks.iter().all(|c| c.ok) => {
                        passed += 1;
                        if !self.quiet {
                            for c in &checks {
                                println!(
                                    "{name}: {}: max {:.2e}, mean {:.2e}, allowed {:.2e}: ok ({ms:.0} ms)",
                                    c.output, c.max_error, c.mean_error, c.allowed
                                );
                            }
                        }
                    }
                    Ok(checks) => {
                        failed += 1;
                        if checks.is_empty() {
                            println!("{name}: FAIL: the case compared nothing");
                        }
                        for c in checks.iter().filter(|c| !c.ok) {
                            println!(
                                "{name}: {}: max {:.3e}, allowed {:.3e}, at {}: got {:.6}, expected {:.6}: FAIL",
                                c.output, c.max_error, c.allowed, c.worst.0, c.worst.1, c.worst.2
                            );
                        }
                    }
                    Err(error) => {
                        failed += 1;
                        println!("{name}: FAIL: {error}");
                        // A failed launch is sticky, as on a GPU: nothing after it would tell anything.
                        if device.stream().and_then(|mut s| s.synchronize()).is_err() {
                            bail!("the device is in error after {name}; run the case alone");
                        }
                    }
                }
            }
        }
        if passed + failed == 0 {
            let reason =
                format!("no case of scale {} is of this op, variant, precision and label", self.scale);
            bail!(Error::request("case", reason));
        }
        println!("{passed} passed, {failed} failed");
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Refuses a variant that none of the ops has.
fn check_variant<'a>(name: &str, ops: impl Iterator<Item = &'a &'static Op>) -> Result<()> {
    let known: BTreeSet<&str> = ops.flat_map(|op| op.variants).map(|variant| variant.name).collect();
    if known.contains(name) {
        return Ok(());
    }
    let known: Vec<&str> = known.into_iter().collect();
    Err(Error::request("variant", format!("unknown variant {name:?}; known: {}", known.join(", "))).into())
}
