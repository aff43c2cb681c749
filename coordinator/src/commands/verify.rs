//! `coordinator verify RUN_DIR`

use std::io::Write;

use anyhow::{Context, Result};

use super::Exit;
use crate::cli::VerifyArguments;
use crate::store::verify::{Item, Report, State, verify as look};
use crate::ui::{CheckingBar, LogFormat, Progress, logging};

/// Prints what every file of a run directory was found to be. Fails, by its exit,
/// where one is not as it was written.
///
/// # Errors
/// No run there, or a directory that cannot be read.
pub fn verify(arguments: &VerifyArguments) -> Result<Exit> {
    let progress = Progress::stderr();
    logging::init(&progress, LogFormat::Text, "warn,drift_coordinator::ui=info")?;
    let mut bar = CheckingBar::new(&progress);
    let report = look(&arguments.run_dir, &mut |what, bytes, more| bar.advance(what, bytes, more))?;
    bar.close();
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &report).context("write the report")?;
        writeln!(out)?;
    } else {
        out.write_all(render(&report, &arguments.run_dir.display().to_string()).as_bytes())?;
    }
    out.flush()?;
    Ok(if report.findings().next().is_none() { Exit::Finished } else { Exit::Failed })
}

fn render(report: &Report, root: &str) -> String {
    let mut text = String::new();
    if let Some(holder) = &report.live {
        text.push_str(&format!(
            "{root}: a coordinator works here ({holder}); what it has in hand is left out\n"
        ));
    }
    for item in &report.items {
        text.push_str(&line(item));
        text.push('\n');
    }
    let findings = report.findings().count();
    let items = report.items.len();
    text.push_str(&match findings {
        0 => format!("{root}: all is well ({items} items)\n"),
        1 => format!("{root}: 1 of {items} items is not as it was written\n"),
        _ => format!("{root}: {findings} of {items} items are not as they were written\n"),
    });
    text
}

/// `damaged  iterations/01/pairs.parquet has 12 bytes, expected 40; --resume …`
fn line(item: &Item) -> String {
    let state = match item.state {
        State::Ok => "ok",
        State::Note => "note",
        State::Damaged => "damaged",
        State::Missing => "missing",
        State::Extra => "extra",
    };
    let Item { name, found, remedy, .. } = item;
    match item.state {
        State::Ok | State::Note => format!("{state:<8} {name}: {found}"),
        _ => format!("{state:<8} {name} {found}; {remedy}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_has_file_place_expectation_and_remedy_in_one_line() {
        let item = |state, name: &str, found: &str, remedy| Item {
            state,
            name: name.to_owned(),
            found: found.to_owned(),
            remedy,
        };
        let items = vec![
            item(State::Ok, "config.toml", "as the run froze it", ""),
            item(
                State::Damaged,
                "iterations/01/pairs.parquet",
                "has 12 bytes, expected 40",
                "--resume makes it anew from the journal",
            ),
        ];
        let report = Report { live: Some("process 7 on a".to_owned()), items };
        assert_eq!(
            render(&report, "runs/a"),
            "runs/a: a coordinator works here (process 7 on a); what it has in hand is left out\n\
             ok       config.toml: as the run froze it\n\
             damaged  iterations/01/pairs.parquet has 12 bytes, expected 40; --resume makes it anew from the journal\n\
             runs/a: 1 of 2 items is not as it was written\n"
        );
        let well = Report { live: None, items: vec![report.items[0].clone()] };
        assert!(render(&well, "runs/a").ends_with("runs/a: all is well (1 items)\n"));
    }
}
