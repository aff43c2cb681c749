//! A bar for reading files through, once that takes long.

use std::time::{Duration, Instant};

use super::{Activity, Bar, Progress};

/// What is read in less than this needs no bar.
const PATIENCE: Duration = Duration::from_secs(2);

/// Shows how far a folder is read, from two seconds on.
#[derive(Debug)]
pub struct CheckingBar<'p> {
    progress: &'p Progress,
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    what: String,
    bytes: u64,
    done: u64,
    began: Instant,
    bar: Option<Bar>,
}

impl<'p> CheckingBar<'p> {
    /// Nothing is being read yet.
    pub fn new(progress: &'p Progress) -> Self {
        Self { progress, current: None }
    }

    /// `more` bytes of `what`, which has `bytes`, were read.
    pub fn advance(&mut self, what: &str, bytes: u64, more: u64) {
        if self.current.as_ref().is_none_or(|current| current.what != what) {
            self.close();
            let began = Instant::now();
            self.current =
                Some(Current { what: what.to_owned(), bytes, done: 0, began, bar: None });
        }
        let Some(current) = &mut self.current else { return };
        current.done += more;
        if current.bar.is_none() && current.began.elapsed() > PATIENCE {
            let activity = Activity::Checking { what: current.what.clone(), bytes };
            current.bar = Some(self.progress.resume(activity, current.done));
        }
        if let Some(bar) = &current.bar {
            bar.set(current.done);
        }
    }

    /// Reading has ended.
    pub fn close(&mut self) {
        if let Some(Current { bar: Some(bar), bytes, .. }) = self.current.take() {
            bar.set(bytes);
            bar.finish();
        }
    }
}
