//! The `coordinator` program.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use drift_coordinator::cli::{Cli, Subcommands};
use drift_coordinator::commands::{Exit, check, compare, data, plan, run, verify};
use drift_coordinator::config::{ConfigError, Problems};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = match &cli.command {
        Some(Subcommands::Check(arguments)) => check(arguments).map(|()| Exit::Finished),
        Some(Subcommands::Compare(arguments)) => compare(arguments).map(|()| Exit::Finished),
        Some(Subcommands::Data(arguments)) => data(arguments).map(|()| Exit::Finished),
        Some(Subcommands::Plan(arguments)) => plan(arguments).map(|()| Exit::Finished),
        Some(Subcommands::Verify(arguments)) => verify(arguments),
        None => run(&cli.run),
    };
    match ended {
        Ok(Exit::Finished) => ExitCode::SUCCESS,
        Ok(Exit::Failed) => ExitCode::FAILURE,
        // What a shell reports for a program that the signal ended.
        Ok(Exit::Stopped(signal)) => ExitCode::from(128 + signal as u8),
        Err(cause) => {
            // Standard error may be closed; the status still tells.
            let _ = writeln!(std::io::stderr(), "error: {cause:#}");
            let settings = cause.is::<ConfigError>() || cause.is::<Problems>();
            ExitCode::from(if settings { 2 } else { 1 })
        }
    }
}
