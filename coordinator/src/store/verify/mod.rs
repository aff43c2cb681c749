//! Whether every file of a run directory is still the one that was written; looks,
//! and changes nothing.
//!
//! What a file is compared with:
//!
//! | file | with |
//! |---|---|
//! | `config.toml` | its hash in the journal |
//! | `journal.sqlite` | SQLite's structure check; a SHA-256 with each row; the order of commits; the files that its commits should have told of |
//! | `journal.sqlite-wal` | the checksums of its own frames |
//! | `pairs.parquet`, `summary.json` | length and hash in the journal |
//! | `metrics.jsonl` | the lines that the journal's steps make |
//! | `checkpoint/`, `snapshots/…` | length and hash of each file in `manifest.json`, and the manifest's own in the journal |
//!
//! `logs/` and `lock` hold nothing that a run rests on: they are not looked at.
//! Nor are bytes of the journal that no row uses.

mod files;
mod journal;
mod order;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};

pub use self::files::{Expected, Fault, Problem, check_file, check_folder, check_pairs, listed};
use self::journal::Read;
use super::error::StoreError;
use super::journal::{manifest_behind, manifest_of};
use super::manifest::{FileEntry, hex};
use super::names::{self, CONFIG, SUMMARY};
use super::pairs::read_pairs;
use super::{metrics, publish, run_dir};
use crate::domain::{Epoch, Iteration};

/// How an item of the directory was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it was written.
    Ok,
    /// Nothing to judge: worth knowing.
    Note,
    /// With other contents.
    Damaged,
    /// Not there, and it should be.
    Missing,
    /// There, and it should not be.
    Extra,
}

/// A file, a folder, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// As it was found.
    pub state: State,
    /// Its name in the run directory.
    pub name: String,
    /// What was found there; for a finding, what was expected besides.
    pub found: String,
    /// For a finding, what to do.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub remedy: &'static str,
}

/// Everything that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What a coordinator that works in the directory says of itself.
    pub live: Option<String>,
    /// In the order in which they were looked at.
    pub items: Vec<Item>,
}

impl Report {
    /// What is not as it was written.
    pub fn findings(&self) -> impl Iterator<Item = &Item> {
        self.items.iter().filter(|item| !matches!(item.state, State::Ok | State::Note))
    }
}

/// Told what is being read, how many bytes it has, and how many were read since
/// the last call.
pub type Watch<'a> = dyn FnMut(&str, u64, u64) + 'a;

const DERIVED: &str = "--resume makes it anew from the journal";
const LAST_STATE: &str =
    "--resume goes back to the last good state, and does again what came after it";
const KEEP_OR_RESTORE: &str =
    "restore it from a backup, or move the folder away: no later iteration needs it any more";
const RESTORE_CONFIG: &str = "restore it: the run goes on only under the settings it began with";
const RESTORE_JOURNAL: &str =
    "restore it from a backup, or start a new run from the last checkpoint";

/// Looks at everything in the run directory `root`. A live coordinator does not
/// mind: what it has in hand is then left out.
///
/// # Errors
/// [`StoreError::NoRun`] where no run is, or a directory that cannot be read.
pub fn verify(root: &Path, watch: &mut Watch<'_>) -> Result<Report, StoreError> {
    let no_run = |why: &str| StoreError::NoRun { root: root.to_owned(), why: why.to_owned() };
    if !root.is_dir() {
        return Err(no_run("it is not a directory"));
    }
    if !root.join(CONFIG).exists() && !root.join(names::JOURNAL).exists() {
        return Err(no_run("neither config.toml nor journal.sqlite is there"));
    }
    let live = run_dir::holder(root)?;
    let mut verifier = Verifier { root, live: live.is_some(), items: Vec::new(), watch };
    let journal = verifier.journal()?;
    verifier.config(&journal);
    for k in verifier.iterations(&journal)? {
        verifier.pairs(&journal, k);
        verifier.metrics(&journal, k);
        verifier.checkpoint(&journal, k);
    }
    verifier.snapshots(&journal)?;
    verifier.summary(&journal);
    verifier.set_aside()?;
    Ok(Report { live, items: verifier.items })
}

struct Verifier<'a, 'w> {
    root: &'a Path,
    live: bool,
    items: Vec<Item>,
    watch: &'a mut Watch<'w>,
}

impl Verifier<'_, '_> {
    fn ok(&mut self, name: impl Into<String>, found: impl Into<String>) {
        self.add(State::Ok, name, found, "");
    }

    fn note(&mut self, name: impl Into<String>, found: impl Into<String>) {
        self.add(State::Note, name, found, "");
    }

    fn add(
        &mut self,
        state: State,
        name: impl Into<String>,
        found: impl Into<String>,
        remedy: &'static str,
    ) {
        self.items.push(Item { state, name: name.into(), found: found.into(), remedy });
    }

