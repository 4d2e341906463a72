//! `warpstep bench`: a whole model, in the form of the paper's Table 9.

use crate::args::{DeviceArgs, Precision, parse_size};
use crate::loading::{LoadArgs, load};
use crate::measured::{FormatName, Measured};
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use warpstep::Error;
use warpstep::bench::ceilings::{Ceilings, Sizes};
use warpstep::bench::derive::derive;
use warpstep::bench::loading;
use warpstep::bench::model::{self, Options};
use warpstep::bench::report::Report;
use warpstep::bench::samples::{Effort, Floor, Row};
use warpstep::bench::synthetic;
use warpstep::engine::{EngineOptions, ModelSource};
use warpstep::model::nextstep::NextStep;

/// Time a model: loading, last-token latency by part and position, prompt, VAE, pictures; each next to its floor.
///
/// With --model it is loaded twice, so that no disk is waited for the second time; the floor of that is the slower of
/// reading the files with as many threads and of copying pinned memory to the device, in the same run. Without --model,
/// weights of true shapes are made on the device at random. Without a GPU, --derive counts the bytes of one token of the
/// 14B and prints what they cost at a stated bandwidth.
#[derive(Args)]
pub struct Bench {
    /// Folder of a model.
    #[arg(long, value_name = "DIR", conflicts_with = "synthetic")]
    model: Option<PathBuf>,

    /// Random weights of the shapes of: 14b, demo, tiny [default: 14b on a GPU and with --derive, else tiny].
    #[arg(long, value_name = "NAME")]
    synthetic: Option<String>,

    /// Decoder layers, in place of the synthetic model's own number.
    #[arg(long, value_name = "N", conflicts_with = "model")]
    layers: Option<usize>,

    /// Element type.
    #[arg(long, default_value = "bf16")]
    precision: Precision,

    /// Network evaluations per token [default: 28, on the emulated device 3].
    #[arg(long, value_name = "N")]
    steps: Option<u32>,

    /// Guidance branches.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=3))]
    branches: u8,

    /// Pictures in the batch.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    batch: u32,

    /// Tokens of every prompt [default: 96, on the emulated device 8].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16384))]
    prompt: Option<u32>,

    /// Filled cache slots at which a token is timed, which may be none [default: 256,1024,4096; on the emulated device
    /// 16,32].
    #[arg(long, value_name = "N,N", value_parser = parse_positions)]
    positions: Option<Positions>,

    /// Sizes of pictures, which may be none [default: 256x256,512x512; on the emulated device two small ones].
    #[arg(long, value_name = "WxH,WxH", value_delimiter = ',')]
    sizes: Option<Vec<String>>,

    /// Make no pictures from end to end, only decode them.
    #[arg(long)]
    no_images: bool,

    /// Pictures of each size from end to end, all of the same numbers: a bit that differs is an error [default: 5, on the
    /// emulated device 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pictures: Option<u32>,

    /// Measure nothing: count the bytes of one token's nodes, on paper, and price them, for a picture of one size
    /// [default: 512x512]. As md or json.
    // What says how or where to measure would be passed over in silence.
    #[arg(long, conflicts_with_all = [
        "model", "positions", "no_images", "pictures", "seed", "repeat", "seconds", "commit", "no_mmap",
        "load_threads", "device", "cubins", "no_dependent_launch", "shared_carveout", "sm_count",
    ])]
    derive: bool,

    /// Bytes per second for --derive: 3.0e12 is what a copy on an H100 reaches.
    #[arg(long, value_name = "B/s", default_value_t = 3.0e12, requires = "derive")]
    bandwidth: f64,

    /// Seed of weights and prompts.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    #[command(flatten)]
    measured: Measured,

    #[command(flatten)]
    loading: LoadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// What --positions lists.
#[derive(Clone)]
struct Positions(Vec<usize>);

fn parse_positions(text: &str) -> Result<Positions, std::num::ParseIntError> {
    text.split(',').filter(|part| !part.is_empty()).map(str::parse).collect::<Result<_, _>>().map(Positions)
}

