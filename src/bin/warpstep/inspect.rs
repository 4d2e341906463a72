//! `warpstep inspect`: what a checkpoint folder is made of, or what a PNG remembers.

use anyhow::{Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use warpstep::image::read_png_info;
use warpstep::weights::{CheckpointSummary, OpenOptions, describe};

/// Describe a checkpoint folder, or print the parameters stored in a PNG.
///
/// A folder is opened and checked exactly as `generate` would: every tensor's name, shape and type.
#[derive(Args)]
pub struct Inspect {
    /// Folder of a model or a VAE, or a PNG made by warpstep.
    path: PathBuf,

    /// Read every value, and warn of tensors that hold NaN or infinity, or nothing but zeros.
    #[arg(long)]
    check_values: bool,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        if self.path.is_dir() { self.folder() } else { self.png() }
    }

    fn folder(&self) -> Result<ExitCode> {
        let summary = describe(&self.path, OpenOptions::default(), self.check_values)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&summary)?);
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(model) = &summary.model {
            let c = &model.config;
            print_checkpoint("model", model);
            println!(
                "  transformer: {} layers, hidden {}, {} query / {} key-value heads of {}, MLP {}, vocabulary {}",
                c.num_hidden_layers,
                c.hidden_size,
                c.num_attention_heads,
                c.num_key_value_heads,
                c.head_dim,
                c.intermediate_size,
                c.vocab_size
            );
            println!(
                "  flow head: {} blocks of {}; tokens of {} numbers; position table: {}",
                c.fm_head_layers,
                c.fm_head_dim,
                c.token_dim(),
                if c.use_gen_pos_embed { "yes" } else { "no" }
            );
            println!(
                "  text: {}{}; on the device only for complete, --think and --refine",
                if c.tie_word_embeddings { "embedding table as LM head" } else { "LM head" },
                if c.use_mlp_before_lm_head { ", behind before_lm_head" } else { "" }
            );
        }
        if let Some(vae) = &summary.vae {
            print_checkpoint("vae", vae);
            let c = &vae.config;
            println!(
                "  channels {:?}, latent {}, 1/{} of the pixels a side, scale {}, shift {}",
                c.block_out_channels,
                c.z_channels,
                c.downsample_factor(),
                c.scaling_factor,
                c.shift_factor
            );
        }
        for warning in &summary.warnings {
            println!("warning: {warning}");
        }
        Ok(ExitCode::SUCCESS)
    }

    fn png(&self) -> Result<ExitCode> {
        let info = read_png_info(&self.path)?;
        if self.json {
            let Some(json) = &info.json else {
                bail!("{} holds no warpstep parameters", self.path.display());
            };
            println!("{json}");
            return Ok(ExitCode::SUCCESS);
        }
        println!("{}: {}x{} pixels", self.path.display(), info.width, info.height);
        match &info.parameters {
            Some(parameters) => println!("{parameters}"),
            None => println!("no parameters are stored"),
        }
        if let Some(json) = &info.json {
            println!("warpstep: {json}");
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_checkpoint<C>(what: &str, summary: &CheckpointSummary<C>) {
    let path: &Path = &summary.path;
    println!(
        "{what} {}: {} parameters in {} tensors, {} files",
        path.display(),
        summary.parameter_count(),
        summary.tensors,
        summary.files.len()
    );
    let list = |items: Vec<String>| items.join(", ");
    println!(
        "  bytes: {}; parameters: {}",
        list(summary.bytes_by_dtype.iter().map(|(dtype, bytes)| format!("{dtype} {bytes}")).collect()),
        list(
            summary
                .parameters
                .iter()
                .map(|(part, count)| format!("{part:?} {count}").to_lowercase())
                .collect()
        )
    );
}
