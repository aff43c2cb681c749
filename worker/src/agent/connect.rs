//! The one way to the coordinator: waited for, proven on both sides, and greeted.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use drift_proto::v1::{self as pb, coordinator_client::CoordinatorClient, worker_message::Body};
use drift_proto::{MAX_MESSAGE_BYTES, join};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{CertificateError, Error as TlsError};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Streaming};
use tracing::info;

use super::hearing::{Heard, Hearing, tls_error};
use super::join::{Credentials, JoinError, JoinOptions};

/// Why a worker was not let in.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It has not what lets it in.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The address is none.
    #[error("coordinator {0:?}: expected http://HOST:PORT or https://HOST:PORT")]
    Address(String),
    /// The token cannot be sent.
    #[error("the join token holds characters that no token has")]
    Token,
    /// Another authority signed the coordinator's certificate.
    #[error(
        "the coordinator at {address} is not the one that wrote {}; every start writes its own: take the join folder of the run that listens there",
        authority.display()
    )]
    Stranger {
        /// Where.
        address: String,
        /// The authority that was trusted.
        authority: PathBuf,
    },
    /// The coordinator's certificate is for other names.
    #[error(
        "the coordinator's certificate is not for {host}; reach it by the name in its join folder's `address`, or name {host} in its launch.advertise"
    )]
    Name {
        /// The name that was used.
        host: String,
    },
    /// The coordinator does not accept this worker's certificate.
    #[error(
        "the coordinator at {address} refused the certificate in {}; every start writes its own: take the join folder of the run that listens there",
        certificate.display()
    )]
    Certificate {
        /// Where.
        address: String,
        /// The file.
        certificate: PathBuf,
    },
    /// One side has TLS, the other none.
    #[error(
        "{address}: the coordinator has TLS; write https:// and name its join folder with --join"
    )]
    NeedsTls {
        /// Where.
        address: String,
    },
    /// The token would travel in the clear.
    #[error(
        "{address} is not loopback, and http:// would show the join token to the network; a coordinator off loopback has https://"
    )]
    Plain {
        /// Where.
        address: String,
    },
    /// The coordinator says no, and what it says of it.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// Nobody answered in time.
    #[error(
        "no coordinator let this worker in within {} s: {cause}; start it, or wait longer with --wait",
        waited.as_secs()
    )]
    NotReached {
        /// How long it was tried.
        waited: Duration,
        /// What came of the last attempt.
        cause: String,
    },
}

/// An open stream: what goes up, what comes down, and this machine's address on the
/// way to the coordinator.
pub(super) type Opened =
    (UnboundedSender<pb::WorkerMessage>, Streaming<pb::CoordinatorMessage>, IpAddr);

/// For the name's resolution, TCP and TLS.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// For the answer to a greeting: the run may be at something when it comes.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// Between the first attempts, and between later ones.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// What one attempt came to, if not to a stream.
enum Failed {
    /// A coordinator that is still to start could let the next attempt pass.
    ForNow(String),
    /// So could one that started anew, and wrote other credentials.
    WithThese(ConnectError),
    /// No attempt will pass.
    Forever(ConnectError),
}

impl From<JoinError> for Failed {
    fn from(error: JoinError) -> Self {
        if error.may_pass() { Self::ForNow(error.to_string()) } else { Self::Forever(error.into()) }
    }
}

