//! `coordinator data FILE…`

use std::io::Write;

use anyhow::{Context, Result};

use crate::cli::DataArguments;
use crate::corpus::{ReadOptions, Report, report};
use crate::run::driver::named_format;
use crate::ui::{LogFormat, Progress, logging};

use super::reading::ReadingBar;

/// Prints what the files hold.
///
/// # Errors
/// A file that cannot be used.
pub fn data(arguments: &DataArguments) -> Result<()> {
    let options = ReadOptions {
        format: named_format(&arguments.format)?,
        max_malformed: arguments.max_malformed,
        ..ReadOptions::default()
    };
    let progress = Progress::stderr();
    logging::init(&progress, LogFormat::Text, "warn")?;
    let mut bar = ReadingBar::new(&progress);
    let counts = report(&arguments.files, &options, &mut |file, bytes| {
        let path = &arguments.files[file];
        bar.update(path, std::fs::metadata(path).map_or(0, |meta| meta.len()), bytes);
    })?;
    bar.close();
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer(&mut out, &counts).context("write counts")?;
        writeln!(out)?;
    } else {
        write!(out, "{}", Report(&counts))?;
    }
    Ok(())
}
