//! Who comes in: callers that hold the run's join token, and nobody else.

use subtle::ConstantTimeEq;
use tonic::{Request, Status, service::Interceptor};

use super::connection::Caller;
use super::refusal::Refusal;

/// A secret made for one run of the coordinator. Never logged, never an argument.
#[derive(Clone)]
pub(super) struct JoinToken(String);

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinToken(…)")
    }
}

impl JoinToken {
    /// 256 bits from the operating system, in hexadecimal.
    ///
    /// # Errors
    /// The system's source of randomness cannot be read.
    pub(super) fn generate() -> std::io::Result<Self> {
        use std::io::Read;
        let mut bytes = [0u8; 32];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The secret itself, for the environment of a worker that is being started.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }

    fn admits(&self, header: Option<&[u8]>) -> bool {
        let expected = format!("Bearer {}", self.0);
        header.is_some_and(|given| given.ct_eq(expected.as_bytes()).into())
    }
}

impl Interceptor for JoinToken {
    /// Refuses before a message is read, and says nothing but that.
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let header = request.metadata().get("authorization").map(|value| value.as_bytes());
        if self.admits(header) {
            return Ok(request);
        }
        if let Some(caller) = request.extensions().get::<Caller>() {
            caller.refuse(if header.is_some() { Refusal::WrongToken } else { Refusal::NoToken });
        }
        Err(Status::unauthenticated("refused"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_token_opens() {
        let token = JoinToken::generate().unwrap();
        let good = format!("Bearer {}", token.reveal());
        assert!(token.admits(Some(good.as_bytes())));
        assert!(!token.admits(None));
        assert!(!token.admits(Some(b"")));
        assert!(!token.admits(Some(token.reveal().as_bytes())));
        assert!(!token.admits(Some(&good.as_bytes()[..good.len() - 1])));
        let other = JoinToken::generate().unwrap();
        assert!(!other.admits(Some(good.as_bytes())), "each run has its own");
        assert!(!format!("{token:?}").contains(token.reveal()));
    }
}
