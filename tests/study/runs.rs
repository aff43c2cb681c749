//! One run of the real programs.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::Arguments;
use crate::evaluate::REPLY_TOKENS;
use crate::task::{Questions, write_corpus, write_seeds};

/// What all runs have in common: the questions are short, and so are the replies.
const SETTINGS: [&str; 9] = [
    "workers=1",
    "data.held_out=4",
    "text.max_length=256",
    "text.instruction=\"\"",
    "text.max_prompt_tokens=128",
    "sampling.max_prompt_tokens=256",
    "sampling.cache_budget=1GiB",
    "training.pairs_per_worker=4",
    "training.warmup_ratio=0.0",
];

/// Runs a method to its end; returns the run's directory.
pub(crate) fn run(
    arguments: &Arguments,
    method: &str,
    seed: u64,
    questions: &Questions,
) -> Result<PathBuf> {
    let dir = arguments.output.join(format!("{method}-{seed}"));
    if dir.join("summary.json").is_file() {
        return Ok(dir);
    }
    std::fs::create_dir_all(&arguments.output).context("make the study's folder")?;
    let corpus = arguments.output.join(format!("corpus-{seed}.jsonl"));
    let seeds = arguments.output.join(format!("seeds-{seed}.jsonl"));
    write_corpus(&corpus, questions)?;
    write_seeds(&seeds, questions)?;
    let program = std::env::current_exe()?.with_file_name("coordinator");
    let mut command = Command::new(&program);
    command.arg("--run-dir").arg(&dir);
    if dir.join("journal.sqlite").is_file() {
        command.arg("--resume");
    } else {
        command.arg("--model").arg(&arguments.model).arg("--corpus").arg(&corpus);
        command.arg("--seeds").arg(&seeds);
        let own = [
            format!("method={method}"),
            format!("seed={seed}"),
            format!("sampling.max_new_tokens={REPLY_TOKENS}"),
            format!("training.warm_start_epochs={}", arguments.warm_start_epochs),
            format!("training.iterations={}", arguments.iterations),
            format!("training.learning_rate={}", arguments.learning_rate),
            format!("launch.threads={}", arguments.threads),
        ];
        let settings = SETTINGS.iter().map(|text| (*text).to_owned()).chain(own);
        for setting in settings.chain(arguments.settings.iter().cloned()) {
            command.args(["--set", &setting]);
        }
    }
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DRIFT_") {
            command.env_remove(name);
        }
    }
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}; run `make build` first", program.display()))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{method} with seed {seed} ended with {}:\n{words}", output.status);
    }
    Ok(dir)
}
