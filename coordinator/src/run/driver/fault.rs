//! Death on request, at a place that tests name.
//!
//! A signal from outside lands where it lands: between two commits that follow one
//! another at once it is chance which of them was the last. With `DRIFT_FAULT=committed`
//! the coordinator kills itself by SIGKILL right behind the first commit that it makes:
//! the commit is on disk, and nothing that follows from it has begun.

use rustix::process::{Signal, getpid, kill_process};

/// Dies here if the environment says so.
pub(super) fn at(place: &str) {
    if std::env::var_os("DRIFT_FAULT").is_some_and(|asked| asked == place) {
        // Nothing outlives this line; if the kernel refused, the test would see.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