/// Tries to get in for as long as `wait`: workers may start before their
/// coordinator does. Each attempt reads anew what lets it in.
///
/// # Errors
/// Why this worker is not let in.
pub(super) async fn attach(
    options: &JoinOptions,
    hello: &pb::Hello,
    wait: Duration,
) -> Result<Opened, ConnectError> {
    let began = Instant::now();
    let mut pause = PAUSES.0;
    let mut told = String::new();
    loop {
        let failed = match Credentials::read(options) {
            Ok(credentials) => match open(&credentials, hello).await {
                Ok(opened) => return Ok(opened),
                Err(Failed::WithThese(error)) => {
                    let now = Credentials::read(options);
                    if now.is_ok_and(|now| now == credentials) {
                        Failed::Forever(error)
                    } else {
                        Failed::ForNow(error.to_string())
                    }
                }
                Err(failed) => failed,
            },
            Err(error) => error.into(),
        };
        let cause = match failed {
            Failed::ForNow(cause) => cause,
            Failed::Forever(error) | Failed::WithThese(error) => return Err(error),
        };
        if began.elapsed() + pause >= wait {
            return Err(ConnectError::NotReached { waited: began.elapsed(), cause });
        }
        if cause != told {
            info!(cause, "wait for the coordinator");
            told = cause;
        }
        tokio::time::sleep(pause.mul_f64(jitter())).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// From ½ to 1, so that workers that were turned away together do not come back
/// together.
fn jitter() -> f64 {
    let random = RandomState::new().hash_one(std::process::id());
    0.5 + 0.5 * (random as f64 / u64::MAX as f64)
}

/// One attempt: connects, proves itself, and opens the stream with a greeting.
async fn open(credentials: &Credentials, hello: &pb::Hello) -> Result<Opened, Failed> {
    let address = &credentials.coordinator;
    let uri = address.parse::<Uri>().ok().filter(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some_and(|host| !host.is_empty())
            && uri.port_u16().is_some()
    });
    let uri = uri.ok_or_else(|| Failed::Forever(ConnectError::Address(address.clone())))?;
    let token = format!("Bearer {}", credentials.token).parse();
    let mut token: MetadataValue<Ascii> =
        token.map_err(|_| Failed::Forever(ConnectError::Token))?;
    token.set_sensitive(true);
    let connected = tokio::time::timeout(CONNECT_DEADLINE, connect(credentials, &uri)).await;
    let (stream, here) =
        connected.map_err(|_| Failed::ForNow(format!("{address} does not answer")))??;
    let heard = stream.heard();
    let failed = |code, message: String| failed(credentials, heard.get(), code, message);
    let channel = over(stream, uri).await.map_err(|error| failed(Code::Unknown, told(&error)))?;
    let (up, outbound) = unbounded_channel();
    let greeting = pb::WorkerMessage { generation: 0, body: Some(Body::Hello(hello.clone())) };
    let _ = up.send(greeting);
    let mut request = Request::new(UnboundedReceiverStream::new(outbound));
    request.metadata_mut().insert("authorization", token);
    let mut client = CoordinatorClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    match tokio::time::timeout(ANSWER_DEADLINE, client.attach(request)).await {
        Ok(Ok(response)) => Ok((up, response.into_inner(), here)),
        Ok(Err(status)) => Err(failed(status.code(), status.message().to_owned())),
        Err(_) => Err(Failed::ForNow(format!("{address} leaves a greeting without an answer"))),
    }
}

/// TCP, and TLS where the address says so.
async fn connect(credentials: &Credentials, uri: &Uri) -> Result<(Hearing, IpAddr), Failed> {
    let address = &credentials.coordinator;
    let for_now = |error: io::Error| Failed::ForNow(format!("{address}: {error}"));
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let tls = credentials.tls()?;
    let stream =
        TcpStream::connect((host, uri.port_u16().unwrap_or_default())).await.map_err(for_now)?;
    stream.set_nodelay(true).map_err(for_now)?;
    let here = stream.local_addr().map_err(for_now)?.ip();
    let Some(tls) = tls else {
        if !stays_here(stream.peer_addr().map_err(for_now)?.ip()) {
            return Err(Failed::Forever(ConnectError::Plain { address: address.clone() }));
        }
        return Ok((Hearing::new(Box::new(stream), false), here));
    };
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| Failed::Forever(ConnectError::Address(address.clone())))?;
    match TlsConnector::from(tls).connect(name, stream).await {
        Ok(stream) => Ok((Hearing::new(Box::new(stream), true), here)),
        Err(error) => Err(match tls_error(&error) {
            Some(TlsError::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            )) => Failed::WithThese(ConnectError::Stranger {
                address: address.clone(),
                authority: in_folder(credentials, join::AUTHORITY),
            }),
            Some(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Failed::Forever(ConnectError::Name { host: host.to_owned() }),
            Some(TlsError::AlertReceived(_)) => failed_certificate(credentials),
            _ => for_now(error),
        }),
    }
}

