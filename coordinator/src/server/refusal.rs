//! Why a caller is not let in. The log is told, in words and in numbers; the
//! caller is not.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::warn;

/// One reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refusal {
    /// Its address has called too often of late.
    TooOften,
    /// Too many others stand at the door, of its address or in all.
    Crowded,
    /// It did not greet in time.
    Late,
    /// It went before it greeted.
    Left,
    /// What it sent is not TLS.
    NotTls,
    /// It showed no certificate.
    NoCertificate,
    /// Its certificate is not of this run's authority.
    StrangeCertificate,
    /// The TLS handshake failed otherwise.
    Handshake,
    /// What it sent is HTTP/1.
    Http1,
    /// What it sent is not HTTP/2.
    NotHttp2,
    /// It sent more than a greeting takes.
    TooMuch,
    /// It brought no join token.
    NoToken,
    /// It brought another join token.
    WrongToken,
    /// Its first message is no greeting.
    NoGreeting,
    /// It greets in another version of the protocol.
    Protocol,
    /// It greets as a member of another start's group.
    Generation,
    /// The run has no place for it.
    NoPlace,
    /// Another worker has its place.
    Taken,
}

impl Refusal {
    /// The reason in words.
    pub(super) fn why(self) -> &'static str {
        match self {
            Self::TooOften => "its address calls too often",
            Self::Crowded => "too many callers at once",
            Self::Late => "it did not greet in time",
            Self::Left => "it left without a greeting",
            Self::NotTls => "it does not speak TLS",
            Self::NoCertificate => "it shows no certificate",
            Self::StrangeCertificate => "its certificate is not of this start",
            Self::Handshake => "its TLS handshake failed",
            Self::Http1 => "it speaks HTTP/1",
            Self::NotHttp2 => "it does not speak HTTP/2",
            Self::TooMuch => "it sent more than a greeting",
            Self::NoToken => "it has no join token",
            Self::WrongToken => "its join token is not of this start",
            Self::NoGreeting => "its first message is no greeting",
            Self::Protocol => "it speaks another version of the protocol",
            Self::Generation => "it belongs to another generation",
            Self::NoPlace => "the run has no place for it",
            Self::Taken => "another worker has its place",
        }
    }
}

/// Counts refusals between two summaries.
#[derive(Debug, Default)]
struct Tally(BTreeMap<Refusal, u64>);

impl Tally {
    /// Counts one; true for the first of its reason, which is told at once.
    fn note(&mut self, refusal: Refusal) -> bool {
        let count = self.0.entry(refusal).or_default();
        *count += 1;
        *count == 1
    }

    /// How many there were of which reason, if there were more than those that
    /// were told; and begins anew.
    fn summary(&mut self) -> Option<(u64, String)> {
        let counts = std::mem::take(&mut self.0);
        let all: u64 = counts.values().sum();
        if all == counts.len() as u64 {
            return None;
        }
        let mut words = String::new();
        for (refusal, count) in counts {
            let comma = if words.is_empty() { "" } else { ", " };
            // Writing to a string cannot fail.
            let _ = write!(words, "{comma}{count} × {}", refusal.why());
        }
        Some((all, words))
    }
}

/// Where refusals are told: the first of each reason at once, the rest as sums.
/// However many callers come, the log grows by a few lines a period.
#[derive(Debug, Clone, Default)]
pub(super) struct RefusalLog(Arc<Mutex<Tally>>);

impl RefusalLog {
    /// Between two sums.
    pub(super) const PERIOD: Duration = Duration::from_secs(10);

    pub(super) fn note(&self, refusal: Refusal, peer: SocketAddr) {
        let first = self.0.lock().unwrap_or_else(PoisonError::into_inner).note(refusal);
        if first {
            warn!(%peer, why = refusal.why(), "refused a caller");
        }
    }

    /// Tells the sums since the last call.
    pub(super) fn tell(&self) {
        let summary = self.0.lock().unwrap_or_else(PoisonError::into_inner).summary();
        if let Some((refused, why)) = summary {
            warn!(refused, why, "refused callers");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_each_reason_is_told_and_the_rest_summed() {
        let mut tally = Tally::default();
        assert!(tally.note(Refusal::WrongToken));
        assert!(tally.note(Refusal::Late));
        assert_eq!(tally.summary(), None, "both were told");
        assert!(tally.note(Refusal::WrongToken), "a new period");
        for _ in 0..999 {
            assert!(!tally.note(Refusal::WrongToken));
        }
        assert!(tally.note(Refusal::Http1));
        let words = "1 × it speaks HTTP/1, 1000 × its join token is not of this start";
        assert_eq!(tally.summary(), Some((1001, words.to_owned())));
        assert_eq!(tally.summary(), None);
    }
}
