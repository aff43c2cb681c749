//! `manifest.json`: the size and SHA-256 of every file in a published folder.
//!
//! A torn, flipped, missing or foreign file is found before its bytes are used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::StoreError;
use super::publish;
use crate::domain::Iteration;

/// Name of the manifest inside the folder it describes.
pub const MANIFEST: &str = "manifest.json";
/// Raised when an older reader would misread the file.
const FORMAT: u32 = 1;
/// A checkpoint has some ten files; a manifest beyond this is not one.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;
const READ_BYTES: usize = 1 << 20;

/// Size and hash of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 as 64 lower-case hexadecimal digits.
    pub sha256: String,
}

impl FileEntry {
    /// From a length and a digest of 32 bytes, as workers report their files.
    pub fn new(bytes: u64, sha256: &[u8; 32]) -> Self {
        Self { bytes, sha256: hex(sha256) }
    }

    /// Of a file with these contents.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self::new(bytes.len() as u64, &Sha256::digest(bytes).into())
    }

    /// Reads and hashes the file at `path`; `progress` is told the bytes read
    /// since its last call.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn of_file(path: &Path, progress: &mut dyn FnMut(u64)) -> Result<Self, StoreError> {
        let mut file = File::open(path).map_err(StoreError::io("open", path))?;
        let mut digest = Sha256::new();
        let mut buffer = vec![0; READ_BYTES];
        let mut bytes = 0;
        loop {
            let read = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(StoreError::io("read", path)(e)),
            };
            digest.update(&buffer[..read]);
            bytes += read as u64;
            progress(read as u64);
        }
        Ok(Self::new(bytes, &digest.finalize().into()))
    }

    /// Compares the file at `path` with this entry: its length first, so that
    /// a torn file of many gigabytes is found at once, then its hash.
    ///
    /// # Errors
    /// [`StoreError::Verify`] with what was expected and found.
    pub fn verify(&self, path: &Path) -> Result<(), StoreError> {
        self.verify_with(path, &mut |_| ())
    }

    /// As [`FileEntry::verify`]; `progress` is told the bytes read since its last call.
    ///
    /// # Errors
    /// As [`FileEntry::verify`].
    pub fn verify_with(
        &self,
        path: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), StoreError> {
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(VerifyError::Missing { path: path.to_owned() }.into());
            }
            Err(e) => return Err(StoreError::io("look at", path)(e)),
        };
        if !found.is_file() {
            return Err(VerifyError::NotAFile { path: path.to_owned() }.into());
        }
        if found.len() != self.bytes {
            return Err(VerifyError::Length {
                path: path.to_owned(),
                expected: self.bytes,
                found: found.len(),
            }
            .into());
        }
        let read = Self::of_file(path, progress)?;
        if read.sha256 != self.sha256 {
            return Err(VerifyError::Hash {
                path: path.to_owned(),
                expected: self.sha256.clone(),
                found: read.sha256,
            }
            .into());
        }
        Ok(())
    }
}

/// A folder's file that is not what its manifest says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Listed, and not there.
    #[error("{} is missing, though its manifest lists it; restore it or use another checkpoint", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// There, and not listed.
    #[error("{} is not in its folder's {MANIFEST}; move it away", path.display())]
    Extra {
        /// The file.
        path: PathBuf,
    },
    /// A link or a folder where a file is listed.
    #[error("{} is not a plain file; restore the file itself", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Cut or grown.
    #[error("{} has {found} bytes, expected {expected}; restore it or use another checkpoint", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// Of the right length, with other contents.
    #[error("{} has SHA-256 {found}, expected {expected}; restore it or use another checkpoint", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Hash by the manifest.
        expected: String,
        /// Hash of what is on disk.
        found: String,
    },
}

/// What a folder's contents belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// The run that wrote it. Take it from the configuration and seed, not from
    /// chance: it is among the bytes that two equal runs have in common.
    pub run_id: String,
    /// Version of DRIFT that wrote it.
    pub drift_version: String,
    /// Which iteration's result it is.
    pub iteration: Iteration,
    /// The model the run began with, as configured.
    pub base_model: String,
}

/// Contents of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// What the files belong to.
    #[serde(flatten)]
    pub subject: Subject,
    /// Every file but the manifest, by its path in the folder with `/`.
    pub files: BTreeMap<String, FileEntry>,
}

