//! The `warpstep` command: one file per verb. Human text goes to stderr, machine output to stdout.
//! Exit codes: 0 done, 1 failure, 2 usage, 130 cancelled.

// First, so that its macros stand in front of the standard library's everywhere.
#[macro_use]
mod console;

mod args;
mod bench;
mod compare;
mod complete;
mod doctor;
mod edit;
mod generate;
mod inspect;
mod kernels;
mod kernels_bench;
mod loading;
mod measured;
mod outputs;
mod picture;
mod prompts;
mod reconstruct;
mod think;
mod verify;

use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;
use warpstep::Error;

/// NextStep-1 on one Hopper GPU, or on this CPU through the emulated device.
///
/// Without --model the small demo model inside the binary is used, so that every command works on any machine:
///
///   warpstep generate "a red circle on a blue background" -o circle.png
#[derive(Parser)]
#[command(name = "warpstep", version, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

// A comment here would replace the one of the verb's own struct, and with it the examples in its help.
#[derive(Subcommand)]
enum Verb {
    Generate(generate::Generate),
    Edit(edit::Edit),
    Complete(complete::Complete),
    Reconstruct(reconstruct::Reconstruct),
    Compare(compare::Compare),
    Verify(verify::Verify),
    /// List the kernels, or test them against their references.
    #[command(subcommand)]
    Kernels(kernels::Kernels),
    Bench(bench::Bench),
    Inspect(inspect::Inspect),
    Doctor(doctor::Doctor),
}

/// Prints help, version or a usage error and ends the program. clap itself would hide that help could not be printed.
fn not_run(error: &clap::Error) -> ! {
    let printed = error.print().and_then(|()| std::io::stdout().flush());
    if !error.use_stderr() {
        console::written(printed);
    }
    std::process::exit(error.exit_code())
}

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| not_run(&error));
    let result = match cli.verb {
        Verb::Generate(verb) => verb.run(),
        Verb::Edit(verb) => verb.run(),
        Verb::Complete(verb) => verb.run(),
        Verb::Reconstruct(verb) => verb.run(),
        Verb::Compare(verb) => verb.run(),
        Verb::Verify(verb) => verb.run(),
        Verb::Kernels(verb) => verb.run(),
        Verb::Bench(verb) => verb.run(),
        Verb::Inspect(verb) => verb.run(),
        Verb::Doctor(verb) => verb.run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            match error.downcast_ref::<Error>() {
                Some(Error::Cancelled { .. } | Error::LoadCancelled { .. }) => ExitCode::from(130),
                Some(Error::InvalidRequest { .. }) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}
