//! Recording beside the run: several entries a transaction, on a thread of their own.
//!
//! A disk takes milliseconds, or tens of them, to say that a write is durable. Nobody
//! who waits for a lease is to wait for that: what may be done again after a crash is
//! queued, and what rests on it waits for the queue.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{Journal, StoreError, put_counts, ratings, samples, training};
use crate::domain::{Iteration, PairId, Ratings, ReferenceLogps, Sample, ShardId};

/// Entries that wait at most: who is faster than the disk waits for it.
const QUEUE: usize = 256;

/// Entries of one transaction at most.
const BATCH: usize = 128;

/// Something to be recorded soon.
#[derive(Debug)]
pub enum Entry {
    /// As [`Journal::record_shard`].
    Shard(Iteration, ShardId, Vec<Sample>),
    /// As [`Journal::record_ratings`].
    Ratings(Iteration, Ratings),
    /// As [`Journal::record_reference`].
    References(Iteration, Vec<(PairId, ReferenceLogps)>),
    /// As [`Journal::record_counts`].
    Counts(String, serde_json::Value),
}

/// A run's journal, and the thread that records in it while entries come.
#[derive(Debug)]
pub struct JournalWriter(State);

#[derive(Debug)]
enum State {
    Idle(Journal),
    Recording {
        queue: SyncSender<Entry>,
        thread: JoinHandle<Result<Journal, StoreError>>,
    },
    /// An entry could not be recorded, which was told.
    Failed,
}

impl From<Journal> for JournalWriter {
    fn from(journal: Journal) -> Self {
        Self(State::Idle(journal))
    }
}

impl JournalWriter {
    /// Records an entry soon: it is durable once [`Self::journal`] has returned.
    ///
    /// # Errors
    /// The operation that failed, of this entry or of one before it.
    pub fn record(&mut self, entry: Entry) -> Result<(), StoreError> {
        let (queue, thread) = match std::mem::replace(&mut self.0, State::Failed) {
            State::Idle(journal) => {
                let (queue, entries) = sync_channel(QUEUE);
                (queue, std::thread::spawn(move || record_all(journal, &entries)))
            }
            State::Recording { queue, thread } => (queue, thread),
            State::Failed => return Err(StoreError::JournalClosed),
        };
        if queue.send(entry).is_err() {
            // The thread ends before its queue does only by a failure.
            return joined(thread).and(Err(StoreError::JournalClosed));
        }
        self.0 = State::Recording { queue, thread };
        Ok(())
    }

    /// The journal, once all that was to be recorded is durable.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn journal(&mut self) -> Result<&mut Journal, StoreError> {
        self.0 = match std::mem::replace(&mut self.0, State::Failed) {
            State::Recording { queue, thread } => {
                drop(queue);
                State::Idle(joined(thread)?)
            }
            state => state,
        };
        match &mut self.0 {
            State::Idle(journal) => Ok(journal),
            _ => Err(StoreError::JournalClosed),
        }
    }
}

fn joined(thread: JoinHandle<Result<Journal, StoreError>>) -> Result<Journal, StoreError> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Records entries, as many together as wait, until the queue is closed.
fn record_all(mut journal: Journal, entries: &Receiver<Entry>) -> Result<Journal, StoreError> {
    while let Ok(first) = entries.recv() {
        let more = entries.try_iter().take(BATCH - 1);
        let batch: Vec<_> = std::iter::once(first).chain(more).collect();
        journal.record_batch(&batch)?;
    }
    Ok(journal)
}

impl Journal {
    /// Records entries in one transaction, each as it would be by itself.
    fn record_batch(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        let failed = self.failed("record what workers told");
        let path = self.path.clone();
        let mut transaction = self.connection.transaction().map_err(&failed)?;
        for entry in entries {
            match entry {
                Entry::Shard(iteration, shard, of_shard) => {
                    samples::put_shard(&mut transaction, &path, *iteration, *shard, of_shard)?;
                }
                Entry::Ratings(iteration, rated) => {
                    ratings::put_ratings(&transaction, &path, *iteration, rated)?;
                }
                Entry::References(iteration, logps) => {
                    training::put_reference(&transaction, &path, *iteration, logps)?;
                }
                Entry::Counts(kind, json) => {
                    put_counts(&transaction, kind, json).map_err(&failed)?;
                }
            }
        }
        transaction.commit().map_err(&failed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{FinishReason, PromptId};
    use crate::store::RunMeta;

    fn writer() -> (tempfile::TempDir, JournalWriter) {
        let dir = tempfile::tempdir().unwrap();
        let meta = RunMeta {
            run_id: "r".into(),
            config_sha256: "00".repeat(32),
            created_at: 0.0,
            drift_version: "0".into(),
        };
        let journal = Journal::create(&dir.path().join("journal.sqlite"), &meta).unwrap();
        (dir, journal.into())
    }

    fn shard(n: u64, prompt: u64) -> Entry {
        let finish = FinishReason::Stop;
        let sample = Sample { prompt: PromptId(prompt), index: 0, tokens: vec![1, 2], finish };
        Entry::Shard(Iteration(1), ShardId(n), vec![sample])
    }

    #[test]
    fn what_was_queued_is_in_the_journal_once_it_is_asked_for() {
        let (_dir, mut writer) = writer();
        for n in 0..1_000 {
            writer.record(shard(n, n)).unwrap();
        }
        let logps = ReferenceLogps { chosen: -1.0, rejected: -2.0 };
        let scored = vec![(PairId(3), logps)];
        writer.record(Entry::References(Iteration(1), scored.clone())).unwrap();
        writer.record(Entry::Counts("loss".into(), json!(1))).unwrap();
        let journal = writer.journal().unwrap();
        assert_eq!(journal.samples(Iteration(1)).unwrap().len(), 1_000);
        assert_eq!(journal.reference(Iteration(1)).unwrap(), scored);
        assert_eq!(journal.counts().unwrap(), [("loss".to_owned(), json!(1))]);
        // And again, by another thread.
        writer.record(shard(1_000, 1_000)).unwrap();
        assert_eq!(writer.journal().unwrap().shards_done(Iteration(1)).unwrap().len(), 1_001);
    }

    #[test]
    fn a_shard_that_comes_twice_adds_nothing_and_keeps_nothing_of_its_batch_away() {
        let (_dir, mut writer) = writer();
        // The second has a sample of the first, the third is the first again.
        for entry in [shard(0, 7), shard(1, 7), shard(0, 7), shard(2, 8)] {
            writer.record(entry).unwrap();
        }
        let journal = writer.journal().unwrap();
        assert_eq!(journal.shards_done(Iteration(1)).unwrap(), [ShardId(0), ShardId(2)]);
        assert_eq!(journal.samples(Iteration(1)).unwrap().len(), 2);
    }

    #[test]
    fn a_failure_is_told_to_whoever_comes_next_and_nothing_follows_it() {
        let (_dir, mut writer) = writer();
        writer.journal().unwrap().connection.execute_batch("DROP TABLE samples").unwrap();
        let told = (0..1_000).find_map(|n| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            writer.record(shard(n, n)).err()
        });
        assert!(told.unwrap().to_string().contains("record a shard's samples"));
        assert!(matches!(writer.journal(), Err(StoreError::JournalClosed)));
        assert!(matches!(writer.record(shard(0, 0)), Err(StoreError::JournalClosed)));
    }
}
