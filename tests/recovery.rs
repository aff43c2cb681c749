//! Processes that die or hang at any moment: nothing is lost, nothing doubled.

use crate::support::{ended, program};

/// A dozen small runs whose workers and coordinators are killed, stopped and paused
/// where a seed says: each ends with the undisturbed run's bytes.
#[test]
fn disturbed_runs_leave_the_same_bytes() {
    let mut command = std::process::Command::new(program("chaos"));
    command.args(["--seeds", "12"]);
    let ended = ended(command);
    eprintln!("{}", ended.stdout);
    let last = ended.stdout.lines().last().unwrap_or_default();
    assert_eq!((last, ended.code), ("12 passed, 0 failed", Some(0)), "{}", ended.stderr);
}
