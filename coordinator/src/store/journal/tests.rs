use std::fs;

use serde_json::json;

use super::*;
use crate::domain::{FinishReason, PairId, PromptId, ReferenceLogps, Sample, ShardId, Step};
use crate::store::manifest::{self, Manifest};

fn meta() -> RunMeta {
    RunMeta {
        run_id: "r1".into(),
        config_sha256: "ab".repeat(32),
        created_at: 1_790_000_000.25,
        drift_version: "0.1.0".into(),
    }
}

pub(super) fn journal() -> (tempfile::TempDir, Journal) {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::create(&dir.path().join("journal.sqlite"), &meta()).unwrap();
    (dir, journal)
}

/// What a killed coordinator leaves: the database and its write-ahead log,
/// copied while the journal is open.
fn after_a_kill(dir: &tempfile::TempDir) -> (tempfile::TempDir, PathBuf) {
    let copy = tempfile::tempdir().unwrap();
    for file in ["journal.sqlite", "journal.sqlite-wal"] {
        fs::copy(dir.path().join(file), copy.path().join(file)).unwrap();
    }
    let path = copy.path().join("journal.sqlite");
    (copy, path)
}

pub(super) fn sample(prompt: u64, index: u32, tokens: &[u32]) -> Sample {
    let finish = FinishReason::Stop;
    Sample { prompt: PromptId(prompt), index, tokens: tokens.to_vec(), finish }
}

pub(super) fn commit(iteration: u32, phase: CommittedPhase, epoch: Option<u32>) -> Commit {
    Commit {
        iteration: Iteration(iteration),
        phase,
        epoch: epoch.map(Epoch),
        at: 1_790_000_001.5,
        detail: json!({ "seconds": 0.1, "pairs": 12 }),
    }
}

#[test]
fn what_was_committed_is_there_after_a_kill() {
    let (dir, mut journal) = journal();
    assert_eq!(journal.next_generations(1).unwrap(), 1..2);
    let commits = [
        commit(0, CommittedPhase::Prepared, None),
        commit(0, CommittedPhase::Trained, Some(0)),
        commit(0, CommittedPhase::Trained, Some(1)),
        commit(1, CommittedPhase::Sampled, None),
    ];
    for commit in &commits {
        journal.commit(commit).unwrap();
    }
    journal.record_counts("corpus", &json!({ "dsat": 7 })).unwrap();
    journal.record_counts("corpus", &json!({ "dsat": 8 })).unwrap();

    let (_copy, path) = after_a_kill(&dir);
    assert!(!dir.path().join("journal.sqlite-shm").exists(), "no shared memory is needed");
    let (mut reopened, read) = Journal::open(&path).unwrap();
    assert_eq!(read, meta());
    assert_eq!(reopened.commits().unwrap(), commits);
    assert_eq!(reopened.counts().unwrap(), [("corpus".to_owned(), json!({ "dsat": 8 }))]);
    assert_eq!(reopened.next_generations(3).unwrap(), 2..5);
    drop(reopened);
    assert_eq!(Journal::open(&path).unwrap().0.next_generations(1).unwrap(), 5..6);
}

#[test]
fn a_phase_is_committed_once() {
    let (_dir, mut journal) = journal();
    journal.commit(&commit(1, CommittedPhase::Trained, Some(2))).unwrap();
    let refused = journal.commit(&commit(1, CommittedPhase::Trained, Some(2))).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "iteration 1 has committed trained of epoch 2 already; a phase is committed once"
    );
    journal.commit(&commit(1, CommittedPhase::Paired, None)).unwrap();
    assert!(journal.commit(&commit(1, CommittedPhase::Paired, None)).is_err());
    assert_eq!(journal.commits().unwrap().len(), 2);
}

