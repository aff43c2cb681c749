//! When training state is saved inside an epoch, and what is under way of it.
//!
//! Workers copy their part between two steps and write it beside the next ones; a
//! snapshot is kept once all have told that theirs is on disk. Saving changes
//! nothing that is computed, so it may follow the clock.

use std::collections::BTreeSet;
use std::time::Duration;

use super::SnapshotKind;
use super::{
    Command, Effect, Machine, Now, Outcome, Phase, Rank, SaveSeconds, SnapshotId, State, Step,
    WrittenFile,
};

/// When to save: whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotRule {
    /// After this many steps; 0: never for their sake.
    pub steps: u32,
    /// After this long; zero: never for its sake.
    pub period: Duration,
}

impl SnapshotRule {
    fn is_due(self, steps: u32, elapsed: Duration) -> bool {
        (self.steps > 0 && steps >= self.steps)
            || (!self.period.is_zero() && elapsed >= self.period)
    }
}

/// Snapshots of the epoch under way.
#[derive(Debug)]
pub(super) struct Saves {
    /// When the last one was asked for, or the epoch began.
    since: Now,
    /// Steps joined since then.
    steps: u32,
    under_way: Option<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    id: SnapshotId,
    waiting_for: BTreeSet<Rank>,
    files: Vec<WrittenFile>,
    /// The slowest rank's.
    seconds: SaveSeconds,
}

impl Saves {
    pub(super) fn begin(now: Now) -> Self {
        Self { since: now, steps: 0, under_way: None }
    }
}

impl Machine {
    /// A step was joined: asks for a snapshot if one is due.
    pub(super) fn step_joined(&mut self, effects: &mut Vec<Effect>) {
        if let State::Working { phase: Phase::Training { saves, .. }, .. } = &mut self.state {
            saves.steps += 1;
        }
        self.save_if_due(effects);
    }

    /// Asks for a snapshot if one is due, behind the steps that are handed out. A run
    /// that is leaving takes none up behind it; where none is left, the epoch's end
    /// saves.
    pub(super) fn save_if_due(&mut self, effects: &mut Vec<Effect>) {
        let (now, rule, is_leaving) = (self.now, self.shape.snapshots, self.is_leaving);
        let ranks = self.members.ranks();
        let State::Working { iteration, phase: Phase::Training { stage, saves, .. } } =
            &mut self.state
        else {
            return;
        };
        let is_due = is_leaving || rule.is_due(saves.steps, now.saturating_sub(saves.since));
        if saves.under_way.is_some() || stage.is_cut() || !is_due {
            return;
        }
        let k = *iteration;
        let id = |step: Step| SnapshotId::After(k, step);
        let save = |step| Command::SaveState(id(step));
        let behind = match is_leaving {
            true => stage.end_behind_steps(&save),
            false => stage.insert_behind_steps(&save),
        };
        if let Some(step) = behind {
            effects.push(Effect::BeginSnapshot(id(step), SnapshotKind::State));
            let waiting_for = ranks.collect();
            *saves = Saves {
                since: now,
                steps: 0,
                under_way: Some(UnderWay {
                    id: id(step),
                    waiting_for,
                    files: Vec::new(),
                    seconds: SaveSeconds::default(),
                }),
            };
        }
    }

    /// A rank's part of a snapshot is on disk. One that nobody waits for any more is
    /// of an epoch that has ended.
    pub(super) fn snapshot_written(
        &mut self,
        rank: Rank,
        step: Step,
        (files, seconds): (Vec<WrittenFile>, SaveSeconds),
        effects: &mut Vec<Effect>,
    ) {
        let State::Working { phase: Phase::Training { saves, .. }, .. } = &mut self.state else {
            return;
        };
        let is_it = |under_way: &&mut UnderWay| is_after(under_way.id, step);
        let Some(under_way) = saves.under_way.as_mut().filter(is_it) else { return };
        under_way.waiting_for.remove(&rank);
        under_way.files.extend(files);
        let slowest = &mut under_way.seconds;
        slowest.copy = slowest.copy.max(seconds.copy);
        slowest.write = slowest.write.max(seconds.write);
        if under_way.waiting_for.is_empty() {
            let UnderWay { id, mut files, seconds, .. } = match saves.under_way.take() {
                Some(under_way) => under_way,
                None => return,
            };
            files.sort_by(|a, b| a.name.cmp(&b.name));
            self.members.progressed();
            effects.push(Effect::KeepSnapshot(id, files));
            effects.push(Effect::SnapshotKept(id, seconds));
            self.leave_behind_snapshot(effects);
        }
    }

    /// A snapshot is kept, or failed: a run that waited for it ends; one that is
    /// leaving and waited for an earlier one asks for its own.
    fn leave_behind_snapshot(&mut self, effects: &mut Vec<Effect>) {
        match &self.state {
            State::Working { phase: Phase::Training { stage, .. }, .. } if stage.is_cut() => {
                self.end(Outcome::Stopped, effects);
            }
            _ if self.is_leaving => self.save_if_due(effects),
            _ => {}
        }
    }

    /// A rank could not write its part. Training goes on; the next one may succeed.
    pub(super) fn snapshot_failed(&mut self, step: Step, why: String, effects: &mut Vec<Effect>) {
        let State::Working { phase: Phase::Training { saves, .. }, .. } = &mut self.state else {
            return;
        };
        if let Some(under_way) = saves.under_way.take_if(|under_way| is_after(under_way.id, step)) {
            effects.push(Effect::SnapshotFailed(under_way.id, why));
            self.leave_behind_snapshot(effects);
        }
    }
}

fn is_after(id: SnapshotId, step: Step) -> bool {
    matches!(id, SnapshotId::After(_, after) if after == step)
}
