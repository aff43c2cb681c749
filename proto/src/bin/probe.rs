//! `probe`: asks a program at one of its endpoints, for images that hold no shell
//! and no other client.
//!
//! `probe 9464/readyz` prints the answer's body and exits with 0 if it was 200.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

/// The program answers at once or hangs.
const DEADLINE: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(what), None) = (arguments.next(), arguments.next()) else {
        return say("usage: probe PORT/PATH, as in: probe 9464/readyz\n", 2);
    };
    match ask(&what) {
        Ok((true, body)) => say(&body, 0),
        Ok((false, body)) => say(&body, 1),
        Err(error) => say(&format!("{what}: {error}\n"), 1),
    }
}

fn say(text: &str, status: u8) -> ExitCode {
    // Whoever reads it may be gone; the status tells.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::from(status)
}

/// Whether the answer was 200, and its body.
fn ask(what: &str) -> std::io::Result<(bool, String)> {
    let (port, path) = what.split_once('/').unwrap_or((what, "healthz"));
    let port = port.parse().map_err(std::io::Error::other)?;
    let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let is_well = answer.starts_with("HTTP/1.1 200 ");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((is_well, body.to_owned()))
}
