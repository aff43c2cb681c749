//! One file, one folder: what is wrong with it.

use std::io;
use std::path::{Path, PathBuf};

use crate::domain::Iteration;
use crate::store::error::StoreError;
use crate::store::manifest::{self, FileEntry, MANIFEST, Manifest, VerifyError};
use crate::store::pairs::read_pairs;

/// In which way something is not as it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not there.
    Missing,
    /// It has other contents.
    Damaged,
    /// It is there, and nothing of the run.
    Extra,
}

/// A file that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, or the folder that is missing as a whole.
    pub path: PathBuf,
    /// In which way.
    pub fault: Fault,
    /// What was found, what was expected, and where; after the file's name.
    pub what: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.path.display(), self.what)
    }
}

impl Problem {
    /// Something that is not there.
    pub fn missing(path: &Path) -> Self {
        Self { path: path.to_owned(), fault: Fault::Missing, what: "is missing".to_owned() }
    }

    /// Something with other contents.
    pub fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), fault: Fault::Damaged, what: what.into() }
    }

    /// What an operation on `path` met.
    fn of(path: &Path, error: StoreError) -> Self {
        match error {
            StoreError::Verify(VerifyError::Missing { path }) => Self::missing(&path),
            StoreError::Verify(VerifyError::Extra { path }) => Self {
                path,
                fault: Fault::Extra,
                what: format!("is not in its folder's {MANIFEST}"),
            },
            StoreError::Verify(VerifyError::NotAFile { path }) => {
                Self::damaged(&path, "is not a plain file")
            }
            StoreError::Verify(VerifyError::Length { path, expected, found }) => {
                Self::damaged(&path, format!("has {found} bytes, expected {expected}"))
            }
            StoreError::Verify(VerifyError::Hash { path, expected, found }) => {
                Self::damaged(&path, format!("has SHA-256 {found}, expected {expected}"))
            }
            StoreError::Io { path, cause, .. } if cause.kind() == io::ErrorKind::NotFound => {
                Self::missing(&path)
            }
            StoreError::Io { operation, path, cause } => {
                Self::damaged(&path, format!("cannot be used: {operation}: {cause}"))
            }
            StoreError::Malformed { path, problem, .. } => {
                Self::damaged(&path, format!("cannot be read: {problem}"))
            }
            other => Self::damaged(path, other.to_string()),
        }
    }
}

/// What a folder with a manifest must be.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Of its manifest, where the journal has it.
    pub manifest: Option<&'a FileEntry>,
    /// The run that wrote it, where that is known.
    pub run_id: Option<&'a str>,
    /// The iteration that it is of.
    pub iteration: Iteration,
}

/// Everything that is wrong with a folder of published files. `progress` is told
/// the bytes read since its last call.
pub fn check_folder(
    folder: &Path,
    expected: Expected<'_>,
    progress: &mut dyn FnMut(u64),
) -> Vec<Problem> {
    if folder.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return vec![Problem::missing(folder)];
    }
    // A manifest that is not the one that was written vouches for no file.
    let manifest = match trusted_manifest(folder, expected) {
        Ok(manifest) => manifest,
        Err(problem) => return vec![problem],
    };
    let mut problems = Vec::new();
    match manifest::walk(folder) {
        Ok(found) => {
            for name in found.keys().filter(|name| !manifest.files.contains_key(*name)) {
                let extra = VerifyError::Extra { path: folder.join(name) };
                problems.push(Problem::of(folder, extra.into()));
            }
        }
        Err(error) => problems.push(Problem::of(folder, error)),
    }
    for (name, entry) in &manifest.files {
        let path = folder.join(name);
        if let Err(error) = entry.verify_with(&path, progress) {
            problems.push(Problem::of(&path, error));
        }
    }
    problems
}

fn trusted_manifest(folder: &Path, expected: Expected<'_>) -> Result<Manifest, Problem> {
    let path = folder.join(MANIFEST);
    if let Some(entry) = expected.manifest {
        entry.verify(&path).map_err(|error| Problem::of(&path, error))?;
    }
    let manifest = Manifest::load(folder).map_err(|error| Problem::of(&path, error))?;
    let subject = &manifest.subject;
    let of_another = subject.iteration != expected.iteration
        || expected.run_id.is_some_and(|run_id| run_id != subject.run_id);
    if of_another {
        let what = format!(
            "is of run {}, iteration {}; expected run {}, iteration {}",
            subject.run_id,
            subject.iteration,
            expected.run_id.unwrap_or("any"),
            expected.iteration
        );
        return Err(Problem::damaged(&path, what));
    }
    Ok(manifest)
}

