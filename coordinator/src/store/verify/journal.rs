//! The journal: its structure, its rows, their order, and what it should know.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use super::order::{Found, History, lost_commit, out_of_order};
use super::{LAST_STATE, Problem, RESTORE_JOURNAL, State, Verifier};
use crate::domain::Iteration;
use crate::store::error::StoreError;
use crate::store::journal::{Commit, JournalCopy, RunMeta, Torn, torn_at};
use crate::store::manifest::FileEntry;
use crate::store::names::{self, JOURNAL, JOURNAL_LOG};
use crate::store::publish;

/// As much of the journal as could be read.
#[derive(Default)]
pub(super) struct Read {
    pub(super) meta: Option<RunMeta>,
    pub(super) copy: Option<JournalCopy>,
    pub(super) files: BTreeMap<String, FileEntry>,
    pub(super) history: History,
}

const LOST_TAIL: &str =
    "restore journal.sqlite-wal if it was taken away; else --resume does again what it held";

impl Verifier<'_, '_> {
    pub(super) fn journal(&mut self) -> Result<Read, StoreError> {
        let path = self.root.join(JOURNAL);
        if !path.exists() {
            self.problem(Problem::missing(&path), RESTORE_JOURNAL);
            return Ok(Read::default());
        }
        let copy = match JournalCopy::open(self.root) {
            Ok(copy) => copy,
            // The copy failed, which says nothing of the journal.
            Err(error @ StoreError::Io { .. }) => return Err(error),
            Err(error) => {
                self.problem(Problem::damaged(&path, without_path(&error)), RESTORE_JOURNAL);
                return Ok(Read::default());
            }
        };
        let (torn, rows) = match copy.journal.audit() {
            Ok(audited) => audited,
            Err(error) => {
                self.problem(Problem::damaged(&path, without_path(&error)), RESTORE_JOURNAL);
                return Ok(Read::default());
            }
        };
        let sound = |of: fn(&Torn) -> bool| !torn.iter().any(of);
        let commits = match sound(|torn| matches!(torn, Torn::Commit(_))) {
            true => copy.journal.commits()?,
            false => Vec::new(),
        };
        let files = match sound(|torn| matches!(torn, Torn::Counts(_))) {
            true => copy.journal.files()?,
            false => BTreeMap::new(),
        };
        let history = History::of(&commits);
        let findings = self.items.len();
        for torn in &torn {
            let remedy = remedy(torn, &history);
            self.add(State::Damaged, JOURNAL, format!("is damaged at {torn}"), remedy);
        }
        if let Some(n) = out_of_order(&commits) {
            let Commit { phase, iteration, .. } = &commits[n];
            let what = format!(
                "commit {} ({phase} of iteration {iteration}) cannot follow the one before it",
                n + 1
            );
            self.problem(Problem::damaged(&path, what), RESTORE_JOURNAL);
        }
        if !self.live {
            self.length(&path)?;
            self.log()?;
            if sound(|torn| matches!(torn, Torn::Commit(_))) {
                self.lost_tail(&copy, &commits)?;
            }
        }
        if self.items[findings..].iter().all(|item| item.state == State::Ok) {
            let found = format!(
                "{} commits, {} samples, {}{} reference log-probabilities, {} steps",
                rows.commits,
                rows.samples,
                match rows.ratings {
                    0 => String::new(),
                    ratings => format!("{ratings} ratings, "),
                },
                rows.references,
                rows.steps
            );
            self.ok(JOURNAL, found);
        }
        Ok(Read { meta: Some(copy.meta.clone()), copy: Some(copy), files, history })
    }

    /// The database's own length: with a log that has what is cut off, SQLite does
    /// not miss it.
    fn length(&mut self, path: &Path) -> Result<(), StoreError> {
        let mut header = [0; 32];
        let length = fs::File::open(path)
            .and_then(|mut file| {
                file.read_exact(&mut header)?;
                Ok(file.metadata()?.len())
            })
            .map_err(StoreError::io("read", path))?;
        // SQLite's file format: a page's size at byte 16, where 1 is 65,536; pages at 28.
        let [.., high, low, _, _, _, _, _, _, _, _, _, _, a, b, c, d] = header;
        let page = match u16::from_be_bytes([high, low]) {
            1 => 65_536,
            page => u64::from(page),
        };
        let expected = page * u64::from(u32::from_be_bytes([a, b, c, d]));
        if length < expected {
            let what = format!("has {length} bytes, expected {expected}; its log has the rest");
            self.problem(Problem::damaged(path, what), "--resume completes it from its log");
        }
        Ok(())
    }

