use std::path::PathBuf;

use serde_json::json;

use super::*;
use crate::domain::{
    FinishReason, PairId, PairRow, PromptId, ReferenceLogps, Sample, ShardId, Side, Step, TokenPair,
};
use crate::store::pairs::write_pairs;
use crate::store::{Commit, CommittedPhase, Journal, Manifest, RunDir, RunMeta, Subject};

const CONFIG_TEXT: &str = "seed = 42\n";

fn pair(n: u64) -> PairRow {
    let (iteration, finish) = (Iteration(1), FinishReason::Stop);
    let from = Side::Sample { iteration, prompt: PromptId(n), index: 0, finish };
    PairRow {
        context: Vec::new(),
        chosen: format!("good {n}"),
        rejected: format!("bad {n}"),
        tokens: TokenPair {
            id: PairId(n),
            prompt: vec![1, 2],
            chosen: vec![3, 4],
            rejected: vec![5],
        },
        chosen_from: from.clone(),
        rejected_from: from,
        held_out: n == 0,
    }
}

/// A folder of weights with its manifest, whose entry is returned.
fn weights(folder: &Path, k: Iteration) -> FileEntry {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("model.safetensors"), format!("weights of {k}")).unwrap();
    fs::write(folder.join("config.json"), "{}\n").unwrap();
    let subject = Subject {
        run_id: "r1".into(),
        drift_version: "0.1.0".into(),
        iteration: k,
        base_model: "m".into(),
    };
    let none = BTreeMap::new();
    Manifest::build(folder, subject, &none, &mut |_| ()).unwrap().save(folder).unwrap();
    FileEntry::of_file(&folder.join("manifest.json"), &mut |_| ()).unwrap()
}

/// The run of two iterations; of the second one only an epoch of two is trained
/// unless it is to be finished.
fn a_run(root: &Path, finished: bool) -> (RunDir, Journal) {
    use CommittedPhase as C;
    let run = RunDir::create(root).unwrap();
    fs::write(run.config_path(), CONFIG_TEXT).unwrap();
    let meta = RunMeta {
        run_id: "r1".into(),
        config_sha256: hex(&Sha256::digest(CONFIG_TEXT)),
        created_at: 1.0,
        drift_version: "0.1.0".into(),
    };
    let mut journal = Journal::create(&run.journal_path(), &meta).unwrap();
    journal.next_generations(1).unwrap();
    journal.record_counts("start 1", &json!({ "workers": 1 })).unwrap();
    let commit = |journal: &mut Journal, k, phase, epoch: Option<u32>, detail| {
        let epoch = epoch.map(Epoch);
        journal.commit(&Commit { iteration: k, phase, epoch, at: 2.0, detail }).unwrap();
    };
    commit(&mut journal, Iteration(0), C::Prepared, None, json!({}));
    for k in [0, 1].map(Iteration) {
        run.make_iteration(k).unwrap();
        if k.0 > 0 {
            let tokens = vec![9, 8, 7];
            let sample =
                Sample { prompt: PromptId(0), index: 0, tokens, finish: FinishReason::Stop };
            journal.record_shard(k, ShardId(0), &[sample]).unwrap();
            commit(&mut journal, k, C::Sampled, None, json!({}));
        }
        let entry = write_pairs(&run.pairs(k), &[pair(0), pair(1), pair(2)]).unwrap();
        journal.record_file(&names::pairs(k), &entry).unwrap();
        commit(&mut journal, k, C::Paired, None, json!({ "train": 2, "held_out": 1 }));
        let logps = ReferenceLogps { chosen: -1.5, rejected: -2.5 };
        journal.record_reference(k, &[(PairId(0), logps)]).unwrap();
        commit(&mut journal, k, C::Scored, None, json!({ "workers": 1 }));
        let epochs = if k.0 == 1 && !finished { 1 } else { 2 };
        for epoch in 0..epochs {
            for step in 0..2 {
                let metrics = json!({ "loss": 0.7, "seconds": 1.0 });
                let step = Step(u64::from(epoch) * 2 + step);
                journal.record_step(k, Epoch(epoch), step, &metrics).unwrap();
            }
            let entry = weights(&run.snapshot(k, Epoch(epoch)), k);
            journal.record_file(&manifest_of(k, Epoch(epoch)), &entry).unwrap();
            commit(&mut journal, k, C::Trained, Some(epoch), json!({}));
            let detail = json!({ "eval_loss": 0.6 });
            commit(&mut journal, k, C::Evaluated, Some(epoch), detail);
        }
        let rows = metrics::rows(&journal, k).unwrap();
        metrics::write(&run.metrics(k), &rows).unwrap();
        if epochs == 2 {
            publish::publish_dir(&run.snapshot(k, Epoch(1)), &run.checkpoint(k)).unwrap();
            commit(&mut journal, k, C::Published, None, json!({}));
            run.prune_snapshots(k).unwrap();
        }
    }
    if finished {
        commit(&mut journal, Iteration(1), C::Finished, None, json!({}));
        fs::write(run.summary_path(), "{}\n").unwrap();
        journal.record_file(SUMMARY, &FileEntry::of_bytes(b"{}\n")).unwrap();
    }
    (run, journal)
}