/// Whether what is sent to `ip` never leaves this machine.
fn stays_here(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// HTTP/2 on a connection that is there. It is never made again: the loss of the
/// stream is the loss of the worker.
async fn over(stream: Hearing, uri: Uri) -> Result<Channel, tonic::transport::Error> {
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        std::future::ready(stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
    });
    Endpoint::from(uri)
        // The coordinator's connections answer, whatever it is at itself: who hears
        // nothing for so long is cut off, and looks for it anew.
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
}

/// What the end of an attempt means that had come to HTTP/2.
fn failed(credentials: &Credentials, heard: Heard, code: Code, message: String) -> Failed {
    let address = credentials.coordinator.clone();
    match heard {
        Heard::Alert => return failed_certificate(credentials),
        Heard::Tls => return Failed::Forever(ConnectError::NeedsTls { address }),
        Heard::Nothing => {}
    }
    match code {
        Code::Unauthenticated => Failed::WithThese(ConnectError::Refused(message)),
        Code::FailedPrecondition | Code::InvalidArgument | Code::Unimplemented => {
            Failed::Forever(ConnectError::Refused(message))
        }
        _ => Failed::ForNow(format!("{address}: {message}")),
    }
}

fn failed_certificate(credentials: &Credentials) -> Failed {
    Failed::WithThese(ConnectError::Certificate {
        address: credentials.coordinator.clone(),
        certificate: in_folder(credentials, join::CERTIFICATE),
    })
}

fn in_folder(credentials: &Credentials, name: &str) -> PathBuf {
    credentials.folder().map(|folder| folder.join(name)).unwrap_or_default()
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(address: &str) -> JoinOptions {
        JoinOptions {
            coordinator: Some(address.to_owned()),
            token: Some("t".to_owned()),
            folder: None,
        }
    }

    #[tokio::test]
    async fn a_coordinator_that_is_not_there_is_waited_for_and_then_told_of() {
        // Bound and dropped: a port that nobody listens on.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("http://127.0.0.1:{port}");
        let began = Instant::now();
        let wait = Duration::from_millis(700);
        let error = attach(&at(&address), &pb::Hello::default(), wait).await.unwrap_err();
        assert!(began.elapsed() < wait + Duration::from_millis(500));
        assert!(began.elapsed() > Duration::from_millis(150), "several attempts");
        let message = error.to_string();
        assert!(message.contains(&address) && message.contains("--wait"), "{message}");
    }

    #[tokio::test]
    async fn what_is_no_address_is_refused_at_once() {
        for address in ["node7", "node7:7000", "http://node7", "ftp://node7:1", "http://:1"] {
            let wait = Duration::from_secs(60);
            let error = attach(&at(address), &pb::Hello::default(), wait).await.unwrap_err();
            assert!(matches!(error, ConnectError::Address(_)), "{address}: {error}");
        }
    }

    #[test]
    fn a_token_does_not_leave_the_machine_in_the_clear() {
        for (ip, stays) in [
            ("127.0.0.1", true),
            ("127.1.2.3", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.1.2.3", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(stays_here(ip.parse().unwrap()), stays, "{ip}");
        }
    }

    #[test]
    fn pauses_differ() {
        let pauses: Vec<_> = (0..8).map(|_| jitter()).collect();
        assert!(pauses.iter().all(|pause| (0.5..=1.0).contains(pause)), "{pauses:?}");
        assert!(pauses.iter().any(|pause| *pause != pauses[0]), "{pauses:?}");
    }
}
