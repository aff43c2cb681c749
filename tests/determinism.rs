//! Same configuration, seed and number of workers: the same bytes, killed or not.

use std::path::Path;

use drift_coordinator::domain::{Iteration, Sample};
use drift_coordinator::store::Journal;

use crate::support::{
    address, demo_model, ended, eventually, first_steps_are_ln_2, processes, published, resume,
    short, small, small_model, succeeds,
};

/// Two undisturbed runs, and one that loses its coordinator to SIGKILL after every single
/// commit: three times the same files, byte for byte.
#[test]
fn runs_end_with_the_same_bytes_killed_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| folder.path().join(name);
    let model = run("model");
    small_model::write(&demo_model(), &model).unwrap();
    let begin = |run: &Path| {
        let mut command = short(run, "2");
        command.args(["--model", model.to_str().unwrap()]);
        command.args(["--set", "sampling.cache_budget=\"64MiB\""]);
        command
    };

    let once = run("once");
    succeeds(begin(&once));
    first_steps_are_ln_2(&once, 1);
    let expected = published(&once);
    assert!(expected.contains_key("01/checkpoint/model.safetensors"));
    assert!(expected.contains_key("01/pairs.parquet"));
    assert!(expected.contains_key("01/metrics.jsonl"));

    let twice = run("twice");
    succeeds(begin(&twice));
    assert_eq!(published(&twice), expected, "two undisturbed runs");

    let killed = run("killed");
    let mut commits = Vec::new();
    while commits.last().is_none_or(|last: &String| !last.contains("phase=finished")) {
        let mut command = if commits.is_empty() { begin(&killed) } else { resume(&killed) };
        command.env("DRIFT_FAULT", "committed");
        let ended = ended(command);
        assert_eq!(ended.signal, Some(9), "{}", ended.stderr);
        let mut of_this = ended.stderr.lines().filter(|line| line.contains(" committed "));
        commits.push(of_this.next().unwrap_or_else(|| panic!("{}", ended.stderr)).to_owned());
        assert_eq!(of_this.next(), None, "it dies of its first commit");
        // Its workers notice and go; the lock is the dead process's no more.
        if let Some(address) = address(&ended.stderr) {
            let slot = format!("worker --coordinator {address}");
            eventually(15, "workers outlive their coordinator", || processes(&slot).is_empty());
        }
    }
    // Prepared; warm start: paired, scored, 2 × (trained, evaluated), published;
    // iteration 1: sampled, paired, scored, trained, evaluated, published; finished.
    assert_eq!(commits.len(), 15, "{commits:#?}");
    succeeds(resume(&killed));
    assert_eq!(published(&killed), expected, "killed after every commit");

    // A finished run has nothing left to do, and says what it did.
    let again = ended(resume(&killed));
    assert_eq!(again.code, Some(0));
    assert!(again.stdout.contains("checkpoint:"), "{}", again.stdout);
    assert_eq!(published(&killed), expected);
}

/// Replies drawn in the first iteration of a run. Without a warm start all sample from the
/// model as it is: trained on another number of ranks, it would differ in its last bits.
fn replies(run: &Path, model: &Path, workers: &str, settings: &[&str]) -> Vec<Sample> {
    let mut command = small(run, workers, model);
    let common = ["data.limit=24", "sampling.max_new_tokens=48", "training.warm_start_epochs=0"];
    for setting in common.iter().chain(settings) {
        command.args(["--set", setting]);
    }
    succeeds(command);
    let (journal, _) = Journal::open(&run.join("journal.sqlite")).unwrap();
    let samples = journal.samples(Iteration(1)).unwrap();
    assert!(samples.len() >= 20, "{}", samples.len());
    samples
}

/// What is drawn depends neither on who draws it nor on guesses: from the same weights,
/// one, two and three workers, guessing or not, give the same replies in fp32; in bf16 as
/// many workers do.
#[test]
fn replies_are_the_same_whoever_draws_them_and_with_guesses_or_without() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small_model::write(&demo_model(), &model).unwrap();
    let of = |dtype: &str, workers: &str, drafting: bool| {
        let run = folder.path().join(format!("{dtype}-{workers}-{drafting}"));
        let settings = [format!("training.dtype={dtype}"), format!("sampling.drafting={drafting}")];
        replies(&run, &model, workers, &settings.each_ref().map(String::as_str))
    };
    let first = of("f32", "1", true);
    for (workers, drafting) in [("2", true), ("3", true), ("2", false), ("3", false)] {
        assert!(first == of("f32", workers, drafting), "{workers} workers, {drafting}");
    }
    for workers in ["1", "2", "3"] {
        assert!(of("bf16", workers, true) == of("bf16", workers, false), "{workers} in bf16");
    }
}