fn look(root: &Path) -> Report {
    verify(root, &mut |_, _, _| ()).unwrap()
}

/// Findings as lines.
fn findings(root: &Path) -> Vec<String> {
    look(root)
        .findings()
        .map(|item| format!("{} {}; {}", item.name, item.found, item.remedy))
        .collect()
}

fn files(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in publish::list(&folder).unwrap() {
            let path = entry.path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files
}

#[test]
fn a_run_as_it_was_written_is_well_finished_or_not() {
    for finished in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (run, journal) = a_run(&dir.path().join("run"), finished);
        drop((run, journal));
        let root = dir.path().join("run");
        let before: Vec<_> = files(&root).iter().map(|path| fs::read(path).unwrap()).collect();
        let report = look(&root);
        assert_eq!(report.findings().collect::<Vec<_>>(), Vec::<&Item>::new());
        assert!(report.items.iter().all(|item| item.state == State::Ok), "{report:#?}");
        assert_eq!(report.live, None);
        let after: Vec<_> = files(&root).iter().map(|path| fs::read(path).unwrap()).collect();
        assert!(before == after, "looking changes nothing");
    }
}

/// Every file of a finished run: cut in half, one bit of its middle flipped, gone.
#[test]
fn each_damaged_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    drop(a_run(&dir.path().join("run"), true));
    let root = dir.path().join("run");
    for path in files(&root) {
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        // Of the journal, where something is: SQLite fills its pages from their ends.
        let at = match name.as_str() {
            names::JOURNAL => whole.windows(8).position(|part| part == b"eval_los").unwrap(),
            _ => whole.len() / 2,
        };
        flipped[at] ^= 1;
        let cut = &whole[..whole.len() / 2];
        for (how, bytes) in [("cut", Some(cut)), ("flipped", Some(&flipped[..])), ("gone", None)] {
            match bytes {
                Some(bytes) => fs::write(&path, bytes).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let found = findings(&root);
            fs::write(&path, &whole).unwrap();
            if name == names::LOCK {
                assert!(found.is_empty(), "{name} {how}: {found:?}");
                continue;
            }
            assert!(found.iter().any(|line| line.starts_with(&name)), "{name} {how}: {found:?}");
            let remedy = found[0].rsplit("; ").next().unwrap();
            assert!(remedy.contains("--resume") || remedy.contains("restore"), "{found:?}");
        }
    }
    assert!(findings(&root).is_empty());
}

