//! Who is here, who is called, and who is away.

use std::time::Duration;

use super::Now;
use crate::run::command::Rank;

/// Where the worker of a rank stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Member {
    /// There is none. One is started at `start_at`, if it was not yet.
    Away { since: Now, start_at: Option<Now> },
    /// It was told to drop what it holds, and has not said that it did.
    Called { heard: Now },
    /// It takes commands. A fresh one has no weights yet, while the others work.
    Here { heard: Now, fresh: bool },
}

/// The workers of a run, one a rank.
#[derive(Debug)]
pub(super) struct Members {
    list: Vec<Member>,
    /// Ranks whose worker attached at least once.
    known: Vec<bool>,
    /// Losses since the run last made progress.
    losses: u32,
}

/// The wait before a worker is started again: nothing for the first two losses
/// without progress in between, then a second, and twice as long each time.
const LONGEST_WAIT: Duration = Duration::from_secs(8);

impl Members {
    /// All away, and being started.
    pub(super) fn new(now: Now, world_size: usize) -> Self {
        Self {
            list: vec![Member::Away { since: now, start_at: None }; world_size],
            known: vec![false; world_size],
            losses: 0,
        }
    }

    pub(super) fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.list.len() as u32).map(Rank)
    }

    fn get_mut(&mut self, rank: Rank) -> Option<&mut Member> {
        self.list.get_mut(rank.index())
    }

    pub(super) fn is_here(&self, rank: Rank) -> bool {
        matches!(self.list.get(rank.index()), Some(Member::Here { .. }))
    }

    pub(super) fn is_away(&self, rank: Rank) -> bool {
        matches!(self.list.get(rank.index()), Some(Member::Away { .. }))
    }

    pub(super) fn all_here(&self) -> bool {
        self.ranks().all(|rank| self.is_here(rank))
    }

    /// Whether a worker of this rank was ever here.
    pub(super) fn knows(&self, rank: Rank) -> bool {
        self.known.get(rank.index()).is_some_and(|known| *known)
    }

    /// A worker took its place, or says that it dropped what it held.
    pub(super) fn attached(&mut self, now: Now, rank: Rank, fresh: bool) {
        if let Some(member) = self.get_mut(rank) {
            *member = Member::Here { heard: now, fresh };
            self.known[rank.index()] = true;
        }
    }

    pub(super) fn heard(&mut self, now: Now, rank: Rank) {
        if let Some(Member::Here { heard, .. } | Member::Called { heard }) = self.get_mut(rank) {
            *heard = now;
        }
    }

    /// Whether the worker has no weights yet. It is asked once.
    pub(super) fn take_fresh(&mut self, rank: Rank) -> bool {
        match self.get_mut(rank) {
            Some(Member::Here { fresh, .. }) => std::mem::take(fresh),
            _ => false,
        }
    }

    /// The weights that everybody needs are about to be loaded by all.
    pub(super) fn none_fresh(&mut self) {
        for rank in self.ranks() {
            self.take_fresh(rank);
        }
    }

    /// A worker is lost. Says whether its successor is to be started at once; if
    /// not, [`Self::due`] names it in time.
    pub(super) fn lost(&mut self, now: Now, rank: Rank) -> bool {
        self.losses += 1;
        let wait = match self.losses {
            0..=2 => Duration::ZERO,
            n => Duration::from_secs(1 << (n - 3).min(10)).min(LONGEST_WAIT),
        };
        let start_at = (!wait.is_zero()).then_some(now + wait);
        if let Some(member) = self.get_mut(rank) {
            *member = Member::Away { since: now, start_at };
        }
        start_at.is_none()
    }

    /// Counts a failure that took no worker with it.
    pub(super) fn failed(&mut self) {
        self.losses += 1;
    }

    /// Losses and failures since the run last made progress.
    pub(super) fn losses(&self) -> u32 {
        self.losses
    }

    /// The run got further than it was.
    pub(super) fn progressed(&mut self) {
        self.losses = 0;
    }

    /// Calls those that are here: each drops what it holds and says so. Returns them.
    pub(super) fn call(&mut self) -> Vec<Rank> {
        let called: Vec<_> = self.ranks().filter(|&rank| !self.is_away(rank)).collect();
        for member in &mut self.list {
            if let Member::Here { heard, .. } = *member {
                *member = Member::Called { heard };
            }
        }
        called
    }

    /// Ranks whose successor is to be started now.
    pub(super) fn due(&mut self, now: Now) -> Vec<Rank> {
        let mut due = Vec::new();
        for (rank, member) in (0..).map(Rank).zip(&mut self.list) {
            if let Member::Away { since, start_at } = member
                && start_at.is_some_and(|at| at <= now)
            {
                (*since, *start_at) = (now, None);
                due.push(rank);
            }
        }
        due
    }

    /// Ranks that were not heard for longer than `deadline`.
    pub(super) fn silent(&self, now: Now, deadline: Duration) -> Vec<Rank> {
        self.ranks()
            .zip(&self.list)
            .filter(|(_, member)| match member {
                Member::Here { heard, .. } | Member::Called { heard } => {
                    now.saturating_sub(*heard) > deadline
                }
                Member::Away { .. } => false,
            })
            .map(|(rank, _)| rank)
            .collect()
    }

    /// Ranks that nobody has taken for longer than `timeout`.
    pub(super) fn missing(&self, now: Now, timeout: Duration) -> Vec<Rank> {
        self.ranks()
            .zip(&self.list)
            .filter(|(_, member)| match member {
                Member::Away { since, start_at: None } => now.saturating_sub(*since) > timeout,
                _ => false,
            })
            .map(|(rank, _)| rank)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Now {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_worker_that_is_lost_over_and_over_is_started_later_each_time() {
        let mut members = Members::new(at(0), 2);
        let mut waits = Vec::new();
        for n in 0..8 {
            let now = at(100 * n);
            let at_once = members.lost(now, Rank(1));
            let wait = (0..100).find(|&s| !members.due(now + at(s)).is_empty());
            assert_eq!(wait.is_none(), at_once, "started once, now or later");
            waits.push(wait.unwrap_or(0));
        }
        assert_eq!(waits, [0, 0, 1, 2, 4, 8, 8, 8]);
        members.progressed();
        assert!(members.lost(at(1000), Rank(0)), "progress makes up for losses");
    }

    #[test]
    fn silence_and_absence_have_their_own_deadlines() {
        let mut members = Members::new(at(0), 2);
        members.attached(at(10), Rank(0), true);
        assert_eq!(members.silent(at(15), at(5)), []);
        assert_eq!(members.silent(at(16), at(5)), [Rank(0)]);
        assert_eq!(members.missing(at(16), at(15)), [Rank(1)]);
        members.heard(at(16), Rank(0));
        members.heard(at(16), Rank(1));
        assert_eq!(members.silent(at(20), at(5)), []);
        assert!(members.is_away(Rank(1)), "nobody is heard who is not here");
        // One that is called is listened for as well.
        assert_eq!(members.call(), [Rank(0)]);
        assert_eq!(members.silent(at(22), at(5)), [Rank(0)]);
    }

    #[test]
    fn a_fresh_worker_is_fresh_once() {
        let mut members = Members::new(at(0), 1);
        members.attached(at(0), Rank(0), true);
        assert!(members.take_fresh(Rank(0)));
        assert!(!members.take_fresh(Rank(0)));
        assert!(members.knows(Rank(0)) && members.all_here());
    }
}