impl Manifest {
    /// Lists every file under `folder`. Files in `known` were hashed as they
    /// were written and are only compared in length; the others are read.
    /// `progress` is told the bytes that are done since its last call.
    ///
    /// # Errors
    /// A known file that is missing or has another length, a link, a name that
    /// is not UTF-8, or the operation that failed.
    pub fn build(
        folder: &Path,
        subject: Subject,
        known: &BTreeMap<String, FileEntry>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, StoreError> {
        let mut files = BTreeMap::new();
        for (name, bytes) in walk(folder)? {
            let path = folder.join(&name);
            let entry = match known.get(&name) {
                Some(entry) if entry.bytes != bytes => {
                    let expected = entry.bytes;
                    return Err(VerifyError::Length { path, expected, found: bytes }.into());
                }
                Some(entry) => {
                    progress(bytes);
                    entry.clone()
                }
                None => FileEntry::of_file(&path, progress)?,
            };
            files.insert(name, entry);
        }
        if let Some(absent) = known.keys().find(|name| !files.contains_key(*name)) {
            return Err(VerifyError::Missing { path: folder.join(absent) }.into());
        }
        Ok(Self { format: FORMAT, subject, files })
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.values().map(|entry| entry.bytes).sum()
    }

    /// SHA-256 over the list of files: one line for a whole folder's contents,
    /// whoever wrote it.
    pub fn digest(&self) -> String {
        let mut digest = Sha256::new();
        for (name, entry) in &self.files {
            digest.update(format!("{} {} {name}\n", entry.sha256, entry.bytes));
        }
        hex(&digest.finalize())
    }

    /// Writes `manifest.json` into `folder`: the same bytes for equal manifests.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn save(&self, folder: &Path) -> Result<(), StoreError> {
        let path = folder.join(MANIFEST);
        let mut json = serde_json::to_vec_pretty(self)
            .map_err(|e| StoreError::malformed(&path, e.to_string(), "report this as a bug"))?;
        json.push(b'\n');
        publish::write_file(&path, &json)
    }

    /// Reads `manifest.json` of `folder`; the files it lists are not looked at.
    ///
    /// # Errors
    /// The file is missing, not a manifest, of a later format, or lists a name
    /// that leaves the folder.
    pub fn load(folder: &Path) -> Result<Self, StoreError> {
        const REMEDY: &str = "restore it or use another checkpoint";
        let path = folder.join(MANIFEST);
        let mut json = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut json))
            .map_err(StoreError::io("read", &path))?;
        if json.len() as u64 > MAX_MANIFEST_BYTES {
            let problem = format!("larger than {MAX_MANIFEST_BYTES} bytes");
            return Err(StoreError::malformed(&path, problem, REMEDY));
        }
        let manifest: Self = serde_json::from_slice(&json)
            .map_err(|e| StoreError::malformed(&path, format!("not a manifest: {e}"), REMEDY))?;
        if manifest.format != FORMAT {
            let problem = format!("format {}, expected {FORMAT}", manifest.format);
            return Err(StoreError::malformed(&path, problem, "use the drift that wrote it"));
        }
        if let Some(name) = manifest.files.keys().find(|name| !stays_inside(name)) {
            let problem = format!("file name {name:?} leaves the folder");
            return Err(StoreError::malformed(&path, problem, REMEDY));
        }
        Ok(manifest)
    }

    /// Compares every file of `folder` with this manifest: names, lengths, then
    /// hashes.
    ///
    /// # Errors
    /// [`StoreError::Verify`] for the first file, by name, that is missing, not
    /// listed, of another length or with other contents.
    pub fn verify(&self, folder: &Path) -> Result<(), StoreError> {
        self.verify_with(folder, &mut |_| ())
    }

    /// As [`Manifest::verify`]; `progress` is told the bytes read since its last call.
    ///
    /// # Errors
    /// As [`Manifest::verify`].
    pub fn verify_with(
        &self,
        folder: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), StoreError> {
        for (name, _) in walk(folder)? {
            if !self.files.contains_key(&name) {
                return Err(VerifyError::Extra { path: folder.join(name) }.into());
            }
        }
        for (name, entry) in &self.files {
            entry.verify_with(&folder.join(name), progress)?;
        }
        Ok(())
    }
}