#[test]
fn findings_name_the_place_and_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    drop(a_run(&dir.path().join("run"), true));
    let root = dir.path().join("run");
    let metrics = root.join("iterations/01/metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, text.replacen("\"step\":1", "\"step\":7", 1)).unwrap();
    fs::write(root.join("iterations/00/checkpoint/config.json"), "{}").unwrap();
    fs::write(root.join("iterations/01/checkpoint/notes.txt"), "mine").unwrap();
    fs::create_dir(root.join("snapshots/01-epoch-0.damaged-1")).unwrap();
    assert_eq!(
        findings(&root),
        [
            "iterations/00/checkpoint/config.json has 2 bytes, expected 3; restore it from a backup, or move the folder away: no later iteration needs it any more",
            "iterations/01/metrics.jsonl line 2 is not the one that the journal's steps make; --resume makes it anew from the journal",
            "iterations/01/checkpoint/notes.txt is not in its folder's manifest.json; move it away",
        ]
    );
    let notes: Vec<_> = look(&root).items.into_iter().filter(|i| i.state == State::Note).collect();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert_eq!(notes[0].name, "snapshots/01-epoch-0.damaged-1");
}

#[test]
fn what_a_killed_run_goes_on_from_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("run");
    drop(a_run(&root, false));
    let snapshot = root.join("snapshots/01-epoch-0");
    fs::rename(&snapshot, root.join("elsewhere")).unwrap();
    let found = findings(&root);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("snapshots/01-epoch-0 is missing; --resume goes back"));
    // Renamed into the checkpoint's place, with its commit still to come.
    fs::rename(root.join("elsewhere"), root.join("iterations/01/checkpoint")).unwrap();
    assert!(findings(&root).is_empty());
    // Its metrics may be behind, or end in a torn line; not be others.
    let metrics = root.join("iterations/01/metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, &text[..text.len() - 5]).unwrap();
    assert!(findings(&root).is_empty());
    fs::write(&metrics, text.replace("0.7", "0.8")).unwrap();
    assert!(findings(&root)[0].contains("metrics.jsonl line 1 "));
}

#[test]
fn a_journal_that_lost_its_tail_is_told_by_the_files_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("run");
    let (_run, journal) = a_run(&root, true);
    // As a kill leaves it.
    let copy = dir.path().join("copy");
    assert!(
        std::process::Command::new("cp").arg("-r").args([&root, &copy]).status().unwrap().success()
    );
    drop(journal);
    assert!(findings(&copy).is_empty());
    // What is cut off the database here is in the log as well.
    let database = fs::read(copy.join(names::JOURNAL)).unwrap();
    fs::write(copy.join(names::JOURNAL), &database[..database.len() - 1]).unwrap();
    let found = findings(&copy);
    assert!(found[0].starts_with("journal.sqlite has "), "{found:?}");
    fs::write(copy.join(names::JOURNAL), &database).unwrap();
    let log = copy.join(names::JOURNAL_LOG);
    let whole = fs::read(&log).unwrap();
    fs::write(&log, &whole[..whole.len() / 2]).unwrap();
    let found = findings(&copy);
    assert!(
        found.iter().any(|line| line.starts_with("journal.sqlite-wal does not check from byte"))
    );
    fs::remove_file(&log).unwrap();
    let found = findings(&copy);
    assert!(found[0].starts_with("journal.sqlite ends with commit 0; iterations/00/"), "{found:?}");
    assert!(found[0].contains("journal.sqlite-wal"), "{found:?}");
}

#[test]
fn a_live_run_is_looked_at_and_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("run");
    let (_run, _journal) = a_run(&root, false);
    fs::remove_dir_all(root.join("snapshots/01-epoch-0")).unwrap();
    let report = look(&root);
    assert!(report.live.clone().unwrap().starts_with("process "), "{:?}", report.live);
    assert!(report.findings().next().is_none(), "what it has in hand is left out: {report:#?}");
    fs::remove_file(root.join("iterations/00/checkpoint/config.json")).unwrap();
    let found = findings(&root);
    assert!(found[0].starts_with("iterations/00/checkpoint/config.json is missing"), "{found:?}");
}

#[test]
fn a_directory_without_a_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let message = verify(dir.path(), &mut |_, _, _| ()).unwrap_err().to_string();
    assert!(message.contains("no run in"), "{message}");
}
