//! Callers that have no place in a run.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use drift_proto::v1::{Heartbeat, Hello, WorkerMessage, worker_message::Body};
use h2::SendStream;
use h2::client::ResponseFuture;
use prost::Message;
use prost::bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// What a caller brings to the handshake.
#[derive(Debug, Clone, Copy)]
pub(super) enum Caller {
    /// No TLS.
    Plain,
    /// TLS without a certificate.
    Anonymous,
    /// TLS with the workers' certificate.
    Worker,
}

/// What it says then.
#[derive(Debug)]
pub(super) enum Greeting {
    Silence,
    Raw(Vec<u8>),
    WithoutToken,
    UnknownPath,
    Protocol(u32),
    Generation(u64),
    Slot(u32),
    /// What a worker sends when it is let in.
    Heartbeat,
    /// A message said to have so many bytes, sent as far as it is taken.
    Message(u32),
}

/// What it got.
#[derive(Debug, Default)]
pub(super) struct Got {
    /// Where it did not come to HTTP/2.
    pub(super) bytes: Vec<u8>,
    /// `grpc-status` and `grpc-message`.
    pub(super) status: Option<u32>,
    pub(super) message: String,
    /// Bytes of its message that were taken.
    pub(super) sent: usize,
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

fn text(join: &Path, name: &str) -> String {
    std::fs::read_to_string(join.join(name)).unwrap()
}

/// `HOST:PORT` in a join folder.
fn target(join: &Path) -> String {
    text(join, "address").strip_prefix("https://").unwrap().to_owned()
}

/// TLS as a worker has it, with the certificate of the folder `identity`.
fn tls(join: &Path, identity: Option<&Path>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(join.join("ca.pem")).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        Some(folder) => {
            let own = CertificateDer::from_pem_file(folder.join("worker.pem")).unwrap();
            let key = PrivateKeyDer::from_pem_file(folder.join("worker.key")).unwrap();
            config.with_client_auth_cert(vec![own], key).unwrap()
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(config))
}

async fn shake_hands(target: &str, tls: &TlsConnector) -> std::io::Result<impl Wire + use<>> {
    let stream = TcpStream::connect(target).await?;
    let host = target.rsplit_once(':').unwrap().0.to_owned();
    tls.connect(ServerName::try_from(host).unwrap(), stream).await
}

/// Calls the coordinator of a join folder, until it hangs up or answers.
pub(super) async fn call(join: &Path, caller: Caller, greeting: Greeting) -> Got {
    let target = target(join);
    let mut stream: Box<dyn Wire> = match caller {
        Caller::Plain => Box::new(TcpStream::connect(&target).await.unwrap()),
        Caller::Anonymous => Box::new(shake_hands(&target, &tls(join, None)).await.unwrap()),
        Caller::Worker => Box::new(shake_hands(&target, &tls(join, Some(join))).await.unwrap()),
    };
    let token = text(join, "token");
    let (path, bearer, message, length) = match greeting {
        Greeting::Silence | Greeting::Raw(_) => {
            if let Greeting::Raw(bytes) = greeting {
                let _ = stream.write_all(&bytes).await;
            }
            let mut got = Got::default();
            let read = stream.read_to_end(&mut got.bytes);
            let _ = tokio::time::timeout(Duration::from_secs(30), read).await.expect("hung up on");
            return got;
        }
        Greeting::WithoutToken => (ATTACH, None, hello(0, drift_proto::PROTOCOL_VERSION, 0), None),
        Greeting::UnknownPath => {
            ("/drift.v1.Coordinator/Other", None, hello(0, drift_proto::PROTOCOL_VERSION, 0), None)
        }
        Greeting::Protocol(version) => (ATTACH, Some(token), hello(0, version, 0), None),
        Greeting::Generation(generation) => {
            (ATTACH, Some(token), hello(generation, drift_proto::PROTOCOL_VERSION, 0), None)
        }
        Greeting::Slot(slot) => {
            (ATTACH, Some(token), hello(0, drift_proto::PROTOCOL_VERSION, slot), None)
        }
        Greeting::Heartbeat => {
            let heartbeat = Some(Body::Heartbeat(Heartbeat::default()));
            let message = WorkerMessage { generation: 0, body: heartbeat };
            (ATTACH, Some(token), message.encode_to_vec(), None)
        }
        Greeting::Message(length) => (ATTACH, Some(token), Vec::new(), Some(length)),
    };
    let (answer, mut up) = open(stream, path, bearer).await;
    let mut got = Got::default();
    let length = length.unwrap_or(message.len() as u32);
    let mut frame = vec![0];
    frame.extend(length.to_be_bytes());
    frame.extend(&message);
    if up.send_data(frame.into(), false).is_ok() {
        got.sent = send(&mut up, length as usize - message.len()).await;
    }
    let answer = tokio::time::timeout(Duration::from_secs(30), answer).await.expect("an answer");
    if let Ok(response) = answer {
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        got.status = header("grpc-status").and_then(|status| status.parse().ok());
        // Spaces come as %20.
        got.message = header("grpc-message").unwrap_or_default().replace("%20", " ");
    }
    got
}

const ATTACH: &str = "/drift.v1.Coordinator/Attach";

fn hello(generation: u64, protocol_version: u32, slot: u32) -> Vec<u8> {
    let hello = Hello { protocol_version, slot, ..Hello::default() };
    WorkerMessage { generation, body: Some(Body::Hello(hello)) }.encode_to_vec()
}

/// HTTP/2, and a call.
async fn open(
    stream: Box<dyn Wire>,
    path: &str,
    bearer: Option<String>,
) -> (ResponseFuture, SendStream<Bytes>) {
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut request = http::Request::post(format!("https://coordinator{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(bearer) = bearer {
        request = request.header("authorization", format!("Bearer {bearer}"));
    }
    client.send_request(request.body(()).unwrap(), false).unwrap()
}

/// Sends so many zeros; returns how many were taken before the stream ended.
async fn send(up: &mut SendStream<Bytes>, mut left: usize) -> usize {
    let zeros = Bytes::from(vec![0; 16 << 10]);
    let mut sent = 0;
    while left > 0 {
        up.reserve_capacity(left.min(zeros.len()));
        let room = std::future::poll_fn(|cx| up.poll_capacity(cx));
        let Ok(Some(Ok(room))) = tokio::time::timeout(Duration::from_secs(15), room).await else {
            break;
        };
        let now = room.min(left).min(zeros.len());
        if up.send_data(zeros.slice(..now), false).is_err() {
            break;
        }
        sent += now;
        left -= now;
        // So that what the other side says of it is heard.
        tokio::task::yield_now().await;
    }
    sent
}

/// So many strangers a second, by turns with another start's certificate, without
/// TLS, and with nothing to say; returns how many came.
pub(super) async fn flood(join: &Path, old: &Path, rate: u32, period: Duration) -> usize {
    let target = target(join);
    let tls = tls(join, Some(old));
    let mut tick = tokio::time::interval(Duration::from_secs(1) / rate);
    let end = tokio::time::Instant::now() + period;
    let mut strangers = tokio::task::JoinSet::new();
    let mut came = 0;
    while tokio::time::Instant::now() < end {
        tick.tick().await;
        let (target, tls) = (target.clone(), tls.clone());
        let kind = came % 3;
        strangers.spawn(async move {
            let mut nothing = Vec::new();
            match kind {
                0 => {
                    if let Ok(mut stream) = shake_hands(&target, &tls).await {
                        let _ = stream.read_to_end(&mut nothing).await;
                    }
                }
                1 => {
                    let Ok(mut stream) = TcpStream::connect(&target).await else { return };
                    let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await;
                    let _ = stream.read_to_end(&mut nothing).await;
                }
                _ => {
                    let Ok(mut stream) = TcpStream::connect(&target).await else { return };
                    let _ = stream.read_to_end(&mut nothing).await;
                }
            }
        });
        came += 1;
    }
    strangers.abort_all();
    came
}