    fn problem(&mut self, problem: Problem, remedy: &'static str) {
        let path = problem.path.strip_prefix(self.root).unwrap_or(&problem.path);
        let name = path.display().to_string();
        let (state, remedy) = match problem.fault {
            Fault::Missing => (State::Missing, remedy),
            Fault::Damaged => (State::Damaged, remedy),
            Fault::Extra => (State::Extra, "move it away"),
        };
        self.add(state, name, problem.what, remedy);
    }

    fn config(&mut self, journal: &Read) {
        let path = self.root.join(CONFIG);
        let found = match fs::read(&path) {
            Ok(bytes) => hex(&Sha256::digest(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return self.problem(Problem::missing(&path), RESTORE_CONFIG);
            }
            Err(e) => {
                let problem = Problem::damaged(&path, format!("cannot be read: {e}"));
                return self.problem(problem, RESTORE_CONFIG);
            }
        };
        match &journal.meta {
            Some(meta) if meta.config_sha256 == found => self.ok(CONFIG, "as the run froze it"),
            Some(meta) => {
                let expected = &meta.config_sha256;
                let what = format!("has SHA-256 {found}, expected {expected}");
                self.problem(Problem::damaged(&path, what), RESTORE_CONFIG);
            }
            None => self.note(CONFIG, "not compared: its hash is in the journal"),
        }
    }

    /// Iterations that the journal or the disk knows.
    fn iterations(&self, journal: &Read) -> Result<BTreeSet<Iteration>, StoreError> {
        let mut iterations: BTreeSet<_> = journal.history.paired.keys().copied().collect();
        iterations.extend(&journal.history.published);
        let folder = self.root.join(names::ITERATIONS);
        if folder.is_dir() {
            for entry in publish::list(&folder)? {
                let k = entry.file_name().to_str().and_then(|name| name.parse().ok());
                iterations.extend(k.map(Iteration));
            }
        }
        Ok(iterations)
    }

    fn pairs(&mut self, journal: &Read, k: Iteration) {
        let name = names::pairs(k);
        let path = self.root.join(&name);
        let Some(rows) = journal.history.paired.get(&k) else {
            if path.exists() {
                self.note(name, "not in the journal yet");
            }
            return;
        };
        let entry = journal.files.get(&name);
        if let Some(problem) = check_pairs(&path, entry) {
            return self.problem(problem, DERIVED);
        }
        // Its hash was right, or it has none.
        match read_pairs(&path) {
            Ok(found) if rows.is_none_or(|rows| rows == found.len() as u64) => {
                let how = if entry.is_some() { "" } else { ", readable; no hash was recorded" };
                self.ok(name, format!("{} pairs{how}", found.len()));
            }
            Ok(found) => {
                let rows = rows.unwrap_or_default();
                let what = format!("has {} pairs, expected {rows}", found.len());
                self.problem(Problem::damaged(&path, what), DERIVED);
            }
            Err(error) => self.problem(Problem::damaged(&path, error.to_string()), DERIVED),
        }
    }

    fn metrics(&mut self, journal: &Read, k: Iteration) {
        let name = names::metrics(k);
        let path = self.root.join(&name);
        let is_over = journal.history.published.contains(&k);
        if !is_over && (self.live || !path.exists()) {
            return;
        }
        let rows = journal.copy.as_ref().map(|copy| metrics::rows(&copy.journal, k));
        let Some(Ok(expected)) = rows.map(|rows| metrics::text(&path, &rows?)) else {
            return self.note(name, "not compared: the journal's steps cannot be read");
        };
        let found = match fs::read(&path) {
            Ok(found) => found,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return self.problem(Problem::missing(&path), DERIVED);
            }
            Err(e) => {
                let problem = Problem::damaged(&path, format!("cannot be read: {e}"));
                return self.problem(problem, DERIVED);
            }
        };
        match differs_at(&found, expected.as_bytes(), is_over) {
            None => self.ok(name, format!("{} lines", found.split(|b| *b == b'\n').count() - 1)),
            Some(line) => {
                let what = format!("line {line} is not the one that the journal's steps make");
                self.problem(Problem::damaged(&path, what), DERIVED);
            }
        }
    }

    fn checkpoint(&mut self, journal: &Read, k: Iteration) {
        let name = names::checkpoint(k);
        if !journal.history.published.contains(&k) && !self.root.join(&name).exists() {
            return;
        }
        let is_last = journal.history.published.last().is_none_or(|last| *last <= k);
        let remedy = if is_last { LAST_STATE } else { KEEP_OR_RESTORE };
        let epoch = journal.history.trained.get(&k);
        let sealed = epoch.map(|epoch| manifest_of(k, *epoch));
        self.folder(journal, name, k, sealed.and_then(|name| journal.files.get(&name)), remedy);
    }

