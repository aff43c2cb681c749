//! An operation under way.

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use tch::{Device, TchError, Tensor};

use super::group::Member;
use super::{CollectiveError, ffi};

/// Elements added up at once on a CPU, so that a sum stays in cache while the
/// ranks' rows are added to it.
const CACHED_ELEMENTS: i64 = 1 << 16;

/// An operation under way. Keeps its tensors alive.
#[derive(Debug)]
#[must_use = "the result is there only after `wait`"]
pub struct Work {
    handle: NonNull<ffi::WorkHandle>,
    operation: &'static str,
    member: Member,
    started: Instant,
    /// Memory that the backend's thread reads and writes.
    _tensors: Vec<Tensor>,
    /// What remains to be added up once it has been received.
    sum: Option<Sum>,
}

/// Rows that become one.
#[derive(Debug)]
pub(super) struct Sum {
    /// `[ranks, share]`, one row from each rank.
    pub(super) rows: Tensor,
    /// `[share]`.
    pub(super) into: Tensor,
}

// SAFETY: `c10d::Work` and the watch guard their state with mutexes and are bound to no thread.
unsafe impl Send for Work {}

impl Work {
    pub(super) fn new(
        handle: NonNull<ffi::WorkHandle>,
        operation: &'static str,
        member: Member,
        started: Instant,
        tensors: &[&Tensor],
    ) -> Self {
        let tensors = tensors.iter().map(|tensor| tensor.shallow_clone()).collect();
        Self { handle, operation, member, started, _tensors: tensors, sum: None }
    }

    pub(super) fn then(mut self, sum: Sum) -> Self {
        self.sum = Some(sum);
        self
    }

    /// Whether the operation ends, well or badly, within `patience`; at once if
    /// it has. [`Self::wait`] then says which, without waiting for any peer.
    pub fn ended_within(&self, patience: Duration) -> bool {
        let microseconds = i64::try_from(patience.as_micros()).unwrap_or(i64::MAX / 2_000);
        // SAFETY: the work is live.
        unsafe { ffi::drift_work_ended_within(self.handle.as_ptr(), microseconds) }
    }

    /// When the operation was asked for, and when it ended by the clock of the
    /// thread that carried it out; nothing while it is under way.
    pub fn interval(&self) -> Option<(Instant, Instant)> {
        // SAFETY: the work is live.
        let since = unsafe { ffi::drift_work_nanoseconds_since_end(self.handle.as_ptr()) };
        let since = Duration::from_nanos(u64::try_from(since).ok()?);
        let ended = Instant::now().checked_sub(since)?;
        Some((self.started, ended.max(self.started)))
    }

    /// Blocks until the operation has ended, and finishes what is left of it.
    ///
    /// # Errors
    /// [`CollectiveError::Operation`] where a peer is gone, or has not come
    /// within the group's timeout.
    pub fn wait(self) -> Result<(), CollectiveError> {
        let (done, text) = ffi::call(|error| {
            // SAFETY: the work is live and `error` is valid.
            unsafe { ffi::drift_work_wait(self.handle.as_ptr(), error) }
        });
        if !done {
            return Err(self.member.failed(self.operation, text));
        }
        let added = self.sum.as_ref().map_or(Ok(()), Sum::add_up);
        added.map_err(|error| self.member.failed(self.operation, Some(error.to_string())))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: the handle came from the bridge and is freed once, here; the backend's queue holds
        // a reference of its own while the operation runs.
        unsafe { ffi::drift_work_free(self.handle.as_ptr()) }
    }
}

impl Sum {
    /// Adds the rows up in the order of ranks, in the kind of the result.
    fn add_up(&self) -> Result<(), TchError> {
        let length = self.into.size1()?;
        let piece = match self.into.device() {
            Device::Cpu => CACHED_ELEMENTS,
            _ => length,
        };
        let mut start = 0;
        while start < length {
            let count = piece.min(length - start);
            let mut sum = self.into.f_narrow(0, start, count)?;
            for (rank, row) in self.rows.f_narrow(1, start, count)?.f_unbind(0)?.iter().enumerate()
            {
                match rank {
                    0 => sum.f_copy_(row)?,
                    _ => sum.f_add_(row).map(drop)?,
                }
            }
            start += count;
        }
        Ok(())
    }
}
