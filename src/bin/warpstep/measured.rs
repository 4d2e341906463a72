//! What both benches share: how much effort, where the report goes, and what is said of the machine.

use crate::args::DeviceArgs;
use crate::outputs::OutputFiles;
use anyhow::Result;
use clap::{Args, ValueEnum};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};
use warpstep::bench::report::{EMULATED, Format, Header, Report};
use warpstep::bench::samples::Effort;
use warpstep::device::Device;
use warpstep::files::write_atomically;

/// Commit of the checkout that this program was built in, where the build was told (`tools/bundle.sh` does).
const COMMIT: Option<&str> = option_env!("WARPSTEP_COMMIT");

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatName {
    /// A Markdown table.
    Md,
    /// Comma-separated values.
    Csv,
    /// One object with every sample.
    Json,
}

/// Options of both benches.
#[derive(Args)]
pub struct Measured {
    /// Timed runs of each row [default: 100 on a GPU, 3 on the emulated device].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeat: Option<u32>,

    /// Seconds for each row, after which fewer runs will do [default: 3 on a GPU, 0.5 on the emulated device].
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,

    /// Form of the report.
    #[arg(long, default_value = "md")]
    format: FormatName,

    /// Write the report to this file instead of printing it.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Commit to name in the report [default: what the build was told].
    #[arg(long, value_name = "HASH")]
    commit: Option<String>,
}

impl Measured {
    /// Says before the work, not after it, that the report could not be written.
    pub fn check(&self) -> Result<()> {
        let mut files = OutputFiles::default();
        files.add("output", &self.output);
        files.check([])
    }

    /// The form that was asked for.
    pub fn format(&self) -> FormatName {
        self.format
    }

    /// Effort for one row.
    pub fn effort(&self, kind: &str) -> Effort {
        let mut effort = Effort::for_device(kind);
        if let Some(repeats) = self.repeat {
            effort.repeats = repeats as usize;
        }
        if let Some(seconds) = self.seconds {
            effort.seconds = seconds;
        }
        effort
    }

    /// What was run where; prints the warning of the emulated device at once.
    pub fn header(&self, kind: &str, model: &str, device: &dyn Device) -> Header {
        let info = device.info();
        let mut notes = Vec::new();
        if info.kind != "cuda" {
            eprintln!("{EMULATED}");
            notes.push(EMULATED.to_owned());
        }
        let commit = self.commit.clone().or_else(|| COMMIT.map(String::from));
        Header {
            kind: kind.into(),
            model: model.into(),
            device: info.kind.into(),
            name: info.name,
            sm_count: info.sm_count,
            card: if info.kind == "cuda" { card() } else { Vec::new() },
            version: env!("CARGO_PKG_VERSION").into(),
            commit: commit.unwrap_or_else(|| "unknown".into()),
            flags: std::env::args().skip(1).collect(),
            date: date(),
            notes,
        }
    }

    /// Writes the report where it was asked for.
    pub fn write(&self, report: &Report) -> Result<()> {
        self.write_text(&self.text(report)?)
    }

    /// The same of a text.
    pub fn write_text(&self, text: &str) -> Result<()> {
        match &self.output {
            None => print!("{text}"),
            Some(path) => {
                replace(path, text)?;
                eprintln!("wrote {}", path.display());
            }
        }
        Ok(())
    }

    /// Writes what there is of a report so far, if it goes to a file: time may run out before the last row.
    pub fn keep(&self, report: &Report) -> Result<()> {
        self.output.iter().try_for_each(|path| replace(path, &self.text(report)?))
    }

    fn text(&self, report: &Report) -> Result<String> {
        Ok(report.text(match self.format {
            FormatName::Md => Format::Md,
            FormatName::Csv => Format::Csv,
            FormatName::Json => Format::Json,
        })?)
    }
}

/// Whoever kills this program keeps one whole report.
fn replace(path: &Path, text: &str) -> Result<()> {
    Ok(write_atomically(path, |out| out.write_all(text.as_bytes()).map_err(warpstep::Error::io(path)))?)
}

/// What `nvidia-smi` says of the cards, where there is one: names, driver, clocks and power are only read.
pub fn card() -> Vec<String> {
    let query =
        "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu";
    let output = Command::new("nvidia-smi").args([query, "--format=csv"]).stderr(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
        }
        _ => Vec::new(),
    }
}

/// Seconds since 1970 as a date and a time of day in UTC (Hinnant's civil_from_days).
fn date() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = ((seconds / 86_400) as i64 + 719_468, seconds % 86_400);
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = (year_of_era + era * 400 + month / 10, (month + 2) % 12 + 1);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// The device, with `sm_count` SMs if it is emulated and the user said nothing else.
pub fn open(args: &DeviceArgs, sm_count: u32) -> Result<std::sync::Arc<dyn Device>> {
    let device = args.open()?;
    if device.info().kind == "cuda" || args.sm_count.is_some() {
        return Ok(device);
    }
    let mut args = args.clone();
    args.sm_count = Some(sm_count);
    args.open()
}