/// Plain files under `folder` by relative path, with their lengths; without
/// the manifest itself. Half-written files of [`publish`] are listed too: a
/// folder that has any is not whole.
pub(super) fn walk(folder: &Path) -> Result<BTreeMap<String, u64>, StoreError> {
    let mut files = BTreeMap::new();
    let mut folders = vec![(folder.to_owned(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in publish::list(&folder)? {
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                return Err(StoreError::malformed(&path, "name is not UTF-8", "rename the file"));
            };
            let name = format!("{prefix}{name}");
            let found = entry.metadata().map_err(StoreError::io("look at", &path))?;
            if found.is_dir() {
                folders.push((path, format!("{name}/")));
            } else if !found.is_file() {
                return Err(VerifyError::NotAFile { path }.into());
            } else if name != MANIFEST {
                files.insert(name, found.len());
            }
        }
    }
    Ok(files)
}

fn stays_inside(name: &str) -> bool {
    !name.is_empty()
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;

    pub(in crate::store) fn subject() -> Subject {
        Subject {
            run_id: "r".into(),
            drift_version: "0.1.0".into(),
            iteration: Iteration(1),
            base_model: "SmolLM2".into(),
        }
    }

    fn checkpoint() -> (tempfile::TempDir, Manifest) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        fs::write(dir.path().join("model.safetensors"), vec![7; 3_000_000]).unwrap();
        fs::create_dir(dir.path().join("extra")).unwrap();
        fs::write(dir.path().join("extra/vocab.txt"), "a b c").unwrap();
        let mut seen = 0;
        let built =
            Manifest::build(dir.path(), subject(), &BTreeMap::new(), &mut |n| seen += n).unwrap();
        assert_eq!(seen, 3_000_007);
        assert_eq!(built.total_bytes(), 3_000_007);
        built.save(dir.path()).unwrap();
        let loaded = Manifest::load(dir.path()).unwrap();
        assert_eq!(loaded, built);
        loaded.verify(dir.path()).unwrap();
        (dir, loaded)
    }

    fn refusal(dir: &tempfile::TempDir, manifest: &Manifest) -> VerifyError {
        match manifest.verify(dir.path()) {
            Err(StoreError::Verify(refusal)) => refusal,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn one_flipped_bit_is_found_and_named() {
        let (dir, manifest) = checkpoint();
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        bytes[2_345_678] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        let expected = manifest.files["model.safetensors"].sha256.clone();
        let found = hex(&Sha256::digest(&bytes));
        assert_eq!(refusal(&dir, &manifest), VerifyError::Hash { path, expected, found });
    }

    #[test]
    fn a_torn_a_missing_and_a_foreign_file_are_found() {
        let (dir, manifest) = checkpoint();
        let path = dir.path().join("extra/vocab.txt");
        fs::write(&path, "a b").unwrap();
        assert_eq!(
            refusal(&dir, &manifest),
            VerifyError::Length { path: path.clone(), expected: 5, found: 3 }
        );
        fs::remove_file(&path).unwrap();
        assert_eq!(refusal(&dir, &manifest), VerifyError::Missing { path: path.clone() });
        fs::write(&path, "a b c").unwrap();
        manifest.verify(dir.path()).unwrap();
        let path = dir.path().join("model.bin");
        fs::write(&path, "pickle").unwrap();
        assert_eq!(refusal(&dir, &manifest), VerifyError::Extra { path });
    }

    #[test]
    fn a_link_in_place_of_a_file_is_refused() {
        let (dir, manifest) = checkpoint();
        let path = dir.path().join("config.json");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("extra/vocab.txt", &path).unwrap();
        assert_eq!(refusal(&dir, &manifest), VerifyError::NotAFile { path });
    }

    #[test]
    fn known_hashes_are_taken_and_their_lengths_checked() {
        let (dir, manifest) = checkpoint();
        let mut known = manifest.files.clone();
        known.get_mut("model.safetensors").unwrap().sha256 = "by the worker".into();
        let built = Manifest::build(dir.path(), subject(), &known, &mut |_| ()).unwrap();
        assert_eq!(built.files["model.safetensors"].sha256, "by the worker");
        known.get_mut("model.safetensors").unwrap().bytes = 1;
        let torn = Manifest::build(dir.path(), subject(), &known, &mut |_| ());
        assert!(matches!(torn, Err(StoreError::Verify(VerifyError::Length { .. }))));
        let gone = BTreeMap::from([("lost".to_owned(), FileEntry::new(0, &[0; 32]))]);
        let gone = Manifest::build(dir.path(), subject(), &gone, &mut |_| ());
        assert!(matches!(gone, Err(StoreError::Verify(VerifyError::Missing { .. }))));
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        let (dir, manifest) = checkpoint();
        for name in ["../secrets", "/etc/passwd", ""] {
            let mut evil = manifest.clone();
            evil.files.insert(name.into(), FileEntry::new(0, &[0; 32]));
            evil.save(dir.path()).unwrap();
            let message = Manifest::load(dir.path()).unwrap_err().to_string();
            assert!(message.contains(&format!("file name {name:?} leaves the folder")));
        }
    }

    #[test]
    fn digest_is_of_the_files_alone() {
        let (_dir, manifest) = checkpoint();
        let mut other = manifest.clone();
        other.subject.run_id = "another".into();
        assert_eq!(other.digest(), manifest.digest());
        other.files.get_mut("config.json").unwrap().sha256.replace_range(..1, "x");
        assert_ne!(other.digest(), manifest.digest());
    }
}