impl Bench {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        self.measured.check()?;
        if self.derive {
            return self.derived();
        }
        let device = self.device.open()?;
        let kind = device.info().kind;
        let options = self.options(kind, if kind == "cuda" { "14b" } else { "tiny" })?;
        let engine_options = EngineOptions {
            dtype: self.precision.into(),
            kernels: options.kernels.clone(),
            ..self.loading.options()
        };
        let mut loads = Vec::new();
        let (model, name) = match &self.model {
            Some(dir) => {
                let source = ModelSource::Dir(dir.clone());
                // Gone before the second, whose weights take its place.
                loads.push(load(&source, device.clone(), engine_options.clone())?.loading());
                let engine = load(&source, device.clone(), engine_options.clone())?;
                loads.push(engine.loading());
                (engine.model(), engine.name().to_owned())
            }
            None => {
                let name = self.synthetic_name(if kind == "cuda" { "14b" } else { "tiny" });
                let configs = synthetic::configs(name, self.layers)?;
                let model =
                    synthetic::model(&device, &configs, self.precision.into(), &options.kernels, self.seed)?;
                (Arc::new(model), format!("synthetic {name}, random weights"))
            }
        };
        let mut header = self.measured.header("model", &name, device.as_ref());
        header.notes.push(shape(&model));
        // The copy's buffers beside the weights: they are gone before a generation allocates.
        let ceilings = Ceilings::measure(&device, &options.effort, Sizes::for_device(device.as_ref()))?;
        ceilings.rows().into_iter().for_each(|row| show(row, &ceilings));
        let mut report = Report { header, ceilings: ceilings.clone(), rows: Vec::new() };
        self.measured.keep(&report)?;
        let mut done = |row: &Row| {
            show(row, &ceilings);
            report.rows.push(row.clone());
            // The figures are on their way to the terminal too: no reason to stop measuring.
            if let Err(error) = self.measured.keep(&report) {
                eprintln!("{error:#}");
            }
        };
        match &self.model {
            Some(dir) => loading::measure(dir, &device, &engine_options, &loads, &options.effort)?,
            None => vec![loading::nothing()],
        }
        .iter()
        .for_each(&mut done);
        model::run(&device, &model, &options, &ceilings, &mut done)?;
        let after = crate::measured::card().into_iter().skip(1).map(|line| format!("after: {line}"));
        report.header.card.extend(after);
        self.measured.write(&report)?;
        Ok(ExitCode::SUCCESS)
    }

    fn synthetic_name<'a>(&'a self, default: &'a str) -> &'a str {
        self.synthetic.as_deref().unwrap_or(default)
    }

    fn derived(&self) -> Result<ExitCode> {
        let options = self.options("cuda", "14b")?;
        if self.sizes.is_some() && options.sizes.len() != 1 {
            bail!(Error::request("sizes", "--derive is about one picture, of one size"));
        }
        let configs = synthetic::configs(self.synthetic_name("14b"), self.layers)?;
        let size = options.sizes.last().copied().unwrap_or((512, 512));
        let derived = derive(&configs, self.precision.into(), &options, size, self.bandwidth)?;
        self.measured.write_text(&match self.measured.format() {
            FormatName::Md => derived.markdown(),
            FormatName::Json => derived.json()?,
            FormatName::Csv => bail!(Error::request("format", "--derive writes md or json, not csv")),
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn options(&self, kind: &str, default_model: &str) -> Result<Options> {
        let gpu = kind == "cuda";
        // What is a moment on a GPU is minutes on the emulated device.
        let small = !gpu && self.model.is_none() && self.synthetic_name(default_model) == "tiny";
        let parsed: Result<Vec<(usize, usize)>> = match &self.sizes {
            Some(sizes) => sizes
                .iter()
                .filter(|text| !text.is_empty())
                .map(|text| parse_size(text).map(|(w, h)| (w as usize, h as usize)))
                .collect(),
            None if gpu => Ok(vec![(256, 256), (512, 512)]),
            None if small => Ok(vec![(32, 32), (64, 64)]),
            None => Ok(vec![(64, 64)]),
        };
        let parsed = match parsed {
            Ok(sizes) => sizes,
            Err(error) => bail!(Error::request("sizes", format!("{error:#}"))),
        };
        let mut effort: Effort = self.measured.effort(kind);
        if !gpu && self.synthetic_name(default_model) == "14b" {
            effort.warm_up = 0;
        }
        Ok(Options {
            steps: self.steps.unwrap_or(if gpu { 28 } else { 3 }),
            branches: self.branches.into(),
            images: self.batch as usize,
            prompt: self.prompt.unwrap_or(if gpu { 96 } else { 8 }) as usize,
            positions: match &self.positions {
                Some(Positions(positions)) => positions.clone(),
                None if gpu => vec![256, 1024, 4096],
                None => vec![16, 32],
            },
            sizes: parsed,
            end_to_end: !self.no_images,
            kernels: self.device.selection()?,
            effort,
            pictures: self.pictures.unwrap_or(if gpu { 5 } else { 1 }) as usize,
            seed: self.seed,
        })
    }
}

/// A finished row, for people who wait.
fn show(row: &Row, ceilings: &Ceilings) {
    let (test, ms) = (&row.test, row.median());
    if row.samples_ms.is_empty() {
        eprintln!("{test}: {}", row.note);
    } else if row.bytes == 0 {
        eprintln!("{test}: {ms:.3} ms");
    } else if row.floor == Floor::Copy {
        eprintln!("{test}: {ms:.3} ms, {:.3} of copy", row.gb_per_s() / ceilings.copy.gb_per_s());
    } else {
        eprintln!("{test}: {ms:.3} ms, {:.2} GB/s, {}", row.gb_per_s(), row.note);
    }
}

/// The sizes that decide bytes.
fn shape(model: &NextStep) -> String {
    let c = model.config();
    format!(
        "{} layers, hidden {}, MLP {}, heads {}/{} x {}, flow head {} x {}, {} bytes of weights in {}",
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.fm_head_layers,
        c.fm_head_dim,
        model.weight_bytes(),
        model.dtype().name()
    )
}
