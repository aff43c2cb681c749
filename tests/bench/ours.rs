//! Our side of `bench dpo`: one run, in a process of its own.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use drift_worker::LIBTORCH_VERSION;
use drift_worker::model::Decoder;
use drift_worker::train::{PairOutcome, ReferenceLogps, StepReport, TokenPair, Trainer};
use tch::Device;

use crate::job::{Job, Run, passes, token_pairs, train_step};
use crate::machine::{peak_bytes, processor_seconds};

/// An iteration's training work on the job's pairs.
pub(crate) fn run(job: &Job) -> Result<Run> {
    let Job { recipe, engine, .. } = job;
    tch::set_num_threads(job.threads as i32);
    let mut trainer = Trainer::new(Decoder::load(&job.model, job.dtype.kind(), Device::Cpu)?);
    let mut pairs = token_pairs(&job.pairs);

    let (mut step_seconds, mut losses, mut logps_chosen) = (Vec::new(), Vec::new(), Vec::new());
    let mut train = |trainer: &mut Trainer, batch: &[TokenPair]| -> Result<f64> {
        let begun = Instant::now();
        let passes = passes(batch, job.batch, engine.max_tokens);
        let step = train_step(losses.len() as u64, recipe.learning_rate, batch.len(), passes);
        let report = trainer.step(&step, None, &|| false)?;
        losses.push(mean(&report, |pair| pair.loss));
        logps_chosen.push(mean(&report, |pair| pair.logp_chosen));
        Ok(begun.elapsed().as_secs_f64())
    };
    trainer.begin(recipe.settings(engine), None)?;
    let (warm_up, timed) = pairs.split_at_mut(job.warm_up * job.batch);
    score(&trainer, warm_up, job.batch, engine.max_tokens)?;
    for batch in warm_up.chunks(job.batch) {
        train(&mut trainer, batch)?;
    }

    // An iteration of its own: the reference is the policy as the warm-up left it.
    let (user_before, system_before) = processor_seconds(Path::new("/proc/self"))?;
    let start = Instant::now();
    score(&trainer, timed, job.batch, engine.max_tokens)?;
    let scoring_seconds = start.elapsed().as_secs_f64();
    for batch in timed.chunks(job.batch) {
        step_seconds.push(train(&mut trainer, batch)?);
    }
    let seconds = start.elapsed().as_secs_f64();
    let (user, system) = processor_seconds(Path::new("/proc/self"))?;

    Ok(Run {
        seconds,
        scoring_seconds,
        step_seconds,
        user_seconds: user - user_before,
        system_seconds: system - system_before,
        peak_bytes: peak_bytes(Path::new("/proc/self"))?,
        losses,
        logps_chosen,
        versions: [("libtorch".to_owned(), LIBTORCH_VERSION.to_owned())].into(),
    })
}

/// Gives `pairs` their reference log-probabilities, computed in the passes of training.
pub(crate) fn score(
    trainer: &Trainer,
    pairs: &mut [TokenPair],
    batch: usize,
    max_tokens: usize,
) -> Result<()> {
    let passes: Vec<_> =
        pairs.chunks(batch).flat_map(|batch| passes(batch, batch.len(), max_tokens)).collect();
    let scores = trainer.score(&passes, &|| false)?;
    for (pair, logps) in pairs.iter_mut().zip(scores) {
        pair.reference = Some(ReferenceLogps { chosen: logps.chosen, rejected: logps.rejected });
    }
    Ok(())
}

fn mean(report: &StepReport, of: fn(&PairOutcome) -> f64) -> f64 {
    report.pairs.iter().map(of).sum::<f64>() / report.pairs.len() as f64
}
