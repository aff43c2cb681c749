//! A connection that remembers what HTTP/2 does not understand.
//!
//! A coordinator refuses a certificate when this side's handshake is over, and
//! what says so would be lost in an error of HTTP/2.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::rustls::Error as TlsError;

/// What a connection carried.
#[derive(Debug, Clone, Copy)]
pub(super) enum Heard {
    /// HTTP/2, as far as this side of it can tell.
    Nothing,
    /// A TLS alert, where the wire has TLS.
    Alert,
    /// TLS, where the wire has none.
    Tls,
}

pub(super) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// A connection, and what was heard on it.
pub(super) struct Hearing {
    stream: Box<dyn Wire>,
    /// Nothing was read yet of a connection without TLS.
    is_new: bool,
    heard: Ear,
}

/// Tells what was heard, when the connection itself is HTTP/2's.
#[derive(Clone)]
pub(super) struct Ear(Arc<Mutex<Heard>>);

impl Ear {
    pub(super) fn get(&self) -> Heard {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hearing {
    pub(super) fn new(stream: Box<dyn Wire>, has_tls: bool) -> Self {
        let heard = Ear(Arc::new(Mutex::new(Heard::Nothing)));
        Self { stream, is_new: !has_tls, heard }
    }

    pub(super) fn heard(&self) -> Ear {
        self.heard.clone()
    }

    fn note(&self, heard: Heard) {
        *self.heard.0.lock().unwrap_or_else(PoisonError::into_inner) = heard;
    }
}

impl AsyncRead for Hearing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if let Err(error) = &read
            && matches!(tls_error(error), Some(TlsError::AlertReceived(_)))
        {
            self.note(Heard::Alert);
        }
        // A record of TLS begins with its type, alert or handshake, and version 3.
        if std::mem::take(&mut self.is_new)
            && matches!(buf.filled()[before..], [0x15 | 0x16, 3, ..])
        {
            self.note(Heard::Tls);
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Hearing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// What TLS says of an error of its connection.
pub(super) fn tls_error(error: &io::Error) -> Option<&TlsError> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}