/// How many files a folder's manifest lists, and their bytes; none where it cannot
/// be read.
pub fn listed(folder: &Path) -> (usize, u64) {
    Manifest::load(folder).map_or((0, 0), |manifest| (manifest.files.len(), manifest.total_bytes()))
}

/// What is wrong with a file by its recorded length and hash.
pub fn check_file(path: &Path, entry: &FileEntry) -> Option<Problem> {
    entry.verify(path).err().map(|error| Problem::of(path, error))
}

/// What is wrong with a `pairs.parquet`: by its length and hash where the journal
/// has them, else by whether it can be read.
pub fn check_pairs(path: &Path, entry: Option<&FileEntry>) -> Option<Problem> {
    let Some(entry) = entry else {
        return read_pairs(path).err().map(|error| Problem::of(path, error));
    };
    let mut problem = check_file(path, entry)?;
    if problem.fault == Fault::Damaged
        && let Err(StoreError::Malformed { problem: place, .. }) = read_pairs(path)
    {
        problem.what = format!("{} ({place})", problem.what);
    }
    Some(problem)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::Subject;

    const K: Iteration = Iteration(1);

    fn folder() -> (tempfile::TempDir, FileEntry) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("config.json", "{}"), ("model.safetensors", "weights")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let subject = Subject {
            run_id: "r1".into(),
            drift_version: "0.1.0".into(),
            iteration: K,
            base_model: "m".into(),
        };
        let none = Default::default();
        Manifest::build(dir.path(), subject, &none, &mut |_| ()).unwrap().save(dir.path()).unwrap();
        let entry = FileEntry::of_file(&dir.path().join(MANIFEST), &mut |_| ()).unwrap();
        (dir, entry)
    }

    fn told(dir: &tempfile::TempDir, manifest: Option<&FileEntry>) -> Vec<String> {
        let expected = Expected { manifest, run_id: Some("r1"), iteration: K };
        check_folder(dir.path(), expected, &mut |_| ())
            .into_iter()
            .map(|problem| {
                let name = problem.path.file_name().unwrap().to_string_lossy().into_owned();
                format!("{name} {}", problem.what)
            })
            .collect()
    }

    #[test]
    fn every_problem_of_a_folder_is_told() {
        let (dir, entry) = folder();
        assert!(told(&dir, Some(&entry)).is_empty());
        fs::remove_file(dir.path().join("config.json")).unwrap();
        fs::write(dir.path().join("model.safetensors"), "weight").unwrap();
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        assert_eq!(
            told(&dir, Some(&entry)),
            [
                "notes.txt is not in its folder's manifest.json",
                "config.json is missing",
                "model.safetensors has 6 bytes, expected 7",
            ]
        );
        fs::remove_dir_all(dir.path()).unwrap();
        let gone = told(&dir, Some(&entry));
        assert!(gone.len() == 1 && gone[0].ends_with(" is missing"), "{gone:?}");
    }

    #[test]
    fn a_manifest_is_believed_only_if_it_is_the_one_that_was_written() {
        let (dir, entry) = folder();
        let path = dir.path().join(MANIFEST);
        let text = fs::read_to_string(&path).unwrap();
        // It still parses, and its hashes are right.
        fs::write(&path, text.replace("0.1.0", "0.1.1")).unwrap();
        let damaged = told(&dir, Some(&entry));
        assert!(damaged.len() == 1 && damaged[0].starts_with("manifest.json has SHA-256 "));
        assert!(told(&dir, None).is_empty(), "older runs have no hash of it");
        fs::write(&path, text.replace("r1", "r2")).unwrap();
        assert_eq!(
            told(&dir, None),
            ["manifest.json is of run r2, iteration 1; expected run r1, iteration 1"]
        );
        fs::write(&path, &text[..10]).unwrap();
        let torn = told(&dir, None);
        assert!(torn[0].starts_with("manifest.json cannot be read: not a manifest"), "{torn:?}");
    }
}
