//! Written aside, synced, renamed: the only way a file or a folder of the run
//! gets its name.
//!
//! A reader finds under a published name either the old contents or the new
//! ones, whole, whenever the writer dies. What a dead writer left under a
//! name of [`staging`] or of a half-written file is swept when the run is
//! opened again.
//!
//! A folder that is to replace a published one changes places with it in one
//! operation (`renameat2` with `RENAME_EXCHANGE`), and only then is the old one
//! removed: at no moment is the name free.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::error::StoreError;
use super::manifest::Manifest;
use super::names;

const FILE_ASIDE: &str = ".writing";
const FOLDER_ASIDE: &str = ".staging";

/// How a folder got its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The name was free.
    New,
    /// A folder with the same manifest, and whose files have its hashes, was
    /// there; the staged one was dropped.
    AlreadyThere,
    /// Another folder was there: from a run that died between publishing and
    /// its journal's commit, then continued with another number of workers.
    Replaced,
}

/// Replaces `path` by `bytes`; readers see the old contents or the new ones.
///
/// # Errors
/// The operation that failed on which file; `path` then has its old contents.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    write_file_with(path, |file| file.write_all(bytes).map_err(StoreError::io("write", path)))
}

/// As [`write_file`], for contents that are written piece by piece.
///
/// # Errors
/// What `write` returns, or the operation that failed on which file; `path`
/// then has its old contents.
pub fn write_file_with<T>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    make_file(path, |aside| {
        let file = File::create(aside).map_err(StoreError::io("create", aside))?;
        let mut buffered = BufWriter::with_capacity(1 << 20, file);
        let value = write(&mut buffered)?;
        buffered.flush().map_err(StoreError::io("write", aside))?;
        Ok(value)
    })
}

/// As [`write_file`], for a file that something else writes, at the path it is
/// given.
///
/// # Errors
/// What `make` returns, or the operation that failed on which file; `path`
/// then has its old contents.
pub fn make_file<T>(
    path: &Path,
    make: impl FnOnce(&Path) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let aside = aside(path, FILE_ASIDE);
    let made = make(&aside).and_then(|value| {
        sync_file(&aside)?;
        fs::rename(&aside, path).map_err(StoreError::io("rename onto", path))?;
        sync_folder(parent(path))?;
        Ok(value)
    });
    if made.is_err() {
        // The error to report is the first one; a leftover is swept at the next open.
        let _ = fs::remove_file(&aside);
    }
    made
}

/// Where a folder is made that will be published as `target`: beside it, so
/// that the rename stays within one file system.
pub fn staging(target: &Path) -> PathBuf {
    aside(target, FOLDER_ASIDE)
}

/// Makes an empty [`staging`] folder for `target`, dropping a leftover.
///
/// # Errors
/// The operation that failed on which folder.
pub fn begin_staging(target: &Path) -> Result<PathBuf, StoreError> {
    let staging = staging(target);
    remove_folder(&staging)?;
    fs::create_dir_all(&staging).map_err(StoreError::io("create folder", &staging))?;
    Ok(staging)
}

/// Gives the folder `staging` its published name `target`.
///
/// Every file and folder in it is synced first. A `target` that exists is
/// never removed first: if it has the same `manifest.json` and its files still
/// have those hashes, it stays; otherwise the two change places in one
/// operation.
///
/// # Errors
/// The operation that failed on which path; `target` is then what it was.
pub fn publish_dir(staging: &Path, target: &Path) -> Result<Published, StoreError> {
    sync_tree(staging)?;
    if target.try_exists().map_err(StoreError::io("look at", target))? {
        if is_same(staging, target) {
            remove_folder(staging)?;
            return Ok(Published::AlreadyThere);
        }
        tracing::warn!(
            target_folder = %target.display(),
            "a folder with other contents was published under this name and never committed; replacing it"
        );
    }
    exchange(staging, target)
}

/// Gives `staging`, which is synced, the name `target`, whatever has it now.
pub(super) fn exchange(staging: &Path, target: &Path) -> Result<Published, StoreError> {
    if !target.try_exists().map_err(StoreError::io("look at", target))? {
        fs::rename(staging, target).map_err(StoreError::io("rename onto", target))?;
        sync_folder(parent(target))?;
        return Ok(Published::New);
    }
    renameat_with(CWD, staging, CWD, target, RenameFlags::EXCHANGE).map_err(|cause| {
        StoreError::CannotExchange { target: target.to_owned(), cause: cause.into() }
    })?;
    sync_folder(parent(target))?;
    remove_folder(staging)?;
    Ok(Published::Replaced)
}

/// Same manifest, and the published files still are what it says.
fn is_same(staging: &Path, target: &Path) -> bool {
    match (Manifest::load(staging), Manifest::load(target)) {
        (Ok(new), Ok(old)) => new == old && old.verify(target).is_ok(),
        _ => false,
    }
}

/// Removes a published folder so that no half of it is ever found under its
/// name. A folder that is not there is no error.
///
/// # Errors
/// The operation that failed on which path.
pub fn retire_dir(target: &Path) -> Result<(), StoreError> {
    let aside = staging(target);
    remove_folder(&aside)?;
    match fs::rename(target, &aside) {
        Ok(()) => remove_folder(&aside),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(StoreError::io("rename", target)(e)),
    }
}

