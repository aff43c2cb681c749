//! The layout of a run directory, and the lock that keeps it to one coordinator.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::names::{self, CONFIG, ITERATIONS, JOIN, JOURNAL, LOCK, LOGS, SNAPSHOTS, SUMMARY};
use super::publish;
use crate::domain::{Epoch, Iteration, Step};

/// A run's directory, held exclusively until this value is dropped or the
/// process dies: the operating system then releases the lock. Processes that
/// the coordinator starts do not inherit it.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    _lock: File,
}

impl RunDir {
    /// A directory for a new run: made if missing, else empty but for what a
    /// start that died before its journal existed may have left.
    ///
    /// # Errors
    /// [`StoreError::HoldsRun`], [`StoreError::Occupied`],
    /// [`StoreError::Locked`], or the operation that failed.
    pub fn create(root: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(root).map_err(StoreError::io("create folder", root))?;
        if root.join(JOURNAL).exists() {
            return Err(StoreError::HoldsRun(root.to_owned()));
        }
        // Before the lock file is made: nothing is left behind in a refused folder.
        refuse_strangers(root)?;
        let run = Self::lock(root)?;
        if run.journal_path().exists() {
            return Err(StoreError::HoldsRun(root.to_owned()));
        }
        run.make_folders()?;
        run.sweep()?;
        publish::sync_folder(root)?;
        Ok(run)
    }

