//! The endpoints at which whatever keeps a program running looks at it:
//! `/healthz`, `/readyz`, and Prometheus' `/metrics`.
//!
//! They have a thread of their own: a program that is busy still answers, and one
//! that hangs says so.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;

/// A program that can be looked at. Each answer comes at once: none waits for a
/// peer, or for work.
pub trait Watched: Send + Sync + 'static {
    /// Whether its own loop still turns; a peer that is gone is no reason for
    /// "no", since a restart here would not bring it back.
    ///
    /// # Errors
    /// Why not.
    fn alive(&self) -> Result<(), String>;

    /// Whether it is at its work, and hears from whom it works with.
    ///
    /// # Errors
    /// Why not.
    fn ready(&self) -> Result<(), String>;

    /// Everything measured, in Prometheus' text format.
    fn metrics(&self) -> String;
}

/// Where the endpoints listen: `PORT`, which means loopback, or `IP:PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchAddress(pub SocketAddr);

impl FromStr for WatchAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let on_loopback = text.parse().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        on_loopback.or_else(|_| text.parse()).map(Self).map_err(|_| {
            format!("{text:?} is neither PORT, on loopback, nor IP:PORT, such as 0.0.0.0:9464")
        })
    }
}

impl fmt::Display for WatchAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why there are no endpoints.
#[derive(Debug)]
pub struct WatchError {
    address: WatchAddress,
    cause: io::Error,
}

impl fmt::Display for WatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "listen on {}: {}; --metrics takes a port that is free, on loopback, or IP:PORT of this machine",
            self.address, self.cause
        )
    }
}

impl std::error::Error for WatchError {}

/// Connections at once; a further one waits for its turn.
const CONNECTIONS: usize = 16;

/// A caller has this long for the head of a request.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);

/// One connection lives at most this long, so that nobody holds a place for good.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(300);

/// A request's head may have this many bytes.
const HEAD_BYTES: usize = 8 << 10;

/// Shows `program` at `address` for as long as the process lives. Returns where: port
/// 0 is any that is free.
///
/// # Errors
/// The address cannot be listened on.
pub fn serve(address: WatchAddress, program: Arc<dyn Watched>) -> Result<WatchAddress, WatchError> {
    start(address, program).map_err(|cause| WatchError { address, cause })
}

fn start(address: WatchAddress, program: Arc<dyn Watched>) -> io::Result<WatchAddress> {
    let listener = std::net::TcpListener::bind(address.0)?;
    listener.set_nonblocking(true)?;
    let bound = WatchAddress(listener.local_addr()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let serve = move || runtime.block_on(accept(listener, program));
    std::thread::Builder::new().name("watch".to_owned()).spawn(serve)?;
    Ok(bound)
}

async fn accept(listener: std::net::TcpListener, program: Arc<dyn Watched>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Out of descriptors, most often: that passes.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let program = Arc::clone(&program);
        tokio::spawn(async move {
            let answer = |request: Request<Incoming>| {
                let response = respond(&*program, request.method(), request.uri().path());
                std::future::ready(Ok::<_, Infallible>(response))
            };
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_DEADLINE)
                .max_buf_size(HEAD_BYTES)
                .serve_connection(TokioIo::new(stream), hyper::service::service_fn(answer));
            // A caller that breaks off has had its answer, or wants none.
            let _ = tokio::time::timeout(CONNECTION_DEADLINE, connection).await;
            drop(place);
        });
    }
}

fn respond(program: &dyn Watched, method: &Method, path: &str) -> Response<Full<Bytes>> {
    let said = |answer: Result<(), String>, yes: &str| match answer {
        Ok(()) => plain(StatusCode::OK, format!("{yes}\n")),
        Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("not {yes}: {why}\n")),
    };
    if *method != Method::GET && *method != Method::HEAD {
        let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n".to_owned());
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    match path {
        "/healthz" => said(program.alive(), "alive"),
        "/readyz" => said(program.ready(), "ready"),
        "/metrics" => {
            let mut metrics = plain(StatusCode::OK, program.metrics());
            let text_format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            metrics.headers_mut().insert(CONTENT_TYPE, text_format);
            metrics
        }
        _ => plain(StatusCode::NOT_FOUND, "/healthz, /readyz or /metrics\n".to_owned()),
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, text);
    response
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Default)]
    struct Program {
        deaf: AtomicBool,
    }

    impl Watched for Program {
        fn alive(&self) -> Result<(), String> {
            Ok(())
        }

        fn ready(&self) -> Result<(), String> {
            let deaf = self.deaf.load(Ordering::Relaxed);
            if deaf { Err("nobody is heard".to_owned()) } else { Ok(()) }
        }

        fn metrics(&self) -> String {
            "drift_up 1\n".to_owned()
        }
    }

    fn try_ask(address: WatchAddress, head: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(address.0)?;
        let request = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn ask(address: WatchAddress, head: &str) -> String {
        try_ask(address, head).unwrap()
    }

    #[test]
    fn each_endpoint_says_its_own_and_why_not() {
        let program = Arc::new(Program::default());
        let address = serve("0".parse().unwrap(), Arc::clone(&program) as _).unwrap();
        assert!(address.0.ip().is_loopback(), "a port alone is on loopback");
        let ready = ask(address, "GET /readyz");
        assert!(ready.starts_with("HTTP/1.1 200") && ready.ends_with("\r\nready\n"), "{ready}");
        program.deaf.store(true, Ordering::Relaxed);
        let ready = ask(address, "GET /readyz");
        assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
        assert!(ready.ends_with("not ready: nobody is heard\n"), "{ready}");
        assert!(ask(address, "GET /healthz").ends_with("\r\nalive\n"));
        let metrics = ask(address, "GET /metrics?now");
        assert!(metrics.contains("version=0.0.4") && metrics.ends_with("drift_up 1\n"));
        assert!(ask(address, "GET /").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics").starts_with("HTTP/1.1 405"));
        // It hangs up on the rest of the head: whether the answer arrives before that is chance.
        let head = format!("GET /{}", "x".repeat(HEAD_BYTES));
        let refused =
            try_ask(address, &head).map_or(true, |answer| answer.starts_with("HTTP/1.1 4"));
        assert!(refused, "a head has its bound");
        let taken = serve(address, program).unwrap_err().to_string();
        assert!(taken.contains(&address.to_string()) && taken.contains("--metrics"), "{taken}");
    }

    #[test]
    fn an_address_is_a_port_on_loopback_or_says_its_ip() {
        let shown = |text: &str| text.parse::<WatchAddress>().map(|a| a.to_string());
        assert_eq!(shown("9464").unwrap(), "127.0.0.1:9464");
        assert_eq!(shown("0.0.0.0:9464").unwrap(), "0.0.0.0:9464");
        assert_eq!(shown("[::1]:1").unwrap(), "[::1]:1");
        for text in ["", "localhost:9464", "127.0.0.1", "99999"] {
            assert!(shown(text).unwrap_err().contains("IP:PORT"), "{text}");
        }
    }
}