    fn snapshots(&mut self, journal: &Read) -> Result<(), StoreError> {
        let mut found = BTreeMap::new();
        let mut inside = Vec::new();
        let folder = self.root.join(names::SNAPSHOTS);
        if folder.is_dir() {
            for entry in publish::list(&folder)? {
                let name = entry.file_name().to_string_lossy().into_owned();
                let of: Option<(Iteration, Epoch)> = names::parse_snapshot(&name);
                inside.extend(names::parse_step_snapshot(&name));
                found.extend(of.map(|of| (of, name)));
            }
        }
        if let Some((k, epoch)) = journal.history.needed_snapshot()
            && !found.contains_key(&(k, epoch))
            // Renamed into the checkpoint's place, and not yet committed.
            && !self.root.join(names::checkpoint(k)).exists()
            && !self.live
        {
            let path = self.root.join(names::snapshot(k, epoch));
            self.problem(Problem::missing(&path), LAST_STATE);
        }
        for (k, epoch) in found.into_keys() {
            let sealed = manifest_of(k, epoch);
            // What stands beyond the journal was not recorded, or for another attempt.
            let committed = journal.history.trained.get(&k).is_some_and(|last| epoch <= *last);
            let entry = journal.files.get(&sealed).filter(|_| committed);
            self.folder(journal, names::snapshot(k, epoch), k, entry, LAST_STATE);
        }
        for (k, step) in inside {
            match journal.files.get(&manifest_behind(k, step)) {
                Some(entry) => {
                    self.folder(journal, names::step_snapshot(k, step), k, Some(entry), LAST_STATE);
                }
                None => self.note(names::step_snapshot(k, step), "not recorded, so it is not used"),
            }
        }
        Ok(())
    }

    fn folder(
        &mut self,
        journal: &Read,
        name: String,
        k: Iteration,
        manifest: Option<&FileEntry>,
        remedy: &'static str,
    ) {
        let path = self.root.join(&name);
        let run_id = journal.meta.as_ref().map(|meta| meta.run_id.as_str());
        let (files, total) = listed(&path);
        let watch = &mut *self.watch;
        let expected = Expected { manifest, run_id, iteration: k };
        let problems = check_folder(&path, expected, &mut |more| watch(&name, total, more));
        if self.live && !path.exists() {
            return self.note(name, "removed meanwhile by the coordinator at work");
        }
        if problems.is_empty() {
            self.ok(name, format!("{files} files"));
        }
        for problem in problems {
            self.problem(problem, remedy);
        }
    }

    fn summary(&mut self, journal: &Read) {
        let path = self.root.join(SUMMARY);
        match journal.files.get(SUMMARY) {
            Some(entry) => match check_file(&path, entry) {
                Some(problem) => self.problem(problem, DERIVED),
                None => self.ok(SUMMARY, "as it was written"),
            },
            // The run died between its last commit and its summary.
            None if journal.history.finished && !path.exists() => {
                self.problem(Problem::missing(&path), DERIVED);
            }
            None if path.exists() => self.note(SUMMARY, "not compared: no hash was recorded"),
            None => {}
        }
    }

    /// What an earlier resume found damaged and moved out of the way.
    fn set_aside(&mut self) -> Result<(), StoreError> {
        let mut folders = vec![self.root.join(names::SNAPSHOTS)];
        let iterations = self.root.join(names::ITERATIONS);
        if iterations.is_dir() {
            folders.extend(publish::list(&iterations)?.iter().map(fs::DirEntry::path));
        }
        for folder in folders.iter().filter(|folder| folder.is_dir()) {
            for entry in publish::list(folder)? {
                let path = entry.path();
                let name = path.strip_prefix(self.root).unwrap_or(&path).display().to_string();
                if name.contains(names::SET_ASIDE) {
                    self.note(name, "set aside by a resume that found it damaged");
                }
            }
        }
        Ok(())
    }
}

/// The first line, from 1, in which a `metrics.jsonl` is not what it should be.
/// While its iteration is in hand it may be behind the journal or, with whole lines
/// of steps that are to be done again, ahead of it; and a kill may have torn its end.
fn differs_at(found: &[u8], expected: &[u8], is_over: bool) -> Option<usize> {
    if is_over {
        if found == expected {
            return None;
        }
        let same = found.iter().zip(expected).take_while(|(a, b)| a == b).count();
        return Some(1 + found[..same].iter().filter(|b| **b == b'\n').count());
    }
    let whole = |text: &'_ [u8]| text.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    let lines = |text: &'_ [u8]| {
        text.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    let (found, expected) = (lines(&found[..whole(found)]), lines(expected));
    let is_json = |line: &[u8]| serde_json::from_slice::<serde_json::Value>(line).is_ok();
    found
        .iter()
        .enumerate()
        .position(|(n, line)| expected.get(n).map_or(!is_json(line), |expected| expected != line))
        .map(|n| n + 1)
}
