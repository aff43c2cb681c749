//! A full disk at any write of a run: a clear error, and nothing lost.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{ended, published, resume, small, small_model, succeeds};

/// A file system of its own, as large as it is told to be.
struct Disk(PathBuf);

impl Disk {
    /// `None` where this user may not mount one.
    fn of(place: &Path, kilobytes: u64) -> Option<Self> {
        std::fs::create_dir_all(place).unwrap();
        let size = format!("size={kilobytes}k");
        let mount = ["-t", "tmpfs", "-o", &size, "tmpfs", place.to_str().unwrap()];
        let mounted = Command::new("mount").args(mount).output().ok()?.status.success();
        mounted.then(|| Self(place.to_owned()))
    }

    fn grow(&self, kilobytes: u64) {
        let size = format!("remount,size={kilobytes}k");
        let grown = Command::new("mount").args(["-o", &size, self.0.to_str().unwrap()]).status();
        assert!(grown.unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Kilobytes that a folder takes.
fn size_of(folder: &Path) -> u64 {
    let told = Command::new("du").args(["-sk", folder.to_str().unwrap()]).output().unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    told.split_whitespace().next().unwrap().parse().unwrap()
}

/// The disk is full a little later each time: the run ends with status 1 and names a
/// file or the journal, and why; with room made, it goes on to the undisturbed bytes.
#[test]
fn a_full_disk_is_told_and_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small_model::write(&crate::support::demo_model(), &model).unwrap();
    let undisturbed = folder.path().join("undisturbed");
    succeeds(small(&undisturbed, "2", &model));
    let expected = published(&undisturbed);
    let whole = size_of(&undisturbed);
    let mut failures = 0;
    // The largest moment of a run is larger than what it leaves.
    for tenths in 1..=12 {
        let place = folder.path().join(format!("disk-{tenths}"));
        let Some(disk) = Disk::of(&place, whole * tenths / 10) else {
            panic!("this test mounts small file systems; run it as root");
        };
        let run = place.join("run");
        let first = ended(small(&run, "2", &model));
        if first.code != Some(0) {
            failures += 1;
            assert_eq!(first.code, Some(1), "{tenths}/10: {}", first.stderr);
            let words = first.stderr.to_lowercase();
            assert!(
                words.contains("no space left") || words.contains("disk is full"),
                "{tenths}/10: {}",
                first.stderr
            );
            assert!(!words.contains("panicked"), "{tenths}/10: {}", first.stderr);
            disk.grow(whole * 4);
            let again = match run.join("journal.sqlite").exists() {
                true => resume(&run),
                false => small(&run, "2", &model),
            };
            succeeds(again);
        }
        assert_eq!(published(&run), expected, "{tenths}/10 of the room");
    }
    assert!(failures >= 6, "the disk was full only {failures} times");
}
