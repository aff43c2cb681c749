//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use drift_proto::watch::WatchAddress;

use crate::config::ByteSize;
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
  coordinator check --config qwen2.5-7b-wildfeedback-drift
      what the paper's run would do, before it does it
  coordinator plan --config qwen2.5-14b-wildfeedback-drift --gpus 8 --gpu-memory 80GiB
      whether it fits, and how long it takes
  coordinator data sat_dsat_annotation.json
      what a file holds, and why what was dropped was dropped
  coordinator verify runs/first
      whether every file of a run is still the one that was written

Settings come from the recipe's defaults, then --config, then DRIFT__SECTION__KEY
variables, then flags. Without --config and --corpus the demo's settings take the
file's place. README.md lists them all.

Exit status: 0 finished, 1 failed, 2 bad usage or settings, 130 or 143 stopped by
Ctrl-C or SIGTERM, 138 by SIGUSR1, which saves what is under way first (resumable)."
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
    /// Tells what a run would do: method, counts, lengths, steps of each iteration,
    /// learning rates. Downloads nothing, starts nothing, writes nothing.
    Check(CheckArguments),
    /// Puts runs side by side, by iteration: loss, margin, accuracy, drift, signal,
    /// gradient norm, sample length, diversity; as a table, and as plots. Runs may be
    /// going on.
    Compare(CompareArguments),
    /// Counts what conversation files hold: DSAT and SAT turns, seed pairs, and
    /// every record dropped, by reason.
    Data(DataArguments),
    /// Counts memory and time of a run on GPUs from the model's config.json and settings:
    /// what each GPU holds in each phase, whether it fits, and the fastest settings that do.
    Plan(PlanArguments),
    /// Checks that every file of a run directory is the one that was written, by its
    /// hash, and the journal row by row. Changes nothing, also while a run is live.
    /// Exit status 1 where something is damaged or missing.
    Verify(VerifyArguments),
}

/// What says which settings a run has.
#[derive(Debug, Clone, Args)]
pub struct SettingsArguments {
    /// Worker processes to start, one per GPU. With --resume: as many as there are
    /// now; the batch of a step stays as it was.
    #[arg(long, value_name = "N", alias = "gpus")]
    pub workers: Option<u32>,
    /// TOML file with settings, or the name of settings that are built in, such as
    /// qwen2.5-7b-wildfeedback-drift. Without it: the recipe, or with no --corpus
    /// either, the built-in demo.
    #[arg(long, value_name = "FILE|NAME")]
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
    /// Set any option, as in --set training.beta=0.2; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Arguments of a run.
#[derive(Debug, Clone, Args)]
pub struct RunArguments {
    /// Its settings.
    #[command(flatten)]
    pub settings: SettingsArguments,
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
}

impl SettingsArguments {
    /// Flags as `KEY=VALUE`; `--set` comes last and wins.
    pub fn overrides(&self) -> Vec<String> {
        self.overrides_with([])
    }

    /// The same, with others ahead of what `--set` says.
    fn overrides_with(&self, others: impl IntoIterator<Item = String>) -> Vec<String> {
        let list = |key: &str, values: &[String]| {
            let quoted: Vec<_> =
                values.iter().map(|v| toml::Value::String(v.clone()).to_string()).collect();
            (!values.is_empty()).then(|| format!("{key}=[{}]", quoted.join(", ")))
        };
        [
            self.workers.map(|n| format!("workers={n}")),
            self.model.clone().map(|model| text("model", model)),
            list("corpus", &self.corpus),
            list("seeds", &self.seeds),
        ]
        .into_iter()
        .flatten()
        .chain(others)
        .chain(self.set.iter().cloned())
        .collect()
    }
}

impl RunArguments {
    /// Flags as `KEY=VALUE`; `--set` comes last and wins.
    pub fn overrides(&self) -> Vec<String> {
        let dir = self.run_dir.as_ref().map(|dir| text("run.dir", dir.display().to_string()));
        let log_steps = self.log_steps.then(|| "run.log_steps=true".to_owned());
        self.settings.overrides_with(dir.into_iter().chain(log_steps))
    }
}

/// `KEY=VALUE` with a value that is text, whatever stands in it.
fn text(key: &str, value: String) -> String {
    format!("{key}={}", toml::Value::String(value))
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct CheckArguments {
    /// The settings that are looked at.
    #[command(flatten)]
    pub settings: SettingsArguments,
    /// A JSON object, instead of lines and tables.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct PlanArguments {
    /// The settings that are looked at.
    #[command(flatten)]
    pub settings: SettingsArguments,
    /// Memory of each GPU, as in 80GiB.
    #[arg(long, value_name = "SIZE", default_value = "80GiB", value_parser = size)]
    pub gpu_memory: u64,
    /// Pairs of an iteration.
    #[arg(long, value_name = "N", default_value_t = 4000, value_parser = clap::value_parser!(u64).range(1..))]
    pub pairs: u64,
    /// Tokens of a prompt on average; without it: as many as the settings allow.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub prompt_tokens: Option<u64>,
    /// Tokens of a reply on average; without it: as many as the settings allow.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub reply_tokens: Option<u64>,
    /// TFLOP/s of matrix products that a GPU reaches; an H100's in bf16.
    #[arg(long, value_name = "N", default_value_t = 445.0)]
    pub matrix_tflops: f64,
    /// GB/s that a GPU reads its memory with.
    #[arg(long, value_name = "N", default_value_t = 2500.0)]
    pub memory_gb: f64,
    /// GB/s that a GPU exchanges with others.
    #[arg(long, value_name = "N", default_value_t = 300.0)]
    pub link_gb: f64,
    /// A JSON object, instead of lines and tables.
    #[arg(long)]
    pub json: bool,
}

/// Bytes of a size as people write it.
fn size(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>().map(|size| size.0)
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

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct CompareArguments {
    /// Directories of the runs.
    #[arg(required = true, value_name = "RUN_DIR")]
    pub runs: Vec<PathBuf>,
    /// Also writes compare.svg and compare.png to this folder.
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// A JSON array with one object per run, instead of a table.
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
        assert_eq!(
            parsed.unwrap().run.settings.workers,
            Some(3),
            "but it may go on with other workers"
        );
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