#[test]
fn a_shard_that_runs_twice_adds_nothing_twice() {
    let (_dir, mut journal) = journal();
    let one = Iteration(1);
    let first = [sample(4, 1, &[5, 6]), sample(4, 0, &[u32::MAX])];
    assert!(journal.record_shard(one, ShardId(9), &first).unwrap());
    assert!(!journal.record_shard(one, ShardId(9), &first).unwrap());
    // Another shard with a key that is there: its new key is not added either.
    let overlapping = [sample(3, 0, &[1]), sample(4, 1, &[1])];
    assert!(!journal.record_shard(one, ShardId(10), &overlapping).unwrap());
    assert_eq!(journal.samples(one).unwrap(), [first[1].clone(), first[0].clone()]);
    assert_eq!(journal.shards_done(one).unwrap(), [ShardId(9)]);

    assert!(journal.record_shard(one, ShardId(2), &[sample(1, 0, &[])]).unwrap());
    assert!(journal.record_shard(Iteration(2), ShardId(9), &first).unwrap());
    assert_eq!(journal.shards_done(one).unwrap(), [ShardId(2), ShardId(9)]);
    let keys: Vec<_> =
        journal.samples(one).unwrap().iter().map(|s| (s.prompt.0, s.index)).collect();
    assert_eq!(keys, [(1, 0), (4, 0), (4, 1)]);
}

#[test]
fn reference_log_probabilities_keep_every_bit() {
    let (dir, mut journal) = journal();
    let awkward = [
        -0.0,
        0.1 + 0.2,
        -312.439_812_374_123_45,
        f64::MIN_POSITIVE / 4.0,
        f64::NEG_INFINITY,
        -1e300,
    ];
    let pairs: Vec<_> = (0..)
        .zip(awkward)
        .map(|(pair, x)| (PairId(pair), ReferenceLogps { chosen: x, rejected: -x }))
        .collect();
    assert_eq!(journal.record_reference(Iteration(1), &pairs).unwrap(), 6);
    let other = (PairId(0), ReferenceLogps { chosen: 1.0, rejected: 1.0 });
    assert_eq!(journal.record_reference(Iteration(1), &[other]).unwrap(), 0);

    let (_copy, path) = after_a_kill(&dir);
    let read = Journal::open(&path).unwrap().0.reference(Iteration(1)).unwrap();
    let bits = |pairs: &[(PairId, ReferenceLogps)]| -> Vec<_> {
        pairs.iter().map(|(p, l)| (p.0, l.chosen.to_bits(), l.rejected.to_bits())).collect()
    };
    assert_eq!(bits(&read), bits(&pairs));

    journal.discard_scores(Iteration(1)).unwrap();
    assert!(journal.reference(Iteration(1)).unwrap().is_empty());
}

#[test]
fn an_iteration_can_be_scored_again_until_something_rests_on_its_scores() {
    let (_dir, mut journal) = journal();
    let one = Iteration(1);
    let commit = |phase| Commit {
        iteration: one,
        phase,
        epoch: (phase == CommittedPhase::Trained).then_some(Epoch(0)),
        at: 1.0,
        detail: json!({}),
    };
    let phases = |journal: &Journal| -> Vec<CommittedPhase> {
        journal.commits().unwrap().iter().map(|commit| commit.phase).collect()
    };
    use CommittedPhase::{Paired, Scored, Trained};
    journal.commit(&commit(Paired)).unwrap();
    journal.discard_scores(one).unwrap();
    assert_eq!(phases(&journal), [Paired], "no other commit goes");
    journal.commit(&commit(Scored)).unwrap();
    journal.discard_scores(one).unwrap();
    assert_eq!(phases(&journal), [Paired]);
    journal.commit(&commit(Scored)).unwrap();
    journal.commit(&commit(Trained)).unwrap();
    journal.discard_scores(one).unwrap();
    assert_eq!(phases(&journal), [Paired, Scored, Trained]);
}

