//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use drift_proto::watch::WatchAddress;

use crate::store::names;

/// Turns conversations in which users were dissatisfied into a better chat model.
///
/// Without a subcommand it runs: warm start on seed pairs, then K iterations of
/// sampling fresh replies, pairing each with the reply that disappointed, and one
/// epoch of DPO; every iteration ends with a checkpoint that other programs load.
/// It starts its own workers, one per GPU (or CPU share).
#[derive(Debug, Parser)]
#[command(
    name = "coordinator",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  coordinator --workers 2
      the built-in demo: a small chat model and a small corpus, minutes on a laptop
  coordinator --workers 8 --model /models/Qwen2.5-7B-Instruct \\
      --corpus sat_dsat_annotation.json --run-dir runs/first
      your own model and conversations, with the paper's recipe
  coordinator --config mine.toml --set training.beta=0.2
      settings from a file, one of them changed
  coordinator --run-dir runs/first --resume
      go on after the last committed phase
  coordinator data sat_dsat_annotation.json
      what a file holds, and why what was dropped was dropped
  coordinator verify runs/first
      whether every file of a run is still the one that was written

Settings come from the recipe's defaults, then --config, then DRIFT__SECTION__KEY
variables, then flags. Without --config and --corpus the demo's settings take the
file's place. README.md lists them all.

Exit status: 0 finished, 1 failed, 2 bad usage or settings, 130 or 143 stopped by
Ctrl-C or SIGTERM (resumable)."
)]
pub struct Cli {
    /// Something other than a run.
    #[command(subcommand)]
    pub command: Option<Subcommands>,
    /// The run.
    #[command(flatten)]
    pub run: RunArguments,
}

/// Things to do besides running.
#[derive(Debug, Subcommand)]
pub enum Subcommands {
    /// Counts what conversation files hold: DSAT and SAT turns, seed pairs, and
    /// every record dropped, by reason.
    Data(DataArguments),
    /// Checks that every file of a run directory is the one that was written, by its
    /// hash, and the journal row by row. Changes nothing, also while a run is live.
    /// Exit status 1 where something is damaged or missing.
    Verify(VerifyArguments),
}

/// Arguments of a run.
#[derive(Debug, Clone, Args)]
pub struct RunArguments {
    /// Worker processes to start, one per GPU. With --resume: as many as there are
    /// now; the batch of a step stays as it was.
    #[arg(long, value_name = "N")]
    pub workers: Option<u32>,
    /// TOML file with settings. Without it: the recipe, or with no --corpus either,
    /// the built-in demo.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Model folder in Hugging Face format, or a name on the hub.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Files of conversations; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub corpus: Vec<String>,
    /// Files with seed pairs for the warm start; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub seeds: Vec<String>,
    /// Directory of the run; default runs/NAME-DATE.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Continue the run in --run-dir from its last committed phase, with the
    /// settings it began with; --workers may differ.
    #[arg(long, requires = "run_dir", conflicts_with_all = ["config", "model", "corpus", "seeds", "set"])]
    pub resume: bool,
    /// Go on with the run in --run-dir where there is one, and begin it where there is
    /// none: one command for whatever starts a program again. Where it goes on, the
    /// settings are those it began with.
    #[arg(long, requires = "run_dir", conflicts_with = "resume")]
    pub begin_or_resume: bool,
    /// Show /healthz, /readyz and Prometheus' /metrics at this port of loopback, or at
    /// IP:PORT. They tell numbers, no text, and to whoever asks.
    #[arg(long, value_name = "[IP:]PORT")]
    pub metrics: Option<WatchAddress>,
    /// One line per training step.
    #[arg(long)]
    pub log_steps: bool,
    /// Set any option, as in --set training.beta=0.2; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print the settings that result, as TOML, and do nothing else.
    #[arg(long)]
    pub print_config: bool,
}

impl RunArguments {
    /// Says now whether a run is gone on with, for who left it to what is there.
    pub fn settled(&self) -> Self {
        let begun = |dir: &PathBuf| dir.join(names::JOURNAL).exists();
        let resume =
            self.resume || self.begin_or_resume && self.run_dir.as_ref().is_some_and(begun);
        Self { resume, ..self.clone() }
    }

    /// Flags as `KEY=VALUE`; `--set` comes last and wins.
    pub fn overrides(&self) -> Vec<String> {
        let list = |key: &str, values: &[String]| {
            let quoted: Vec<_> =
                values.iter().map(|v| toml::Value::String(v.clone()).to_string()).collect();
            (!values.is_empty()).then(|| format!("{key}=[{}]", quoted.join(", ")))
        };
        let text = |key: &str, value: String| format!("{key}={}", toml::Value::String(value));
        [
            self.workers.map(|n| format!("workers={n}")),
            self.model.clone().map(|model| text("model", model)),
            list("corpus", &self.corpus),
            list("seeds", &self.seeds),
            self.run_dir.as_ref().map(|dir| text("run.dir", dir.display().to_string())),
            self.log_steps.then(|| "run.log_steps=true".to_owned()),
        ]
        .into_iter()
        .flatten()
        .chain(self.set.iter().cloned())
        .collect()
    }
}

/// Arguments of `data`.
#[derive(Debug, Args)]
pub struct DataArguments {
    /// Files to read.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Shape of the records, where content does not tell it: utterances
    /// (WildFeedback's annotation), dsat, pairs (WildFeedback's pairs,
    /// UltraFeedback) or messages (own conversations, WildChat).
    #[arg(long, default_value = "auto")]
    pub format: String,
    /// Share of malformed records above which a file is refused.
    #[arg(long, default_value_t = 0.01, value_name = "SHARE")]
    pub max_malformed: f64,
    /// A JSON array with one object per file, instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// Directory of the run.
    #[arg(value_name = "RUN_DIR")]
    pub run_dir: PathBuf,
    /// A JSON object with every item, instead of lines.
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_overrides_and_set_wins() {
        let cli = Cli::parse_from([
            "coordinator",
            "--workers",
            "2",
            "--corpus",
            "a \"b\".json",
            "--corpus",
            "c.json",
            "--set",
            "workers=3",
        ]);
        assert_eq!(
            cli.run.overrides(),
            ["workers=2", r#"corpus=['a "b".json', "c.json"]"#, "workers=3"]
        );
    }

    #[test]
    fn resuming_takes_no_settings() {
        let parsed =
            Cli::try_parse_from(["coordinator", "--resume", "--run-dir", "r", "--model", "m"]);
        assert!(parsed.is_err());
        let parsed =
            Cli::try_parse_from(["coordinator", "--resume", "--run-dir", "r", "--workers", "3"]);
        assert_eq!(parsed.unwrap().run.workers, Some(3), "but it may go on with other workers");
        assert!(Cli::try_parse_from(["coordinator", "--resume"]).is_err());
    }

    #[test]
    fn what_is_begun_is_gone_on_with_and_what_is_not_is_begun() {
        let dir = tempfile::tempdir().unwrap();
        let typed = |flag: &str| {
            let run_dir = dir.path().to_str().unwrap();
            let cli =
                Cli::parse_from(["coordinator", "--workers", "2", "--run-dir", run_dir, flag]);
            cli.run.settled().resume
        };
        assert!(!typed("--begin-or-resume"), "nothing was committed there");
        assert!(typed("--resume"), "and to ask for it is not to have it");
        std::fs::write(dir.path().join(names::JOURNAL), "").unwrap();
        assert!(typed("--begin-or-resume"));
        assert!(!typed("--log-steps"), "nobody goes on with a run unasked");
        assert!(Cli::try_parse_from(["coordinator", "--begin-or-resume"]).is_err());
    }
}
