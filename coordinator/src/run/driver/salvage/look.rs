//! Whether a ground is good: read once, when it is asked for.

use std::collections::BTreeMap;

use anyhow::Result;

use super::Prepared;
use super::grounds::Ground;
use crate::domain::{Epoch, Iteration, PairRow};
use crate::run::machine::Extent;
use crate::store::journal::{Torn, manifest_of};
use crate::store::pairs::measure_pairs;
use crate::store::verify::{Expected, Fault, Problem, check_folder, check_pairs, listed};
use crate::store::{FileEntry, Journal, RunDir, names};
use crate::ui::{CheckingBar, Progress};

/// Rows that give the bytes of a `pairs.parquet`, and those bytes' length and hash.
pub(super) type Remade = BTreeMap<Iteration, (Vec<PairRow>, FileEntry)>;

/// Looks at what is asked for, and remembers.
pub(super) struct Look<'a> {
    pub(super) run: &'a RunDir,
    pub(super) journal: &'a Journal,
    pub(super) torn: &'a [Torn],
    run_id: &'a str,
    prepared: &'a Prepared,
    extent: Extent,
    files: BTreeMap<String, FileEntry>,
    bar: CheckingBar<'a>,
    seen: BTreeMap<Ground, Vec<Problem>>,
    remade: Remade,
}

/// What was seen.
pub(super) struct Seen {
    /// All that is wrong, once each.
    pub(super) problems: Vec<Problem>,
    /// What can take the place of damaged pairs.
    pub(super) remade: Remade,
}

impl<'a> Look<'a> {
    pub(super) fn new(
        run: &'a RunDir,
        journal: &'a Journal,
        run_id: &'a str,
        torn: &'a [Torn],
        prepared: &'a Prepared,
        extent: Extent,
        progress: &'a Progress,
    ) -> Result<Self> {
        Ok(Self {
            files: journal.files()?,
            bar: CheckingBar::new(progress),
            seen: BTreeMap::new(),
            remade: BTreeMap::new(),
            run,
            journal,
            torn,
            run_id,
            prepared,
            extent,
        })
    }

    pub(super) fn is_good(&mut self, ground: Ground) -> bool {
        if !self.seen.contains_key(&ground) {
            let problems = self.look_at(ground);
            self.seen.insert(ground, problems);
        }
        // A file too many is told, and loads no other weights.
        let is_bad = |problem: &Problem| problem.fault != Fault::Extra;
        let made_again = matches!(ground, Ground::Pairs(k) if self.remade.contains_key(&k));
        made_again || !self.problems(ground).iter().any(is_bad)
    }

    /// What is wrong with a ground that was looked at.
    pub(super) fn problems(&self, ground: Ground) -> &[Problem] {
        self.seen.get(&ground).map_or(&[], Vec::as_slice)
    }

    pub(super) fn end(mut self) -> Seen {
        self.bar.close();
        let mut problems: Vec<Problem> = Vec::new();
        for problem in self.seen.into_values().flatten() {
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
        Seen { problems, remade: self.remade }
    }

    fn look_at(&mut self, ground: Ground) -> Vec<Problem> {
        match ground {
            Ground::Samples(k) => self.rows(|torn| matches!(torn, Torn::Shard(of, _) if *of == k)),
            Ground::Ratings(k) => {
                self.rows(|torn| matches!(torn, Torn::Rating(of, ..) if *of == k))
            }
            Ground::References(k) => {
                self.rows(|torn| matches!(torn, Torn::Reference(of, _) if *of == k))
            }
            Ground::Steps(k, epoch) => {
                self.rows(|torn| matches!(torn, Torn::Step(of, _, at) if (*of, *at) == (k, epoch)))
            }
            Ground::Pairs(k) => self.pairs(k),
            Ground::Checkpoint(k) => {
                self.folder(names::checkpoint(k), k, self.extent.last_epoch(k))
            }
            Ground::Snapshot(k, epoch) => self.folder(names::snapshot(k, epoch), k, epoch),
            Ground::Model(k, epoch) => {
                let (snapshot, checkpoint) = (names::snapshot(k, epoch), names::checkpoint(k));
                let is_there = |name: &str| self.run.root().join(name).exists();
                // A run that died between the rename and its commit.
                let renamed = !is_there(&snapshot) && is_there(&checkpoint);
                self.folder(if renamed { checkpoint } else { snapshot }, k, epoch)
            }
        }
    }

    fn rows(&self, of: impl Fn(&Torn) -> bool) -> Vec<Problem> {
        let journal = self.run.journal_path();
        let torn = self.torn.iter().filter(|torn| of(torn));
        torn.map(|torn| Problem::damaged(&journal, format!("is damaged at {torn}"))).collect()
    }

    fn folder(&mut self, name: String, k: Iteration, epoch: Epoch) -> Vec<Problem> {
        let path = self.run.root().join(&name);
        let expected = Expected {
            manifest: self.files.get(&manifest_of(k, epoch)),
            run_id: Some(self.run_id),
            iteration: k,
        };
        let (_, bytes) = listed(&path);
        let bar = &mut self.bar;
        check_folder(&path, expected, &mut |more| bar.advance(&name, bytes, more))
    }

    fn pairs(&mut self, k: Iteration) -> Vec<Problem> {
        let path = self.run.pairs(k);
        let entry = self.files.get(&names::pairs(k)).cloned();
        let Some(problem) = check_pairs(&path, entry.as_ref()) else { return Vec::new() };
        let mut problems = vec![problem];
        let is_made_of_good =
            k.0 == 0 || (self.is_good(Ground::Samples(k)) && self.is_good(Ground::Ratings(k)));
        if !is_made_of_good {
            return problems;
        }
        let rows = (|| {
            let samples = self.prepared.drawn(self.journal, k)?;
            let (rows, _) = self.prepared.pairs(k, samples)?;
            let made = measure_pairs(&path, &rows)?;
            Ok::<_, anyhow::Error>((rows, made))
        })();
        match rows {
            Ok((rows, made)) if entry.as_ref().is_none_or(|entry| *entry == made) => {
                self.remade.insert(k, (rows, made));
            }
            Ok((_, made)) => problems.push(Problem::damaged(
                &path,
                format!("would be made again with SHA-256 {}, by another build", made.sha256),
            )),
            Err(error) => {
                problems.push(Problem::damaged(&path, format!("cannot be made again: {error:#}")));
            }
        }
        problems
    }
}
