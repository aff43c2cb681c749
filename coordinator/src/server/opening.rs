//! Makes a door and what opens it: the socket, a new token, certificates where
//! the wire has TLS, and the join folder.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use drift_proto::{JOIN_DIR_ENV, JOIN_TOKEN_ENV, join};
use tokio::net::{TcpListener, TcpSocket};
use tokio_rustls::TlsAcceptor;

use super::door::JoinToken;
use super::tls::{CertifyError, Credentials};
use crate::config::{LaunchSettings, StartWorkers, Tls};
use crate::store::StoreError;
use crate::store::secrets::SecretFolder;

/// Why no door was made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The address cannot be listened on.
    #[error(
        "listen on {listen}: {cause}; launch.listen takes an address of this machine, and a port that is free (0 finds one)"
    )]
    Listen {
        /// `launch.listen`.
        listen: String,
        /// Why.
        cause: std::io::Error,
    },
    /// The system gives no randomness.
    #[error("make a join token: {0}")]
    Token(std::io::Error),
    /// No certificates.
    #[error(transparent)]
    Certify(#[from] CertifyError),
    /// The join folder cannot be written.
    #[error(transparent)]
    Folder(#[from] StoreError),
}

/// A door that is locked still: nobody is taken in before it is served.
pub struct Opening {
    pub(super) listener: TcpListener,
    /// Where it listens.
    pub address: SocketAddr,
    pub(super) token: JoinToken,
    pub(super) tls: Option<TlsAcceptor>,
    /// What workers need.
    pub way: WayIn,
}

/// What a worker needs to be let in. The join folder lives as long as this.
#[derive(Debug)]
pub struct WayIn {
    url: String,
    token: JoinToken,
    folder: Option<SecretFolder>,
}

impl WayIn {
    /// Where a worker on this machine finds the coordinator.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The join folder, where there is one.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_ref().map(SecretFolder::path)
    }

    /// For a worker that is being started: the variable that holds what lets it in,
    /// and the one that must not be there.
    pub(super) fn environment(&self) -> ((&'static str, OsString), &'static str) {
        match self.folder() {
            Some(folder) => ((JOIN_DIR_ENV, folder.into()), JOIN_TOKEN_ENV),
            None => ((JOIN_TOKEN_ENV, self.token.reveal().into()), JOIN_DIR_ENV),
        }
    }
}

impl Opening {
    /// Binds `launch.listen`, and writes `folder` where workers need files: for
    /// TLS, or because somebody else starts them.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn make(launch: &LaunchSettings, folder: &Path) -> Result<Self, OpenError> {
        let listen = |cause| OpenError::Listen { listen: launch.listen.clone(), cause };
        let listener = listen_on(&launch.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let token = JoinToken::generate().map_err(OpenError::Token)?;
        let has_tls = launch.tls == Tls::Always || !address.ip().to_canonical().is_loopback();
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let names = Names::of(address.ip(), &launch.advertise, &host);
        let credentials = has_tls.then(|| Credentials::make(&names.all)).transpose()?;
        let url = |name: &str| {
            let scheme = if has_tls { "https" } else { "http" };
            let is_v6 = name.parse::<Ipv6Addr>().is_ok();
            let name = if is_v6 { format!("[{name}]") } else { name.to_owned() };
            format!("{scheme}://{name}:{}", address.port())
        };
        let outside = url(&names.outside);
        let mut files = vec![(join::ADDRESS, outside.as_str()), (join::TOKEN, token.reveal())];
        if let Some(credentials) = &credentials {
            files.extend([
                (join::AUTHORITY, credentials.authority_pem.as_str()),
                (join::CERTIFICATE, &credentials.worker_pem),
                (join::KEY, &credentials.worker_key_pem),
            ]);
        }
        let published = if has_tls || launch.start != StartWorkers::Local {
            let folder: PathBuf =
                std::path::absolute(folder).map_err(StoreError::io("find", folder))?;
            Some(SecretFolder::publish(&folder, &files)?)
        } else {
            None
        };
        let way = WayIn { url: url(&names.inside), token: token.clone(), folder: published };
        let tls = credentials.map(|credentials| TlsAcceptor::from(credentials.server));
        Ok(Self { listener, address, token, tls, way })
    }
}

/// Connections that the system keeps until they are taken in: as many as Linux lets any
/// program have. All workers of a run come in one moment, and of those that find the queue
/// full some are cut off.
const BACKLOG: u32 = 4096;

/// Listens on the first of `address`'s meanings that can be listened on.
async fn listen_on(address: &str) -> std::io::Result<TcpListener> {
    let mut failed = None;
    for address in tokio::net::lookup_host(address).await? {
        let listening = || {
            let socket = match address {
                SocketAddr::V4(_) => TcpSocket::new_v4()?,
                SocketAddr::V6(_) => TcpSocket::new_v6()?,
            };
            // A port whose last connections linger is free for the next start.
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        match listening() {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.unwrap_or_else(|| std::io::Error::other("the name has no address")))
}

/// Under which names the coordinator is found, and certified.
#[derive(Debug, PartialEq, Eq)]
struct Names {
    /// By workers elsewhere.
    outside: String,
    /// By workers on its own machine.
    inside: String,
    /// All of them.
    all: Vec<String>,
}

impl Names {
    fn of(listen: IpAddr, advertise: &str, host: &str) -> Self {
        let inside = match listen {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let outside = match advertise {
            "" if listen.is_unspecified() => host.to_owned(),
            "" => listen.to_string(),
            advertise => advertise.to_owned(),
        };
        let inside = inside.to_string();
        let mut all =
            vec![outside.clone(), inside.clone(), host.to_owned(), "localhost".to_owned()];
        let mut seen = std::collections::BTreeSet::new();
        all.retain(|name| !name.is_empty() && seen.insert(name.clone()));
        Self { outside, inside, all }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_is_found_by_what_it_advertises_its_address_or_its_machine() {
        let names = |listen: &str, advertise| {
            let names = Names::of(listen.parse().unwrap(), advertise, "node7");
            (names.outside, names.inside)
        };
        let pair = |outside: &str, inside: &str| (outside.to_owned(), inside.to_owned());
        assert_eq!(names("127.0.0.1", ""), pair("127.0.0.1", "127.0.0.1"));
        assert_eq!(names("10.1.2.3", ""), pair("10.1.2.3", "10.1.2.3"));
        assert_eq!(names("10.1.2.3", "head.cluster"), pair("head.cluster", "10.1.2.3"));
        assert_eq!(names("0.0.0.0", ""), pair("node7", "127.0.0.1"));
        assert_eq!(names("::", "10.1.2.3"), pair("10.1.2.3", "::1"));
        let all = Names::of("10.1.2.3".parse().unwrap(), "", "node7").all;
        assert_eq!(all, ["10.1.2.3", "node7", "localhost"]);
    }

    /// Nobody takes them in: they wait in the system's queue.
    #[tokio::test]
    async fn two_thousand_workers_may_come_before_the_first_is_taken_in() {
        const WORKERS: usize = 2000;
        super::super::limits::raise_open_files(2 * WORKERS as u32);
        let listener = listen_on("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let coming = (0..WORKERS).map(|_| tokio::net::TcpStream::connect(address));
        let came = coming.collect::<tokio::task::JoinSet<_>>().join_all();
        let came = tokio::time::timeout(std::time::Duration::from_secs(10), came).await.unwrap();
        let came: std::io::Result<Vec<_>> = came.into_iter().collect();
        assert_eq!(came.unwrap().len(), WORKERS);
    }

    #[tokio::test]
    async fn a_join_folder_is_there_for_tls_and_for_workers_that_others_start() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("join");
        let files = || {
            let entries = std::fs::read_dir(&folder).map(Iterator::collect::<Vec<_>>);
            let names = entries.unwrap_or_default().into_iter();
            let mut names: Vec<_> =
                names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let plain = LaunchSettings::default();
        let opening = Opening::make(&plain, &folder).await.unwrap();
        assert!(files().is_empty(), "the environment is enough");
        assert_eq!(opening.way.environment().0.0, JOIN_TOKEN_ENV);
        let alone = LaunchSettings { start: StartWorkers::None, ..plain.clone() };
        let opening = Opening::make(&alone, &folder).await.unwrap();
        assert_eq!(files(), ["address", "token"]);
        drop(opening);
        assert!(files().is_empty(), "nothing stays behind");
        let always = LaunchSettings { tls: Tls::Always, ..plain };
        let opening = Opening::make(&always, &folder).await.unwrap();
        assert_eq!(files(), ["address", "ca.pem", "token", "worker.key", "worker.pem"]);
        assert!(opening.way.url().starts_with("https://127.0.0.1:"));
        let ((variable, value), _) = opening.way.environment();
        assert_eq!((variable, Path::new(&value)), (JOIN_DIR_ENV, folder.as_path()));
        let token = std::fs::read_to_string(folder.join("token")).unwrap();
        assert_eq!(token, opening.token.reveal());
        let again = Opening::make(&always, &folder).await.unwrap();
        assert_ne!(again.token.reveal(), token, "each start has its own");
    }
}
