//! Processes that die or hang at any moment: nothing is lost, nothing doubled.

use crate::support::{ended, program};

/// A dozen small runs whose workers and coordinators are killed, stopped and paused
/// where a seed says: each ends with the undisturbed run's bytes.
#[test]
fn disturbed_runs_leave_the_same_bytes() {
    let last = chaos(&["--seeds", "12"]);
    assert_eq!(last, "12 passed, 0 failed");
}

/// Runs that SIGTERM stops in each of their phases stop within five seconds, and go on to
/// the undisturbed run's bytes.
#[test]
fn runs_stop_in_each_phase_and_go_on() {
    let last = chaos(&["--stops"]);
    assert!(last.ends_with(" passed, 0 failed") && !last.starts_with("0 "), "{last}");
}

/// The last line of a harness that found nothing.
fn chaos(args: &[&str]) -> String {
    let mut command = std::process::Command::new(program("chaos"));
    command.args(args);
    let ended = ended(command);
    eprintln!("{}", ended.stdout);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout.lines().last().unwrap_or_default().to_owned()
}
