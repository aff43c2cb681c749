//! The rendezvous: a key-value store that ranks meet at.

use std::ffi::CString;
use std::net::TcpListener;
use std::os::fd::IntoRawFd;
use std::ptr::NonNull;
use std::time::Duration;

use super::CollectiveError;
use super::ffi;

/// A connection to a c10d `TCPStore`; on rank 0, the store as well.
///
/// The store lives as long as the handle that listens, or a group made from it.
#[derive(Debug)]
pub struct Store {
    handle: NonNull<ffi::StoreHandle>,
}

// SAFETY: `c10d::TCPStore` guards its socket with a mutex and is bound to no thread.
unsafe impl Send for Store {}

impl Store {
    /// Opens a store on `host` at a port of the system's choosing, and returns
    /// the port at once, without waiting for anyone to connect. The store is
    /// reachable at `host` only.
    ///
    /// # Errors
    /// [`CollectiveError::Bind`] where `host` is not an address of this
    /// machine; [`CollectiveError::Store`] with c10d's words otherwise.
    pub fn listen(host: &str) -> Result<(Self, u16), CollectiveError> {
        let bind = |source| CollectiveError::Bind { host: host.to_owned(), source };
        // Bound here and handed over, because c10d by itself would listen on every interface.
        let listener = TcpListener::bind((host, 0)).map_err(bind)?;
        let port = listener.local_addr().map_err(bind)?.port();
        let name = c_string(host)?;
        // The store takes the socket over. Where it fails it may have closed it already or not, and
        // to leak a descriptor is better than to close somebody else's.
        let socket = listener.into_raw_fd();
        let (handle, text) = ffi::call(|error| {
            // SAFETY: `name` outlives the call; `socket` is open, listening, and ours to give away;
            // `error` is valid.
            unsafe { ffi::drift_store_listen(name.as_ptr(), port, socket, error) }
        });
        Ok((Self::from_handle(handle, text, "listen", host, port)?, port))
    }

    /// Connects to the store that rank 0 opened at `host` and `port`, trying
    /// again until `timeout`.
    ///
    /// # Errors
    /// [`CollectiveError::Store`] where nobody answers in time.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, CollectiveError> {
        let name = c_string(host)?;
        let (handle, text) = ffi::call(|error| {
            // SAFETY: `name` outlives the call; `error` is valid.
            unsafe { ffi::drift_store_connect(name.as_ptr(), port, milliseconds(timeout), error) }
        });
        Self::from_handle(handle, text, "connect", host, port)
    }

    pub(super) fn handle(&self) -> *const ffi::StoreHandle {
        self.handle.as_ptr()
    }

    fn from_handle(
        handle: *mut ffi::StoreHandle,
        text: Option<String>,
        operation: &'static str,
        host: &str,
        port: u16,
    ) -> Result<Self, CollectiveError> {
        NonNull::new(handle).map(|handle| Self { handle }).ok_or_else(|| CollectiveError::Store {
            operation,
            host: host.to_owned(),
            port,
            text: text.unwrap_or_else(ffi::unexplained),
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle came from the bridge and is freed once, here.
        unsafe { ffi::drift_store_free(self.handle.as_ptr()) }
    }
}

pub(super) fn c_string(host: &str) -> Result<CString, CollectiveError> {
    CString::new(host).map_err(|_| CollectiveError::HostName(host.to_owned()))
}

/// c10d counts in milliseconds, and takes 0 for "no timeout".
pub(super) fn milliseconds(timeout: Duration) -> i64 {
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX).max(1)
}
