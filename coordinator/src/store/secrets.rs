//! A folder of secrets: its owner alone may read it.

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::publish;

/// A published folder of secrets. Dropped, it is removed: what it holds is worth
/// nothing without the process that wrote it.
#[derive(Debug)]
pub struct SecretFolder(PathBuf);

impl SecretFolder {
    /// Publishes `files`, by name, as the folder `path`, in place of one from
    /// before: a reader finds the old folder or the new one. The folder has mode
    /// 0700 and its files 0600 from the moment they exist.
    ///
    /// # Errors
    /// The operation that failed on which path.
    pub fn publish(path: &Path, files: &[(&str, &str)]) -> Result<Self, StoreError> {
        let staging = publish::staging(path);
        publish::remove_folder(&staging)?;
        let made = DirBuilder::new().mode(0o700).create(&staging);
        made.map_err(StoreError::io("create folder", &staging))?;
        for (name, contents) in files {
            let file = staging.join(name);
            File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&file)
                .and_then(|mut opened| opened.write_all(contents.as_bytes()))
                .map_err(StoreError::io("write", &file))?;
        }
        publish::sync_tree(&staging)?;
        publish::exchange(&staging, path)?;
        Ok(Self(path.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SecretFolder {
    fn drop(&mut self) {
        if let Err(error) = publish::retire_dir(&self.0) {
            tracing::warn!(%error, "a folder of secrets stays behind; they are void");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_owner_reads_and_a_new_folder_takes_the_place_of_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("join");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let old = SecretFolder::publish(&path, &[("token", "old"), ("key", "k")]).unwrap();
        assert_eq!((mode(&path), mode(&path.join("token"))), (0o700, 0o600));
        // As a coordinator that was killed leaves it.
        std::mem::forget(old);
        let new = SecretFolder::publish(&path, &[("token", "new")]).unwrap();
        assert_eq!(fs::read_to_string(path.join("token")).unwrap(), "new");
        assert!(!path.join("key").exists(), "nothing of the old folder is in the new one");
        assert_eq!((mode(&path), mode(&path.join("token"))), (0o700, 0o600));
        drop(new);
        assert!(publish::list(dir.path()).unwrap().is_empty());
    }
}