/// Moves something damaged out of the way, to `NAME.damaged-1` or the first number
/// that is free, and returns where it is now. Nothing removes it.
///
/// # Errors
/// The operation that failed.
pub fn set_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let name = path.file_name().unwrap_or_default().to_owned();
    for number in 1_u32.. {
        let mut to = name.clone();
        to.push(format!("{}{number}", names::SET_ASIDE));
        let to = path.with_file_name(to);
        if !to.try_exists().map_err(StoreError::io("look at", &to))? {
            fs::rename(path, &to).map_err(StoreError::io("rename", path))?;
            sync_folder(parent(path))?;
            return Ok(to);
        }
    }
    Err(StoreError::io("set aside", path)(io::ErrorKind::AlreadyExists.into()))
}

/// Removes what a dead writer left in `folder` (not in its subfolders):
/// half-written files and staging folders. Returns their names.
///
/// # Errors
/// The operation that failed on which path.
pub fn sweep(folder: &Path) -> Result<Vec<OsString>, StoreError> {
    let mut swept = Vec::new();
    for entry in list(folder)? {
        let name = entry.file_name();
        if !is_aside(&name) {
            continue;
        }
        let path = entry.path();
        let kind = entry.file_type().map_err(StoreError::io("look at", &path))?;
        if kind.is_dir() {
            remove_folder(&path)?;
        } else {
            fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
        }
        swept.push(name);
    }
    Ok(swept)
}

/// Whether a name is one that this module gives to unfinished work.
pub(super) fn is_aside(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b".")
        && (name.ends_with(FILE_ASIDE.as_bytes()) || name.ends_with(FOLDER_ASIDE.as_bytes()))
}

/// Entries of `folder` by name, so that nothing depends on the disk's order.
pub(super) fn list(folder: &Path) -> Result<Vec<fs::DirEntry>, StoreError> {
    let mut entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(StoreError::io("list", folder))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// Makes the names in `folder` durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(StoreError::io("sync folder", folder))
}

/// Syncing is by file, not by handle: whoever wrote it, its bytes are now on disk.
fn sync_file(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(StoreError::io("sync", path))
}

/// Makes a folder's files durable, and their names.
pub(super) fn sync_tree(folder: &Path) -> Result<(), StoreError> {
    for entry in list(folder)? {
        let path = entry.path();
        let kind = entry.file_type().map_err(StoreError::io("look at", &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            sync_file(&path)?;
        }
    }
    sync_folder(folder)
}

/// Removes a folder with all that is in it; one that is not there is no error.
pub(super) fn remove_folder(folder: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::io("remove folder", folder)(e))
        }
        _ => Ok(()),
    }
}

fn aside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(ending);
    path.with_file_name(name)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::manifest::tests::subject;

    fn folder_with(path: &Path, contents: &str) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("model.safetensors"), contents).unwrap();
        let manifest = Manifest::build(path, subject(), &Default::default(), &mut |_| ()).unwrap();
        manifest.save(path).unwrap();
    }

    fn contents(path: &Path) -> String {
        fs::read_to_string(path.join("model.safetensors")).unwrap()
    }

    #[test]
    fn a_write_that_fails_midway_leaves_the_old_contents_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        write_file(&path, b"old").unwrap();
        let failed = write_file_with(&path, |file| {
            file.write_all(b"half of the ne").unwrap();
            Err::<(), _>(StoreError::io("write", &path)(io::ErrorKind::StorageFull.into()))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(list(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn an_interrupted_publish_leaves_the_old_folder_readable_and_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("checkpoint");
        folder_with(&target, "old");
        let half = begin_staging(&target).unwrap();
        fs::write(half.join("model.safetensors"), "ne").unwrap();
        fs::write(dir.path().join(".metrics.jsonl.writing"), "{").unwrap();

        Manifest::load(&target).unwrap().verify(&target).unwrap();
        assert_eq!(sweep(dir.path()).unwrap(), [".checkpoint.staging", ".metrics.jsonl.writing"]);
        assert_eq!(contents(&target), "old");
        assert_eq!(list(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_folder_published_twice_is_recognised_by_its_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("checkpoint");
        for expected in [Published::New, Published::AlreadyThere] {
            let staged = begin_staging(&target).unwrap();
            folder_with(&staged, "weights");
            assert_eq!(publish_dir(&staged, &target).unwrap(), expected);
            assert!(!staged.exists());
        }
    }

    #[test]
    fn a_damaged_folder_under_the_same_manifest_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("checkpoint");
        folder_with(&target, "weights");
        fs::write(target.join("model.safetensors"), "weightz").unwrap();
        let staged = begin_staging(&target).unwrap();
        folder_with(&staged, "weights");
        assert_eq!(publish_dir(&staged, &target).unwrap(), Published::Replaced);
        assert_eq!(contents(&target), "weights");
    }

    #[test]
    fn a_differing_folder_changes_places_in_one_operation() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("checkpoint");
        folder_with(&target, "old");
        let staged = begin_staging(&target).unwrap();
        folder_with(&staged, "new");
        assert_eq!(publish_dir(&staged, &target).unwrap(), Published::Replaced);
        assert_eq!(contents(&target), "new");
        assert_eq!(list(dir.path()).unwrap().len(), 1, "the old one is gone");
    }

    #[test]
    fn what_is_set_aside_takes_the_first_free_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint");
        for expected in ["checkpoint.damaged-1", "checkpoint.damaged-2"] {
            folder_with(&path, expected);
            let aside = set_aside(&path).unwrap();
            assert_eq!(aside.file_name().unwrap(), expected);
            assert_eq!(contents(&aside), expected);
        }
        assert!(!path.exists());
    }

    #[test]
    fn an_error_names_the_file_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing/config.toml");
        let message = write_file(&path, b"x").unwrap_err().to_string();
        let aside = dir.path().join("missing/.config.toml.writing");
        assert_eq!(message, format!("create {}: no such file or directory", aside.display()));
    }
}
