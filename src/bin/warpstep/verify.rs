//! `warpstep verify`: recorded cases of the official code against the engine.

use crate::args::{DeviceArgs, Precision};
use crate::outputs::OutputFiles;
use anyhow::{Context, Result};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use warpstep::Error;
use warpstep::ops::DType;
use warpstep::verify::{Models, Outcome, VerifyOptions, run_case};

/// Compare the engine with tensors recorded from the official code.
///
/// Every stage is fed its recorded input and draws, and every recorded output is compared.
/// Cases of kind `picture` run freely from their prompt and draws, in f32: at most 0.5 % of the picture's values may
/// be more than one level off (and the tokens, where recorded, what moved draws moved them by). Prints one line per tensor: case, tensor, shape, variants, largest and mean error,
/// allowed error, ok or FAIL; then "N passed, N failed, N skipped", counting cases.
#[derive(Args)]
pub struct Verify {
    /// Case files, in the format of the fixtures' README.
    #[arg(required = true, value_name = "CASE")]
    cases: Vec<PathBuf>,

    /// Folder that holds the model folders which cases name [default: the parent of the case's folder].
    #[arg(long, value_name = "DIR")]
    model_root: Option<PathBuf>,

    /// Precision to run in; auto is the case's own.
    #[arg(long, default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    precision: String,

    /// Count a skipped case as a failure.
    #[arg(long)]
    strict: bool,

    /// Also write what cases of kind `picture` draw into this folder, as CASE.png; in bf16 they are drawn, not compared.
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,

    /// Print JSON lines instead of a table.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

/// Says before the work that the folder takes no file, or that the pictures of two cases would be one.
fn check_pictures(folder: &Path, cases: &[PathBuf]) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let file = |case: &PathBuf| {
        let mut name = case.file_stem().unwrap_or_default().to_owned();
        name.push(".png");
        folder.join(name)
    };
    let mut outputs = OutputFiles::default();
    outputs.add("pictures", &cases.iter().map(file).collect::<Vec<_>>());
    outputs.check(cases)
}

impl Verify {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        if let Some(folder) = &self.pictures {
            check_pictures(folder, &self.cases)?;
        }
        let options = VerifyOptions {
            model_root: self.model_root,
            precision: match self.precision.as_str() {
                "f32" => Some(DType::from(Precision::F32)),
                "bf16" => Some(DType::from(Precision::Bf16)),
                _ => None,
            },
            selection: self.device.selection()?,
            pictures: self.pictures,
        };
        let device = self.device.open()?;
        let mut models = Models::default();
        let (mut passed, mut failed, mut skipped) = (0, 0, 0);
        for path in &self.cases {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let outcome = run_case(path, &device, &options, &mut models)
                .with_context(|| format!("case {}", path.display()));
            match outcome {
                Ok(None) => {}
                Ok(Some(Outcome::Skipped(reason))) => {
                    skipped += 1;
                    if self.json {
                        println!("{}", serde_json::json!({ "case": name, "skipped": reason }));
                    } else {
                        println!("{name}: skipped: {reason}");
                    }
                }
                Ok(Some(Outcome::Ran(lines))) => {
                    let ok = !lines.is_empty() && lines.iter().all(|l| l.ok);
                    *(if ok { &mut passed } else { &mut failed }) += 1;
                    for line in &lines {
                        if self.json {
                            println!("{}", serde_json::to_string(line)?);
                            continue;
                        }
                        let mean = line.allowed_mean.map(|m| format!(" (mean {m:.1e})")).unwrap_or_default();
                        let share = |s: Option<f64>| s.map(|s| format!("{:.2} %", 100.0 * s));
                        let share = match (share(line.off_share), share(line.allowed_share)) {
                            (Some(off), Some(allowed)) => format!(", off by more than 1: {off} of {allowed}"),
                            _ => String::new(),
                        };
                        println!(
                            "{} {} {:?} {}: max {:.2e}, mean {:.2e}, allowed {:.1e}{mean}{share}: {}",
                            line.case,
                            line.tensor,
                            line.shape,
                            line.variants,
                            line.max_error,
                            line.mean_error,
                            line.allowed_max,
                            if line.ok { "ok" } else { "FAIL" }
                        );
                    }
                }
                Err(error) => {
                    failed += 1;
                    if self.json {
                        println!("{}", serde_json::json!({ "case": name, "error": format!("{error:#}") }));
                    } else {
                        println!("{name}: FAIL: {error:#}");
                    }
                }
            }
        }
        if self.json {
            println!("{}", serde_json::json!({ "passed": passed, "failed": failed, "skipped": skipped }));
        } else {
            println!("{passed} passed, {failed} failed, {skipped} skipped");
        }
        let good = failed == 0 && !(self.strict && skipped > 0);
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
