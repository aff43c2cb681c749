//! What is fed: each reader of something that others wrote.

mod corpus;
mod run;
mod weights;
mod wire;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use self::corpus::Corpus;
use self::run::{Config, ManifestFile, PairsFile};
use self::weights::{Kind, Model, State};
use self::wire::Wire;

/// All targets.
pub(crate) const NAMES: [&str; 9] =
    ["corpus", "parquet", "config", "manifest", "pairs", "model", "reward", "state", "wire"];

/// A reader.
pub(crate) trait Target {
    /// Valid inputs.
    fn seeds(&self) -> Vec<Vec<u8>>;
    /// Reads `bytes`; whether it refuses them does not matter.
    fn try_input(&mut self, bytes: &[u8]);
}

/// The target of this name.
pub(crate) fn target(name: &str) -> Result<Box<dyn Target>> {
    let folder = tempfile::Builder::new().prefix("drift-fuzz").tempdir_in(scratch())?;
    Ok(match name {
        "corpus" => Box::new(Corpus { folder, parquet: false }),
        "parquet" => Box::new(Corpus { folder, parquet: true }),
        "config" => Box::new(Config(folder)),
        "manifest" => Box::new(ManifestFile(folder)),
        "pairs" => Box::new(PairsFile(folder)),
        "model" => Box::new(Model { folder, of: Kind::Decoder }),
        "reward" => Box::new(Model { folder, of: Kind::Encoder }),
        "state" => Box::new(State::new(folder)?),
        "wire" => Box::new(Wire),
        other => bail!("no target {other}"),
    })
}

/// A folder in memory where the machine has one: a disk would be what is measured.
fn scratch() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}

fn put(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).expect("write an input");
    path
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What once broke a target, in files named after it, breaks it no more; nor does what
    /// inputs are made from.
    #[test]
    fn nothing_that_was_found_breaks_anything_again() {
        let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/found");
        let found: Vec<PathBuf> =
            found.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!found.is_empty());
        for name in NAMES {
            let mut target = target(name).unwrap();
            let of_it = |path: &&PathBuf| {
                path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}-"))
            };
            for seed in target.seeds() {
                target.try_input(&seed);
            }
            for path in found.iter().filter(of_it) {
                target.try_input(&fs::read(path).unwrap());
            }
        }
    }
}
