//! What lets a worker in: a token, and where the wire has TLS, certificates.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drift_proto::{JOIN_DIR_ENV, JOIN_TOKEN_ENV, join};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, Error, RootCertStore, version};

/// Where a worker looks for its coordinator and for what lets it in.
#[derive(Clone, Default)]
pub struct JoinOptions {
    /// `http://HOST:PORT` or `https://HOST:PORT`; none: as the join folder says.
    pub coordinator: Option<String>,
    /// The run's join folder.
    pub folder: Option<PathBuf>,
    /// The join token; none: as the join folder says.
    pub token: Option<String>,
}

impl std::fmt::Debug for JoinOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { coordinator, folder, token } = self;
        let token = token.as_ref().map(|_| "…");
        f.debug_struct("JoinOptions")
            .field("coordinator", coordinator)
            .field("folder", folder)
            .field("token", &token)
            .finish()
    }
}

/// Why a worker has not what lets it in.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody said where the coordinator is.
    #[error("no coordinator is named: give --coordinator, or the run's join folder with --join")]
    NoCoordinator,
    /// There is no token.
    #[error(
        "no join token: name the run's join folder with --join or in {JOIN_DIR_ENV}, or give the token in {JOIN_TOKEN_ENV}"
    )]
    NoToken,
    /// There are no certificates.
    #[error(
        "{address} has TLS, which takes certificates: name the run's join folder with --join or in {JOIN_DIR_ENV}"
    )]
    NoCertificates {
        /// The coordinator's.
        address: String,
    },
    /// A file of the join folder cannot be read.
    #[error("read {}: {cause}; {}", path.display(), remedy(cause))]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A file of the join folder is not what its name says.
    #[error("{} holds no {what} in PEM; copy the run's join folder again", path.display())]
    NotPem {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// Certificate and key do not fit.
    #[error("{}: {cause}; copy the run's join folder again, all of it", folder.display())]
    Unusable {
        /// The join folder.
        folder: PathBuf,
        /// Why.
        cause: Error,
    },
}

impl JoinError {
    /// Whether the coordinator may only have to start for this to pass.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Self::File { cause, .. } if cause.kind() == io::ErrorKind::NotFound)
    }
}

fn remedy(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::NotFound => {
            "the coordinator writes RUN_DIR/join when it starts: check --join, and that it runs"
        }
        io::ErrorKind::PermissionDenied => {
            "only the user who started the coordinator may read it: start the worker as that user"
        }
        _ => "check --join",
    }
}

/// What lets a worker in, as it is at one moment: each start of the coordinator
/// has its own.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) coordinator: String,
    pub(super) token: String,
    certificates: Option<Certificates>,
}

#[derive(Clone, PartialEq, Eq)]
struct Certificates {
    folder: PathBuf,
    authority: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Credentials {
    /// Reads what `options` name.
    ///
    /// # Errors
    /// What is missing, and where it should be.
    pub(super) fn read(options: &JoinOptions) -> Result<Self, JoinError> {
        let JoinOptions { coordinator, folder, token } = options;
        let text = |given: &Option<String>, name: &str, missing: JoinError| match (given, folder) {
            (Some(given), _) => Ok(given.clone()),
            (None, Some(folder)) => {
                let bytes = read(&folder.join(name))?;
                Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
            }
            (None, None) => Err(missing),
        };
        let coordinator = text(coordinator, join::ADDRESS, JoinError::NoCoordinator)?;
        let token = text(token, join::TOKEN, JoinError::NoToken)?;
        let certificates = if coordinator.starts_with("https://") {
            let Some(folder) = folder else {
                return Err(JoinError::NoCertificates { address: coordinator });
            };
            Some(Certificates {
                folder: folder.clone(),
                authority: read(&folder.join(join::AUTHORITY))?,
                certificate: read(&folder.join(join::CERTIFICATE))?,
                key: read(&folder.join(join::KEY))?,
            })
        } else {
            None
        };
        Ok(Self { coordinator, token, certificates })
    }

    /// The join folder whose certificates these are.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.certificates.as_ref().map(|certificates| certificates.folder.as_path())
    }

