//! One run: from an empty directory until its samples are in the journal.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use drift_coordinator::domain::{FinishReason, Iteration};
use drift_coordinator::store::Journal;

use crate::coordinator::{Coordinator, Usage, size};
use crate::fleet::{Fleet, reply};
use crate::tally::{Tally, quantile};
use crate::{Arguments, Rate, corpus, model};

/// What all runs have in common.
pub(crate) struct Bed<'a> {
    folder: PathBuf,
    arguments: &'a Arguments,
}

/// What came of one.
pub(crate) struct Measured {
    pub(crate) workers: u32,
    pub(crate) rate: Rate,
    pub(crate) prompts: u64,
    /// From its start to its door's opening, from there to the first lease, and from
    /// that to the phase's commit.
    pub(crate) preparing: f64,
    pub(crate) attaching: f64,
    pub(crate) sampling: f64,
    /// From a result being sent to the next lease, in seconds.
    pub(crate) wait_p50: f64,
    pub(crate) wait_p99: f64,
    /// From a connection's end to its lease being another's, in seconds.
    pub(crate) recoveries: Vec<f64>,
    pub(crate) before: Usage,
    pub(crate) after: Usage,
    pub(crate) journal_bytes: u64,
}

impl<'a> Bed<'a> {
    /// Makes the model's text side and the corpus.
    pub(crate) fn make(folder: &Path, arguments: &'a Arguments) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let demo = root.join("../.cache/models/SmolLM2-135M-Instruct");
        model::write(&demo, &folder.join("model"))
            .context("make the small model; `make setup` exports the one it is made of")?;
        corpus::write(&folder.join("corpus.jsonl"), arguments.prompts)?;
        Ok(Self { folder: folder.to_owned(), arguments })
    }

    /// Runs until everything is sampled, and looks at what the journal then holds.
    pub(crate) fn measure(&self, workers: u32, rate: Rate) -> Result<Measured> {
        let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
        let dir = self.folder.join("run");
        let measured = runtime.block_on(self.sample(&dir, workers, rate))?;
        drop(runtime);
        self.check(&dir, measured.recoveries.len())?;
        let journal_bytes = size(&dir.join("journal.sqlite"));
        std::fs::remove_dir_all(&dir).context("remove the run")?;
        Ok(Measured { journal_bytes, ..measured })
    }

    async fn sample(&self, dir: &Path, workers: u32, rate: Rate) -> Result<Measured> {
        let Arguments { prompts, shard_prompts, losses, .. } = *self.arguments;
        let began = Instant::now();
        let mut coordinator = Coordinator::start(&self.settings(dir, workers), self.arguments)?;
        coordinator.until("wait for workers", None).await?;
        let preparing = began.elapsed().as_secs_f64();

        let (address, bearer) = Fleet::way_in(&dir.join("join"))?;
        let leases = prompts / u64::from(shard_prompts);
        let fleet = Arc::new(Fleet {
            address,
            bearer,
            seconds_per_prompt: rate.map_or(0.0, |rate| f64::from(workers) / rate),
            reply_tokens: self.arguments.reply_tokens,
            losing: Mutex::new((1..=losses).map(|n| leases * n / (losses + 1)).collect()),
            tally: Tally::default(),
        });
        let opened = Instant::now();
        fleet.start(workers);
        coordinator.until("begin iteration=1 phase=Sampling", Some(&fleet.tally)).await?;
        let before = coordinator.usage()?;
        coordinator.until("committed iteration=1 phase=sampled", Some(&fleet.tally)).await?;
        let (after, ended) = (coordinator.usage()?, Instant::now());
        coordinator.kill().await?;

        let mut seen = fleet.tally.seen();
        let first = seen.first.context("no lease was given")?;
        let recoveries = std::mem::take(&mut seen.recoveries);
        let lost = losses.min(leases.saturating_sub(1));
        ensure!(recoveries.len() as u64 == lost, "{lost} workers were lost: {recoveries:?}");
        Ok(Measured {
            workers,
            rate,
            prompts,
            preparing,
            attaching: (first - opened).as_secs_f64(),
            sampling: (ended - first).as_secs_f64(),
            wait_p50: quantile(&mut seen.waits, 0.5).context("no second lease was given")?,
            wait_p99: quantile(&mut seen.waits, 0.99).context("no second lease was given")?,
            recoveries,
            before,
            after,
            journal_bytes: 0,
        })
    }

    fn settings(&self, dir: &Path, workers: u32) -> Vec<String> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let mut arguments = vec![
            format!("--workers={workers}"),
            format!("--run-dir={}", dir.display()),
            format!("--model={}", path("model")),
            format!("--corpus={}", path("corpus.jsonl")),
        ];
        for setting in [
            "launch.start=none",
            "data.format=dsat",
            "data.held_out=1",
            "text.instruction=\"Answer again.\"",
            "training.warm_start_epochs=0",
            "training.iterations=1",
            &format!("sampling.shard_prompts={}", self.arguments.shard_prompts),
        ] {
            arguments.extend(["--set".to_owned(), setting.to_owned()]);
        }
        arguments
    }

    /// Every prompt was sampled once, the journal has what was replied, and nobody was
    /// lost but those that closed their connections.
    fn check(&self, dir: &Path, closed: usize) -> Result<()> {
        let (journal, _) = Journal::open(&dir.join("journal.sqlite"))?;
        let counts = journal.counts()?;
        let lost = counts.iter().filter(|(kind, _)| kind.starts_with("loss ")).count();
        ensure!(lost == closed, "{lost} workers were lost, and {closed} closed their connection");
        let samples = journal.samples(Iteration(1))?;
        let mut left: BTreeSet<u64> = (0..self.arguments.prompts).collect();
        for sample in &samples {
            let prompt = sample.prompt.0;
            ensure!(left.remove(&prompt), "prompt {prompt} is none, or was sampled twice");
            ensure!(sample.index == 0, "prompt {prompt} has a sample {}", sample.index);
            let is_whole = sample.tokens == reply(prompt, self.arguments.reply_tokens)
                && sample.finish == FinishReason::Stop;
            ensure!(is_whole, "prompt {prompt} has another reply: {sample:?}");
        }
        ensure!(left.is_empty(), "{} prompts were not sampled", left.len());
        Ok(())
    }
}
