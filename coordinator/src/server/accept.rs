//! Takes in callers: bounded in number and rate, past the TLS handshake, until it
//! is clear that they speak HTTP/2.
//!
//! Who comes through, where the door has TLS, showed a certificate of this start.
//! Token and greeting are looked at behind it (`door.rs`, `service.rs`), and what
//! the caller may send until then is bounded by its `connection.rs`.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use super::connection::{Caller, Connection, PREFACE, Stream};
use super::limits::{Limits, Peers};
use super::refusal::{Refusal, RefusalLog};
use super::tls;

/// A caller has this long from its first packet to its greeting.
const GREETING_DEADLINE: Duration = Duration::from_secs(10);

/// Connections that wait for the HTTP server to take them.
const QUEUE: usize = 16;

/// Takes in callers at `listener` until the runtime ends.
pub(super) fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    limits: Limits,
    refusals: RefusalLog,
) -> mpsc::Receiver<io::Result<Connection>> {
    let (through, connections) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let began = Instant::now();
        let peers = Arc::new(Mutex::new(Peers::new(limits)));
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, mostly: others may be closed meanwhile.
                    warn!(%error, "accept a connection");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            };
            let arrived = lock(&peers).arrive(began.elapsed(), peer.ip());
            if let Err(refusal) = arrived {
                refusals.note(refusal, peer);
                continue;
            }
            let place = Place { peers: Arc::clone(&peers), ip: peer.ip() };
            let caller = Caller::new(peer, place, refusals.clone());
            tokio::spawn(come_in(stream, tls.clone(), caller, through.clone()));
        }
    });
    connections
}

/// Shakes hands with a caller and passes it through.
async fn come_in(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    caller: Caller,
    through: mpsc::Sender<io::Result<Connection>>,
) {
    let deadline = Instant::now() + GREETING_DEADLINE;
    match timeout_at(deadline, shake_hands(stream, tls)).await {
        Ok(Ok(stream)) => {
            let _ = through.send(Ok(Connection::new(stream, caller, deadline))).await;
        }
        Ok(Err(refusal)) => caller.refuse(refusal),
        Err(_) => caller.refuse(Refusal::Late),
    }
}

/// Makes a TCP connection one on which HTTP/2 has begun.
async fn shake_hands(stream: TcpStream, tls: Option<TlsAcceptor>) -> Result<Stream, Refusal> {
    let _ = stream.set_nodelay(true);
    let mut stream = match tls {
        Some(tls) => {
            let shaken = tls.accept(stream).await.map_err(|error| tls::refusal(&error))?;
            Stream::Tls(Box::new(shaken))
        }
        None => Stream::Plain(stream),
    };
    let mut first = [0; PREFACE.len()];
    let mut read = 0;
    while read < first.len() {
        match stream.read(&mut first[read..]).await {
            Ok(0) | Err(_) => return Err(Refusal::Left),
            Ok(more) => read += more,
        }
        if first[..read] != PREFACE[..read] {
            return Err(what_else(&first[..read]));
        }
    }
    Ok(stream)
}

/// What somebody speaks who does not speak HTTP/2.
fn what_else(first: &[u8]) -> Refusal {
    let method = first.iter().take_while(|byte| byte.is_ascii_uppercase()).count();
    let is_http1 = (3..=7).contains(&method) && first.get(method) == Some(&b' ');
    if is_http1 { Refusal::Http1 } else { Refusal::NotHttp2 }
}

fn lock(peers: &Mutex<Peers>) -> MutexGuard<'_, Peers> {
    peers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One stranger's place at the door, given back when dropped.
pub(super) struct Place {
    peers: Arc<Mutex<Peers>>,
    ip: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.peers).leave(self.ip);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_of_http_1_is_told_from_noise() {
        assert_eq!(what_else(b"GET / HTTP/1.1"), Refusal::Http1);
        assert_eq!(what_else(b"POST "), Refusal::Http1);
        assert_eq!(what_else(b"PRI * HTTP/1.1"), Refusal::Http1);
        assert_eq!(what_else(b"\x16\x03\x01\x02\x00"), Refusal::NotHttp2);
        assert_eq!(what_else(b"SSH-2.0-OpenSSH"), Refusal::NotHttp2);
    }
}
