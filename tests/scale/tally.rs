//! What the workers see.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Of one run, over all of its workers.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<Seen>);

#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// From a lease's result being sent to the next lease, in seconds.
    pub(crate) waits: Vec<f64>,
    /// Leases whose worker is lost, and since when.
    lost: BTreeMap<u64, Instant>,
    /// From a worker's connection being closed to its lease being another's, in seconds.
    pub(crate) recoveries: Vec<f64>,
    /// When the first lease was given.
    pub(crate) first: Option<Instant>,
    /// Why a worker could not go on.
    pub(crate) failure: Option<String>,
}

impl Tally {
    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker that was idle for so long, or is new, has a lease.
    pub(crate) fn leased(&self, shard: u64, idle: Option<Duration>) {
        let mut seen = self.seen();
        seen.first.get_or_insert_with(Instant::now);
        seen.waits.extend(idle.map(|idle| idle.as_secs_f64()));
        if let Some(since) = seen.lost.remove(&shard) {
            seen.recoveries.push(since.elapsed().as_secs_f64());
        }
    }

    /// A worker's connection is closed, with its lease.
    pub(crate) fn lost(&self, shard: u64) {
        self.seen().lost.insert(shard, Instant::now());
    }

    pub(crate) fn failed(&self, why: String) {
        self.seen().failure.get_or_insert(why);
    }
}

/// The value that a share of all are no larger than; none of nothing.
pub(crate) fn quantile(values: &mut [f64], share: f64) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let at = (share * values.len() as f64).ceil() as usize;
    values.get(at.saturating_sub(1)).copied()
}