    /// TLS 1.3 that trusts this start's authority and no other; none for `http://`.
    ///
    /// # Errors
    /// The file that is not what its name says.
    pub(super) fn tls(&self) -> Result<Option<Arc<ClientConfig>>, JoinError> {
        let Some(Certificates { folder, authority, certificate, key }) = &self.certificates else {
            return Ok(None);
        };
        let not_pem = |name: &str, what| JoinError::NotPem { path: folder.join(name), what };
        let certificate_in = |pem: &[u8], name| {
            CertificateDer::from_pem_slice(pem).map_err(|_| not_pem(name, "certificate"))
        };
        let unusable = |cause| JoinError::Unusable { folder: folder.clone(), cause };
        let mut roots = RootCertStore::empty();
        roots.add(certificate_in(authority, join::AUTHORITY)?).map_err(unusable)?;
        let own = certificate_in(certificate, join::CERTIFICATE)?;
        let key =
            PrivateKeyDer::from_pem_slice(key).map_err(|_| not_pem(join::KEY, "private key"))?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13])
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![own], key)
            .map_err(unusable)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = tokio_rustls::rustls::client::Resumption::disabled();
        Ok(Some(Arc::new(config)))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, JoinError> {
    std::fs::read(path).map_err(|cause| JoinError::File { path: path.to_owned(), cause })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn told(options: &JoinOptions) -> (String, bool) {
        let error = match Credentials::read(options).and_then(|read| read.tls()) {
            Ok(_) => panic!("they suffice"),
            Err(error) => error,
        };
        (error.to_string(), error.may_pass())
    }

    #[test]
    fn what_is_missing_is_told_with_its_place_and_its_remedy() {
        let mut options = JoinOptions::default();
        assert_eq!(told(&options).0, JoinError::NoCoordinator.to_string());
        options.coordinator = Some("https://node7:7000".to_owned());
        assert!(told(&options).0.contains(JOIN_TOKEN_ENV));
        options.token = Some("secret".to_owned());
        let (message, may_pass) = told(&options);
        assert!(message.starts_with("https://node7:7000 has TLS") && !may_pass, "{message}");
        assert!(!format!("{options:?}").contains("secret"));

        let folder = tempfile::tempdir().unwrap();
        options.folder = Some(folder.path().join("join"));
        let (message, may_pass) = told(&options);
        assert!(message.contains("join/ca.pem: No such file") && may_pass, "{message}");
        assert!(message.contains("check --join, and that it runs"), "{message}");

        options.folder = Some(folder.path().to_owned());
        for name in [join::AUTHORITY, join::CERTIFICATE, join::KEY] {
            std::fs::write(folder.path().join(name), "half a file").unwrap();
        }
        let (message, may_pass) = told(&options);
        assert!(message.contains("ca.pem holds no certificate") && !may_pass, "{message}");
    }

    #[test]
    fn the_folder_names_the_coordinator_and_what_is_given_wins() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(join::ADDRESS), "http://127.0.0.1:7000").unwrap();
        std::fs::write(folder.path().join(join::TOKEN), "of the folder\n").unwrap();
        let mut options =
            JoinOptions { folder: Some(folder.path().to_owned()), ..JoinOptions::default() };
        let read = Credentials::read(&options).unwrap();
        assert_eq!(
            (read.coordinator.as_str(), read.token.as_str()),
            ("http://127.0.0.1:7000", "of the folder")
        );
        assert!(read.tls().unwrap().is_none(), "loopback needs no certificates");
        options.coordinator = Some("http://127.0.0.1:1".to_owned());
        options.token = Some("given".to_owned());
        let read = Credentials::read(&options).unwrap();
        assert_eq!(
            (read.coordinator.as_str(), read.token.as_str()),
            ("http://127.0.0.1:1", "given")
        );
    }
}
