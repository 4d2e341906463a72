//! `warpstep inspect`: what a checkpoint folder is made of, or what a PNG remembers.

use crate::console::printable;
use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use serde::de::IgnoredAny;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use warpstep::Error;
use warpstep::image::read_png_info;
use warpstep::model::config::ModelConfig;
use warpstep::tokenizer::{ModelTokenIds, Tokenizer};
use warpstep::weights::{CheckpointSummary, ModelSummary, OpenOptions, describe};

/// Describe a checkpoint folder, or print the parameters stored in a PNG.
///
/// A folder is opened and checked exactly as `generate` would: every tensor's name, shape and type, and the tokenizer.
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

/// What `inspect --json` says of a folder.
#[derive(Serialize)]
struct Folder<'a> {
    #[serde(flatten)]
    summary: &'a ModelSummary,
    tokenizer: &'a Option<TokenizerSummary>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum TokenizerSummary {
    /// It can be used with the model, and has so many tokens.
    Tokens(usize),
    /// It cannot.
    Error(String),
}

/// Loads a model's tokenizer as `generate` would.
fn tokenizer(dir: &Path, config: &ModelConfig) -> TokenizerSummary {
    let ids = ModelTokenIds {
        vocab_size: config.vocab_size,
        boi: config.boi,
        eoi: config.eoi,
        image_placeholder_id: config.image_placeholder_id,
    };
    match Tokenizer::from_dir(dir, ids) {
        Ok(tokenizer) => TokenizerSummary::Tokens(tokenizer.vocabulary()),
        Err(error) => TokenizerSummary::Error(error.to_string()),
    }
}

impl Inspect {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        if self.path.is_dir() { self.folder() } else { self.png() }
    }

    fn folder(&self) -> Result<ExitCode> {
        let summary = describe(&self.path, OpenOptions::default(), self.check_values)?;
        let tokenizer = summary.model.as_ref().map(|model| tokenizer(&self.path, &model.config));
        // Without one the folder is as good as none for any other command; the rest is said all the same.
        let code = match &tokenizer {
            Some(TokenizerSummary::Error(_)) => ExitCode::FAILURE,
            _ => ExitCode::SUCCESS,
        };
        if self.json {
            println!(
                "{}",
                serde_json::to_string_pretty(&Folder { summary: &summary, tokenizer: &tokenizer })?
            );
            return Ok(code);
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
        match &tokenizer {
            Some(TokenizerSummary::Tokens(tokens)) => println!("  tokenizer: ok, {tokens} tokens"),
            Some(TokenizerSummary::Error(error)) => println!("  tokenizer: {}", printable(error)),
            None => {}
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
        Ok(code)
    }

    fn png(&self) -> Result<ExitCode> {
        if self.check_values {
            return Err(Error::request("check-values", "is for the folder of a model or a VAE").into());
        }
        let info = read_png_info(&self.path)?;
        if self.json {
            let Some(json) = &info.json else {
                bail!("{} holds no warpstep parameters", self.path.display());
            };
            // Only checked: what is printed is what is stored, with every digit of its numbers.
            serde_json::from_str::<IgnoredAny>(json)
                .with_context(|| format!("{}: the warpstep parameters are not JSON", self.path.display()))?;
            println!("{}", printable_json(json));
            return Ok(ExitCode::SUCCESS);
        }
        println!("{}: {}x{} pixels", self.path.display(), info.width, info.height);
        match &info.parameters {
            Some(parameters) => println!("{}", printable(parameters)),
            None => println!("no parameters are stored"),
        }
        if let Some(json) = &info.json {
            println!("warpstep: {}", printable(json));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// JSON that says the same on one line, without characters that a terminal acts on: JSON has them in strings only, but
/// for the ends of lines between its parts.
fn printable_json(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\n' | '\r' | '\t' => shown.push(' '),
            _ if c.is_control() => shown += &format!("\\u{:04x}", u32::from(c)),
            _ => shown.push(c),
        }
    }
    shown
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