#[test]
fn steps_done_again_replace_the_earlier_attempt() {
    let (_dir, mut journal) = journal();
    let one = Iteration(1);
    for step in 0..4 {
        journal.record_step(one, Epoch(0), Step(step), &json!({ "loss": 0.7 })).unwrap();
    }
    journal.record_step(one, Epoch(0), Step(2), &json!({ "loss": 0.6 })).unwrap();
    journal.discard_steps(one, Step(3)).unwrap();
    let read: Vec<_> = journal
        .steps(one)
        .unwrap()
        .into_iter()
        .map(|s| (s.step.0, s.metrics["loss"].clone()))
        .collect();
    assert_eq!(read, [(0, json!(0.7)), (1, json!(0.7)), (2, json!(0.6))]);
}

#[test]
fn metrics_keep_every_bit_through_their_json() {
    let (_dir, mut journal) = journal();
    // Each of these comes back one bit off from a parser that takes short cuts.
    let awkward = [std::f64::consts::LN_2, 5.0e-324, 8.988_465_674_311_58e307, 1.0 / 3.0];
    let numbers: Vec<f64> =
        awkward.into_iter().chain((1..2000).map(|n| -700.0 * f64::from(n).sin())).collect();
    journal.record_step(Iteration(0), Epoch(0), Step(0), &json!(numbers)).unwrap();
    let read = &journal.steps(Iteration(0)).unwrap()[0].metrics;
    let read: Vec<u64> =
        read.as_array().unwrap().iter().map(|x| x.as_f64().unwrap().to_bits()).collect();
    assert_eq!(read, numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
}

/// Flips one bit of the first place where `needle` stands in the file.
pub(super) fn flip(path: &Path, needle: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.windows(needle.len()).position(|w| w == needle).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_flipped_bit_is_found_in_its_row_and_the_intact_checkpoint_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for iteration in ["00", "01", "02"] {
        let checkpoint = dir.path().join("iterations").join(iteration).join("checkpoint");
        fs::create_dir_all(&checkpoint).unwrap();
        fs::write(checkpoint.join("model.safetensors"), "weights").unwrap();
        let subject = manifest::tests::subject();
        let manifest =
            Manifest::build(&checkpoint, subject, &Default::default(), &mut |_| ()).unwrap();
        manifest.save(&checkpoint).unwrap();
        if iteration == "02" {
            fs::write(checkpoint.join("model.safetensors"), "weigh").unwrap();
        }
    }
    let path = dir.path().join("journal.sqlite");
    let mut journal = Journal::create(&path, &meta()).unwrap();
    let tokens = [101, 202, 303, 404, 505, 606];
    journal.record_shard(Iteration(1), ShardId(3), &[sample(0, 0, &tokens)]).unwrap();
    let logps = ReferenceLogps { chosen: -123.456, rejected: -654.321 };
    journal.record_reference(Iteration(1), &[(PairId(0), logps)]).unwrap();
    journal.record_step(Iteration(1), Epoch(0), Step(5), &json!({ "rewards/chosen": 1 })).unwrap();
    journal.commit(&commit(1, CommittedPhase::Paired, None)).unwrap();
    drop(journal);

    flip(&path, &303u32.to_le_bytes());
    flip(&path, &(-123.456f64).to_le_bytes());
    flip(&path, b"rewards/chosen");
    flip(&path, b"\"pairs\":12");
    let (journal, _) = Journal::open(&path).unwrap();
    let damage = |error: StoreError| error.to_string();
    assert_eq!(
        damage(journal.samples(Iteration(1)).unwrap_err()),
        format!(
            "{} is damaged at samples of shard 3, iteration 1; the last published checkpoint iterations/01/checkpoint is intact: restore the journal from a backup, or start a new run from that checkpoint",
            path.display()
        )
    );
    for (error, place) in [
        (
            journal.reference(Iteration(1)).unwrap_err(),
            "damaged at reference of pair 0, iteration 1",
        ),
        (journal.steps(Iteration(1)).unwrap_err(), "damaged at step 5 of iteration 1"),
        (journal.commits().unwrap_err(), "damaged at commit 1"),
    ] {
        let message = damage(error);
        assert!(message.contains(place), "{message}");
    }
}

#[test]
fn a_torn_file_is_damage_and_names_the_file() {
    let (dir, journal) = journal();
    drop(journal);
    let path = dir.path().join("journal.sqlite");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let message = Journal::open(&path).unwrap_err().to_string();
    assert!(message.contains("journal.sqlite is damaged at "), "{message}");
    assert!(message.contains("start again in a new --run-dir"), "{message}");
}

#[test]
fn a_torn_tail_of_the_log_ends_at_the_last_whole_commit() {
    let (dir, mut journal) = journal();
    journal.commit(&commit(0, CommittedPhase::Prepared, None)).unwrap();
    let whole = fs::metadata(dir.path().join("journal.sqlite-wal")).unwrap().len();
    journal.commit(&commit(0, CommittedPhase::Paired, None)).unwrap();
    let (copy, path) = after_a_kill(&dir);
    let log =
        fs::OpenOptions::new().write(true).open(copy.path().join("journal.sqlite-wal")).unwrap();
    log.set_len(whole + 100).unwrap();
    let commits = Journal::open(&path).unwrap().0.commits().unwrap();
    assert_eq!(commits, [commit(0, CommittedPhase::Prepared, None)]);
}

#[test]
fn a_later_schema_and_anothers_database_are_refused() {
    let (dir, journal) = journal();
    journal.connection.pragma_update(None, "user_version", 7).unwrap();
    drop(journal);
    let path = dir.path().join("journal.sqlite");
    let message = Journal::open(&path).unwrap_err().to_string();
    assert!(message.contains("has schema version 7, this coordinator knows up to 2"), "{message}");

    let other = dir.path().join("other.sqlite");
    Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    let refused = Journal::open(&other).unwrap_err();
    assert!(matches!(refused, StoreError::ForeignJournal { found: 0, .. }), "{refused}");
}

#[test]
fn a_journal_of_the_version_before_gets_the_table_that_it_lacks() {
    let (dir, mut journal) = journal();
    journal.commit(&commit(0, CommittedPhase::Prepared, None)).unwrap();
    journal.connection.execute_batch("DROP TABLE ratings; PRAGMA user_version = 1;").unwrap();
    drop(journal);
    let path = dir.path().join("journal.sqlite");
    for _ in 0..2 {
        let (mut journal, _) = Journal::open(&path).unwrap();
        assert_eq!(journal.audit().unwrap().0, []);
        assert_eq!(journal.commits().unwrap().len(), 1);
        journal.record_ratings(Iteration(1), &[((PromptId(0), 0), 0.5)].into()).unwrap();
    }
}

#[test]
fn ratings_keep_every_bit_and_the_first_one_stays() {
    let (_dir, mut journal) = journal();
    let of = |ratings: &[f64]| -> crate::domain::Ratings {
        (0..).map(|index| (PromptId(7), index)).zip(ratings.iter().copied()).collect()
    };
    let ratings = of(&[-0.0, 1e-300, -17.25]);
    journal.record_ratings(Iteration(1), &ratings).unwrap();
    journal.record_ratings(Iteration(1), &of(&[9.0, 9.0])).unwrap();
    journal.record_ratings(Iteration(2), &of(&[4.0])).unwrap();
    let kept = journal.ratings(Iteration(1)).unwrap();
    assert_eq!(kept, ratings);
    assert!(kept[&(PromptId(7), 0)].is_sign_negative());
    journal.discard_ratings(Iteration(1)).unwrap();
    assert!(journal.ratings(Iteration(1)).unwrap().is_empty());
    assert_eq!(journal.ratings(Iteration(2)).unwrap().len(), 1);
    journal.connection.execute("UPDATE ratings SET sample = 1", []).unwrap();
    let damaged = journal.ratings(Iteration(2)).unwrap_err().to_string();
    assert!(damaged.contains("rating of sample 1 of prompt 7, iteration 2"), "{damaged}");
}

#[test]
fn a_second_writer_is_refused() {
    let (dir, _journal) = journal();
    let refused = Journal::open(&dir.path().join("journal.sqlite")).unwrap_err().to_string();
    assert!(refused.contains("another program holds the journal open"), "{refused}");
}