    /// The directory of an existing run. Half-written files and staging folders
    /// of a dead coordinator or worker are removed.
    ///
    /// # Errors
    /// [`StoreError::NoRun`], [`StoreError::Locked`], or the operation that failed.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let no_run = |why: &str| StoreError::NoRun { root: root.to_owned(), why: why.to_owned() };
        match fs::metadata(root) {
            Ok(found) if !found.is_dir() => return Err(no_run("it is not a directory")),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(no_run("the directory does not exist"));
            }
            Err(e) => return Err(StoreError::io("look at", root)(e)),
        }
        for file in [JOURNAL, CONFIG] {
            if !root.join(file).is_file() {
                return Err(no_run(&format!("{file} is missing")));
            }
        }
        let run = Self::lock(root)?;
        run.make_folders()?;
        run.sweep()?;
        Ok(run)
    }

    fn lock(root: &Path) -> Result<Self, StoreError> {
        let path = root.join(LOCK);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(StoreError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = fs::read_to_string(&path).unwrap_or_default();
                let holder = match holder.trim() {
                    "" => "it has not said which".to_owned(),
                    holder => holder.to_owned(),
                };
                return Err(StoreError::Locked { root: root.to_owned(), holder });
            }
            Err(TryLockError::Error(e)) => return Err(StoreError::io("lock", &path)(e)),
        }
        // For whoever finds the directory locked; the lock itself is the system's.
        file.set_len(0)
            .and_then(|()| writeln!(file, "process {} on {}", std::process::id(), host()))
            .map_err(StoreError::io("write", &path))?;
        Ok(Self { root: root.to_owned(), _lock: file })
    }

    fn make_folders(&self) -> Result<(), StoreError> {
        for folder in [self.iterations(), self.snapshots(), self.logs()] {
            fs::create_dir_all(&folder).map_err(StoreError::io("create folder", &folder))?;
        }
        Ok(())
    }

    /// Removes what interrupted writes left.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn sweep(&self) -> Result<(), StoreError> {
        let mut folders = vec![self.root.clone(), self.snapshots()];
        for entry in publish::list(&self.iterations())? {
            if entry.path().is_dir() {
                folders.push(entry.path());
            }
        }
        for folder in folders {
            for name in publish::sweep(&folder)? {
                tracing::info!(
                    folder = %folder.display(),
                    name = %name.display(),
                    "removed what an interrupted write left"
                );
            }
        }
        Ok(())
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `config.toml`: the resolved configuration.
    pub fn config_path(&self) -> PathBuf {
        self.root.join(CONFIG)
    }

    /// `journal.sqlite`.
    pub fn journal_path(&self) -> PathBuf {
        self.root.join(JOURNAL)
    }

    /// `summary.json`.
    pub fn summary_path(&self) -> PathBuf {
        self.root.join(SUMMARY)
    }

    fn iterations(&self) -> PathBuf {
        self.root.join(ITERATIONS)
    }

    /// `iterations/01`.
    pub fn iteration(&self, iteration: Iteration) -> PathBuf {
        self.root.join(names::iteration(iteration))
    }

    /// Makes the folder of an iteration, durably, and returns it.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn make_iteration(&self, iteration: Iteration) -> Result<PathBuf, StoreError> {
        let folder = self.iteration(iteration);
        fs::create_dir_all(&folder).map_err(StoreError::io("create folder", &folder))?;
        publish::sync_folder(&self.iterations())?;
        Ok(folder)
    }

    /// `iterations/01/checkpoint`.
    pub fn checkpoint(&self, iteration: Iteration) -> PathBuf {
        self.root.join(names::checkpoint(iteration))
    }

    /// `iterations/01/pairs.parquet`.
    pub fn pairs(&self, iteration: Iteration) -> PathBuf {
        self.root.join(names::pairs(iteration))
    }

    /// `iterations/01/metrics.jsonl`.
    pub fn metrics(&self, iteration: Iteration) -> PathBuf {
        self.root.join(names::metrics(iteration))
    }

    fn snapshots(&self) -> PathBuf {
        self.root.join(SNAPSHOTS)
    }

    /// `snapshots/01-epoch-0`: training state at the end of that epoch.
    pub fn snapshot(&self, iteration: Iteration, epoch: Epoch) -> PathBuf {
        self.root.join(names::snapshot(iteration, epoch))
    }

    /// `snapshots/01-step-40`: training state behind that step, inside an epoch.
    pub fn step_snapshot(&self, iteration: Iteration, step: Step) -> PathBuf {
        self.root.join(names::step_snapshot(iteration, step))
    }

    /// Steps of an iteration behind which there is a snapshot, the last one first.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn step_snapshots(&self, iteration: Iteration) -> Result<Vec<Step>, StoreError> {
        let mut steps: Vec<_> = publish::list(&self.snapshots())?
            .iter()
            .filter_map(|entry| names::parse_step_snapshot(entry.file_name().to_str()?))
            .filter(|(of, _)| *of == iteration)
            .map(|(_, step)| step)
            .collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// Removes an iteration's snapshots inside epochs, but for the one behind `kept`.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn prune_step_snapshots(
        &self,
        iteration: Iteration,
        kept: Option<Step>,
    ) -> Result<(), StoreError> {
        for step in self.step_snapshots(iteration)? {
            if Some(step) != kept {
                publish::retire_dir(&self.step_snapshot(iteration, step))?;
            }
        }
        Ok(())
    }

    /// Removes all snapshots of iterations up to and with `iteration`: its
    /// checkpoint is published and supersedes them.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn prune_snapshots(&self, iteration: Iteration) -> Result<(), StoreError> {
        for entry in publish::list(&self.snapshots())? {
            let name = entry.file_name();
            let of = name.to_str().and_then(|name| {
                let of_epoch = names::parse_snapshot(name).map(|(of, _)| of);
                of_epoch.or_else(|| names::parse_step_snapshot(name).map(|(of, _)| of))
            });
            if of.is_some_and(|of| of <= iteration) {
                publish::retire_dir(&entry.path())?;
            }
        }
        Ok(())
    }

    /// `join/`: what lets workers in.
    pub fn join(&self) -> PathBuf {
        self.root.join(JOIN)
    }

    /// `logs/`.
    pub fn logs(&self) -> PathBuf {
        self.root.join(LOGS)
    }

    /// `logs/coordinator.log`.
    pub fn coordinator_log(&self) -> PathBuf {
        self.logs().join("coordinator.log")
    }

    /// `logs/worker-0.log`: standard error of the worker in that slot.
    pub fn worker_log(&self, slot: u32) -> PathBuf {
        self.logs().join(names::worker_log(slot))
    }
}

/// What the live coordinator of a directory says of itself; `None` where none is
/// live. Takes nothing and leaves nothing, so that whoever only reads can ask.
///
/// # Errors
/// The operation that failed.
pub fn holder(root: &Path) -> Result<Option<String>, StoreError> {
    let path = root.join(LOCK);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StoreError::io("open", &path)(e)),
    };
    match file.try_lock_shared() {
        // Given back when the file closes.
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            Ok(Some(holder.trim().to_owned()))
        }
        Err(TryLockError::Error(e)) => Err(StoreError::io("lock", &path)(e)),
    }
}

/// Refuses a folder with anything that a run which died before its journal
/// existed could not have left. Its lock file came first: without one, even a
/// `config.toml` is somebody else's.
fn refuse_strangers(root: &Path) -> Result<(), StoreError> {
    let started = root.join(LOCK).is_file();
    for entry in publish::list(root)? {
        let name = entry.file_name();
        let ours = [LOCK, CONFIG, ITERATIONS, SNAPSHOTS, LOGS].iter().any(|ours| name == *ours)
            || publish::is_aside(&name);
        if !(started && ours) {
            let found = name.to_string_lossy().into_owned();
            return Err(StoreError::Occupied { root: root.to_owned(), found });
        }
    }
    Ok(())
}

fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| "an unnamed host".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn a_run() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("run");
        drop(RunDir::create(&root).unwrap());
        fs::write(root.join(CONFIG), "").unwrap();
        fs::write(root.join(JOURNAL), "").unwrap();
        (dir, root)
    }

    #[test]
    fn a_directory_with_a_run_is_not_started_again() {
        let (_dir, root) = a_run();
        assert_eq!(
            RunDir::create(&root).unwrap_err().to_string(),
            format!(
                "{} holds a run already; continue it with --resume or choose another --run-dir",
                root.display()
            )
        );
    }

    #[test]
    fn a_start_that_died_before_its_journal_can_be_started_again() {
        let (_dir, root) = a_run();
        fs::remove_file(root.join(JOURNAL)).unwrap();
        fs::write(root.join(".journal.sqlite.writing"), "x").unwrap();
        RunDir::create(&root).unwrap();
        assert!(!root.join(".journal.sqlite.writing").exists());
    }

    #[test]
    fn anothers_directory_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), "theirs").unwrap();
        let refused = RunDir::create(dir.path()).unwrap_err();
        assert!(
            matches!(&refused, StoreError::Occupied { found, .. } if found == CONFIG),
            "{refused}"
        );
        assert_eq!(publish::list(dir.path()).unwrap().len(), 1);
        let message = RunDir::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("journal.sqlite is missing"), "{message}");
        let message = RunDir::open(&dir.path().join("gone")).unwrap_err().to_string();
        assert!(message.contains("gone: the directory does not exist"), "{message}");
    }

    #[test]
    fn a_second_opener_is_told_who_holds_the_lock_until_it_lets_go() {
        let (_dir, root) = a_run();
        let first = RunDir::open(&root).unwrap();
        let refused = RunDir::open(&root).unwrap_err().to_string();
        let holder = format!("live coordinator (process {} on ", std::process::id());
        assert!(refused.contains(&holder), "{refused}");
        assert!(super::holder(&root).unwrap().unwrap().starts_with("process "));
        drop(first);
        assert_eq!(super::holder(&root).unwrap(), None);
        RunDir::open(&root).unwrap();
    }

    #[test]
    fn opening_sweeps_what_an_interrupted_publish_left() {
        let (_dir, root) = a_run();
        let run = RunDir::open(&root).unwrap();
        let iteration = run.make_iteration(Iteration(1)).unwrap();
        let staged = publish::begin_staging(&run.checkpoint(Iteration(1))).unwrap();
        fs::write(staged.join("model.safetensors"), "half").unwrap();
        drop(run);
        RunDir::open(&root).unwrap();
        assert!(publish::list(&iteration).unwrap().is_empty());
    }

    #[test]
    fn pruning_spares_later_iterations() {
        let (_dir, root) = a_run();
        let run = RunDir::open(&root).unwrap();
        for (iteration, epoch) in [(0, 0), (0, 2), (1, 0), (10, 0)] {
            fs::create_dir(run.snapshot(Iteration(iteration), Epoch(epoch))).unwrap();
        }
        let aside = publish::set_aside(&run.snapshot(Iteration(0), Epoch(2))).unwrap();
        run.prune_snapshots(Iteration(1)).unwrap();
        let left: Vec<_> =
            publish::list(&run.snapshots()).unwrap().iter().map(|e| e.file_name()).collect();
        assert_eq!(left, [aside.file_name().unwrap(), "10-epoch-0".as_ref()]);
    }

    #[test]
    fn snapshots_inside_an_epoch_are_found_last_first_and_pruned_but_for_one() {
        let (_dir, root) = a_run();
        let run = RunDir::open(&root).unwrap();
        for (iteration, step) in [(1, 9), (1, 10), (1, 2), (10, 3)] {
            fs::create_dir(run.step_snapshot(Iteration(iteration), Step(step))).unwrap();
        }
        assert_eq!(run.step_snapshots(Iteration(1)).unwrap(), [Step(10), Step(9), Step(2)]);
        run.prune_step_snapshots(Iteration(1), Some(Step(10))).unwrap();
        assert_eq!(run.step_snapshots(Iteration(1)).unwrap(), [Step(10)]);
        run.prune_snapshots(Iteration(1)).unwrap();
        assert_eq!(run.step_snapshots(Iteration(1)).unwrap(), []);
        assert_eq!(run.step_snapshots(Iteration(10)).unwrap(), [Step(3)]);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        // sysfs takes no folders from anyone, root included.
        let root = Path::new("/sys/drift-run");
        let message = RunDir::create(root).unwrap_err().to_string();
        assert!(message.starts_with("create folder /sys/drift-run: "), "{message}");
        assert!(message.ends_with("or choose another --run-dir"), "{message}");
    }
}