    fn log(&mut self) -> Result<(), StoreError> {
        let path = self.root.join(JOURNAL_LOG);
        if let Some(byte) = torn_at(&path)? {
            let what = format!(
                "does not check from byte {byte} on: it was cut or changed there, or its process died as it wrote"
            );
            self.problem(Problem::damaged(&path, what), LOST_TAIL);
        } else if path.exists() {
            self.ok(JOURNAL_LOG, "what a killed coordinator had not merged; all of it checks");
        }
        Ok(())
    }

    /// Files that a journal which is this short cannot have led to.
    fn lost_tail(&mut self, copy: &JournalCopy, commits: &[Commit]) -> Result<(), StoreError> {
        if went_back_from(copy)? > commits.len() as u64 {
            return Ok(());
        }
        let mut found = Vec::new();
        for folder in list(&self.root.join(names::ITERATIONS))? {
            if let Ok(k) = folder.parse().map(Iteration) {
                found.push((names::pairs(k), Found::Pairs(k)));
                found.push((names::checkpoint(k), Found::Checkpoint(k)));
            }
        }
        for folder in list(&self.root.join(names::SNAPSHOTS))? {
            if let Some((k, epoch)) = names::parse_snapshot(&folder) {
                found.push((names::snapshot(k, epoch), Found::Snapshot(k, epoch)));
            }
        }
        found.retain(|(name, _)| self.root.join(name).exists());
        for (name, found) in found {
            if let Some(lost) = lost_commit(commits, found) {
                let what = format!(
                    "ends with commit {}; {name} is there, and is made only after {lost}: its last commits are lost",
                    commits.len()
                );
                self.add(State::Damaged, JOURNAL, what, LOST_TAIL);
                break;
            }
        }
        Ok(())
    }
}

/// How many commits the journal had when a resume last took it back.
fn went_back_from(copy: &JournalCopy) -> Result<u64, StoreError> {
    let Ok(counts) = copy.journal.counts() else { return Ok(u64::MAX) };
    let from = |(kind, json): &(String, serde_json::Value)| {
        kind.starts_with(names::WENT_BACK).then(|| json["from"].as_u64()).flatten()
    };
    Ok(counts.iter().filter_map(from).max().unwrap_or(0))
}

fn remedy(torn: &Torn, history: &History) -> &'static str {
    let in_hand = |k: &Iteration| !history.published.contains(k);
    match torn {
        Torn::Shard(k, _) | Torn::Rating(k, ..) | Torn::Step(k, ..) if in_hand(k) => LAST_STATE,
        Torn::Reference(k, _) if in_hand(k) => LAST_STATE,
        Torn::Reference(..) => "nothing rests on it any more: the run is not held up",
        Torn::Definition(_) | Torn::Generation => "the run is not held up",
        Torn::Commit(_) | Torn::Counts(_) | Torn::Shard(..) | Torn::Rating(..) | Torn::Step(..) => {
            RESTORE_JOURNAL
        }
    }
}

/// Names in a folder; none where it is not there.
fn list(folder: &Path) -> Result<Vec<String>, StoreError> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = publish::list(folder)?;
    Ok(entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// What is wrong, without the name of the copy that it was found in.
fn without_path(error: &StoreError) -> String {
    match error {
        StoreError::JournalDamaged { place, .. } => format!("is damaged at {place}"),
        StoreError::ForeignJournal { found, expected, .. } => {
            format!("has application id {found:#010x}, expected {expected:#010x}")
        }
        StoreError::JournalTooNew { found, known, .. } => {
            format!("has schema version {found}, this coordinator knows up to {known}")
        }
        StoreError::Journal { operation, cause, .. } => {
            format!("cannot be used: {operation}: {cause}")
        }
        other => format!("cannot be used: {other}"),
    }
}
