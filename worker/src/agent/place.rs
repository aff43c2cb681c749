//! Whether this machine sees the run's directory: weights and training state go
//! through it.

use std::io;
use std::path::{Path, PathBuf};

use drift_proto::v1::Welcome;
use sha2::{Digest, Sha256};

/// The run directory is not here, or another one is.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot see the run directory {} from {host}: {cause}; workers read and write weights in it, so put it (and the model) on a file system that all machines share, under one path",
    directory.display()
)]
pub struct Unseen {
    directory: PathBuf,
    host: String,
    cause: String,
}

/// Looks for the directory that `welcome` names.
///
/// # Errors
/// [`Unseen`].
pub(super) fn look(welcome: &Welcome, host: &str) -> Result<(), Unseen> {
    let directory = Path::new(&welcome.run_directory);
    see(directory, &welcome.config_sha256).map_err(|cause| Unseen {
        directory: directory.to_owned(),
        host: host.to_owned(),
        cause,
    })
}

fn see(directory: &Path, config_sha256: &[u8]) -> Result<(), String> {
    let told = |name: &'static str| move |error: io::Error| format!("{name}: {error}");
    let config = std::fs::read(directory.join("config.toml")).map_err(told("config.toml"))?;
    if Sha256::digest(&config).as_slice() != config_sha256 {
        return Err("its config.toml is another run's".to_owned());
    }
    rustix::fs::access(directory.join("snapshots"), rustix::fs::Access::WRITE_OK)
        .map_err(|error| told("snapshots")(error.into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_known_by_its_settings() {
        let dir = tempfile::tempdir().unwrap();
        let welcome = Welcome {
            run_directory: dir.path().to_str().unwrap().to_owned(),
            config_sha256: Sha256::digest("seed = 1").to_vec(),
            ..Welcome::default()
        };
        let message = || look(&welcome, "node7").unwrap_err().to_string();
        assert!(message().contains("from node7: config.toml: No such file"), "{}", message());
        std::fs::write(dir.path().join("config.toml"), "seed = 2").unwrap();
        assert!(message().contains("its config.toml is another run's"), "{}", message());
        std::fs::write(dir.path().join("config.toml"), "seed = 1").unwrap();
        assert!(message().contains("snapshots: No such file"), "{}", message());
        std::fs::create_dir(dir.path().join("snapshots")).unwrap();
        look(&welcome, "node7").unwrap();
    }
}
