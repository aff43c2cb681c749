//! `coordinator compare RUN_DIR…`

use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cli::CompareArguments;
use crate::compare::{QUANTITIES, RunMeasures, measure, plots, table};
use crate::store::publish::write_file;

/// Prints the runs side by side, and plots them where that is asked for.
///
/// # Errors
/// A folder that is no run's, or one of its files that cannot be read.
pub fn compare(arguments: &CompareArguments) -> Result<()> {
    let runs: Vec<_> = arguments.runs.iter().map(|dir| measure(dir)).collect::<Result<_>>()?;
    if let Some(folder) = &arguments.plots {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        write_file(&folder.join("compare.svg"), plots::svg(&QUANTITIES, &runs)?.as_bytes())?;
        write_file(&folder.join("compare.png"), &plots::png(&QUANTITIES, &runs)?)?;
    }
    let mut out = std::io::stdout().lock();
    if arguments.json {
        let runs: Vec<_> = runs.iter().map(in_json).collect();
        serde_json::to_writer_pretty(&mut out, &runs).context("write the comparison")?;
        writeln!(out)?;
    } else {
        writeln!(out, "{}", table::render(&QUANTITIES, &runs))?;
    }
    Ok(())
}

/// A run with its values by their names.
fn in_json(run: &RunMeasures) -> Value {
    let iterations = run.iterations.iter().map(|measured| {
        let named = QUANTITIES.iter().zip(&measured.values);
        let mut values: serde_json::Map<_, _> =
            named.map(|(quantity, value)| (quantity.name.to_owned(), json!(value))).collect();
        values.insert("iteration".to_owned(), json!(measured.iteration));
        Value::Object(values)
    });
    json!({
        "name": run.name,
        "method": run.method,
        "model": run.model,
        "iterations": iterations.collect::<Vec<_>>(),
    })
}
