//! A caller's connection, and how far the caller has come on it.
//!
//! Until it is let in, time and bytes are bounded: whoever greets late, or sends
//! more than a greeting, is hung up on, whatever the layers above make of it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::accept::Place;
use super::refusal::{Refusal, RefusalLog};

/// A caller that was refused is hung up on after this: its answer has left by then.
const LAST_WORD: Duration = Duration::from_millis(200);

/// Bytes that a caller may send before it is let in. A greeting with all that
/// HTTP/2 puts around it takes less than one KiB.
const GREETING_BYTES: usize = 32 << 10;

/// What every HTTP/2 connection begins with.
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How far a caller has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its greeting is waited for.
    Waiting,
    /// It waits for the run's answer.
    Greeted,
    /// It is a worker of this run.
    Attached,
    /// It is not let in.
    Refused,
}

/// One connection's caller, as those know it who decide about it.
#[derive(Clone)]
pub(super) struct Caller(Arc<Standing>);

struct Standing {
    peer: SocketAddr,
    stage: watch::Sender<Stage>,
    place: Mutex<Option<Place>>,
    refusals: RefusalLog,
}

impl Caller {
    pub(super) fn new(peer: SocketAddr, place: Place, refusals: RefusalLog) -> Self {
        let stage = watch::Sender::new(Stage::Waiting);
        Self(Arc::new(Standing { peer, stage, place: Mutex::new(Some(place)), refusals }))
    }

    /// Its greeting came; the answer may take the run longer than a stranger has.
    pub(super) fn greeted(&self) {
        self.0.stage.send_replace(Stage::Greeted);
    }

    /// It is let in: no bound of this module holds any more.
    pub(super) fn attached(&self) {
        self.0.stage.send_replace(Stage::Attached);
        self.0.place.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// It is not let in: the log is told, and the connection closed.
    pub(super) fn refuse(&self, refusal: Refusal) {
        if self.0.stage.send_replace(Stage::Refused) != Stage::Refused {
            self.0.refusals.note(refusal, self.0.peer);
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if *self.stage.borrow() == Stage::Waiting {
            self.refusals.note(Refusal::Left, self.peer);
        }
    }
}

/// Resolves when a caller is let in (`true`), or is to be hung up on.
async fn verdict(caller: Caller, deadline: Instant) -> bool {
    let mut stage = caller.0.stage.subscribe();
    loop {
        let now = *stage.borrow_and_update();
        match now {
            Stage::Waiting => {
                tokio::select! {
                    _ = stage.changed() => {}
                    () = sleep_until(deadline) => caller.refuse(Refusal::Late),
                }
            }
            Stage::Greeted => drop(stage.changed().await),
            Stage::Attached => return true,
            Stage::Refused => {
                tokio::time::sleep(LAST_WORD).await;
                return false;
            }
        }
    }
}

/// A connection on which HTTP/2 has begun, with or without TLS.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What a stranger may still do on a connection.
enum Watch {
    /// So many bytes, until the verdict.
    Stranger { left: usize, verdict: Pin<Box<dyn Future<Output = bool> + Send>> },
    /// Everything.
    Attached,
    /// Nothing.
    Closed,
}

/// A caller's connection as the HTTP server reads it.
pub(super) struct Connection {
    stream: Stream,
    caller: Caller,
    watch: Watch,
    /// Of the preface, how much the HTTP server has read again.
    read_again: usize,
}

impl Connection {
    pub(super) fn new(stream: Stream, caller: Caller, deadline: Instant) -> Self {
        let verdict = Box::pin(verdict(caller.clone(), deadline));
        let watch = Watch::Stranger { left: GREETING_BYTES, verdict };
        Self { stream, caller, watch, read_again: 0 }
    }

    /// Looks whether the caller is let in by now, or hung up on. A caller that
    /// never reads must not keep its connection either: writing looks here too.
    fn watch(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Watch::Stranger { verdict, .. } = &mut self.watch
            && let Poll::Ready(is_let_in) = verdict.as_mut().poll(cx)
        {
            self.watch = if is_let_in { Watch::Attached } else { Watch::Closed };
        }
        if matches!(self.watch, Watch::Closed) { Err(hung_up()) } else { Ok(()) }
    }
}

fn hung_up() -> io::Error {
    io::ErrorKind::PermissionDenied.into()
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.watch(cx)?;
        if this.read_again < PREFACE.len() {
            let more = buf.remaining().min(PREFACE.len() - this.read_again);
            buf.put_slice(&PREFACE[this.read_again..this.read_again + more]);
            this.read_again += more;
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if let Watch::Stranger { left, .. } = &mut this.watch {
            match left.checked_sub(buf.filled().len() - before) {
                Some(rest) => *left = rest,
                None => {
                    buf.set_filled(before);
                    this.caller.refuse(Refusal::TooMuch);
                    this.watch = Watch::Closed;
                    return Poll::Ready(Err(hung_up()));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.watch(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watch(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
