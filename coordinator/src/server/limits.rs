//! How many strangers may stand at the door, and how often each may knock.
//!
//! Decided here without a clock or a socket: the time is an argument.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use super::refusal::Refusal;

/// Bounds on callers that have not attached.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Of them in all, at once.
    pub(super) strangers: usize,
    /// Of one address, at once.
    pub(super) of_one: usize,
    /// Calls of one address in a row.
    pub(super) burst: f64,
    /// Calls of one address a second, in the long run.
    pub(super) rate: f64,
}

impl Limits {
    /// For a run of so many workers, which may all come at once, and from one
    /// address. A worker that is turned away calls again.
    pub(super) fn of(workers: u32) -> Self {
        let workers = workers as usize;
        Self {
            strangers: 256 + 2 * workers,
            of_one: 64 + workers,
            burst: 64.0 + 2.0 * workers as f64,
            rate: 20.0,
        }
    }
}

/// Lets this process have as many files open as the system allows it, and says so where
/// they do not suffice for so many workers: a connection is one of them.
pub(super) fn raise_open_files(workers: u32) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let needed = u64::from(workers) + OTHER_FILES;
    if raised.is_err() || maximum.is_some_and(|maximum| maximum < needed) {
        tracing::warn!(
            needed,
            ?maximum,
            "there may be too few open files for all workers; raise `ulimit -Hn`"
        );
    }
}

/// Files of the run, and strangers' connections.
const OTHER_FILES: u64 = 128;

/// Addresses that are remembered at once.
const REMEMBERED: usize = 4096;

/// Calls that an address has left: a bucket that fills at a constant rate.
#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Duration,
}

impl Bucket {
    fn fill(&mut self, now: Duration, limits: &Limits) {
        let since = now.saturating_sub(self.at).as_secs_f64();
        self.level = (self.level + since * limits.rate).min(limits.burst);
        self.at = self.at.max(now);
    }

    fn take(&mut self) -> bool {
        let has = self.level >= 1.0;
        if has {
            self.level -= 1.0;
        }
        has
    }
}

#[derive(Debug)]
struct Peer {
    bucket: Bucket,
    waiting: usize,
}

/// Who stands at the door, and who has called of late.
#[derive(Debug)]
pub(super) struct Peers {
    limits: Limits,
    peers: HashMap<IpAddr, Peer>,
    strangers: usize,
}

impl Peers {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, peers: HashMap::new(), strangers: 0 }
    }

    /// A caller stands at the door at `now`, since the server's start. Whoever is
    /// let in here [leaves](Self::leave) again.
    ///
    /// # Errors
    /// Why it is turned away.
    pub(super) fn arrive(&mut self, now: Duration, ip: IpAddr) -> Result<(), Refusal> {
        let limits = self.limits;
        if !self.peers.contains_key(&network(ip)) && self.peers.len() >= REMEMBERED {
            self.forget(now);
            if self.peers.len() >= REMEMBERED {
                return Err(Refusal::Crowded);
            }
        }
        let full = Bucket { level: limits.burst, at: now };
        let peer =
            self.peers.entry(network(ip)).or_insert_with(|| Peer { bucket: full, waiting: 0 });
        peer.bucket.fill(now, &limits);
        if !peer.bucket.take() {
            return Err(Refusal::TooOften);
        }
        if peer.waiting >= limits.of_one || self.strangers >= limits.strangers {
            return Err(Refusal::Crowded);
        }
        peer.waiting += 1;
        self.strangers += 1;
        Ok(())
    }

    /// A caller that had arrived is attached now, or gone.
    pub(super) fn leave(&mut self, ip: IpAddr) {
        if let Some(peer) = self.peers.get_mut(&network(ip)) {
            peer.waiting = peer.waiting.saturating_sub(1);
            self.strangers = self.strangers.saturating_sub(1);
        }
    }

    /// Forgets addresses of which nothing is to be remembered.
    fn forget(&mut self, now: Duration) {
        let limits = self.limits;
        self.peers.retain(|_, peer| {
            peer.bucket.fill(now, &limits);
            peer.waiting > 0 || peer.bucket.level < limits.burst
        });
    }
}

/// What counts as one address: an IPv4 address, or a /64 of IPv6, all of which
/// one machine may have.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & !u128::from(u64::MAX)).into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { strangers: 4, of_one: 3, burst: 5.0, rate: 2.0 };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Calls and goes.
    fn knock(peers: &mut Peers, seconds: f64, from: &str) -> Result<(), Refusal> {
        let arrived = peers.arrive(Duration::from_secs_f64(seconds), ip(from));
        if arrived.is_ok() {
            peers.leave(ip(from));
        }
        arrived
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds_for_each_address_alone() {
        let mut peers = Peers::new(LIMITS);
        for _ in 0..5 {
            knock(&mut peers, 0.0, "10.0.0.1").unwrap();
        }
        assert_eq!(knock(&mut peers, 0.0, "10.0.0.1"), Err(Refusal::TooOften));
        assert_eq!(knock(&mut peers, 0.4, "10.0.0.1"), Err(Refusal::TooOften));
        assert_eq!(knock(&mut peers, 0.5, "10.0.0.1"), Ok(()), "one half second, one call");
        assert_eq!(knock(&mut peers, 0.5, "10.0.0.2"), Ok(()), "another address");
        let calls = (0..1000).map(|n| knock(&mut peers, 1.0 + f64::from(n) / 100.0, "10.0.0.1"));
        let passed = calls.filter(Result::is_ok).count();
        assert!((20..=22).contains(&passed), "2 a second for 10 s: {passed}");
        for _ in 0..5 {
            knock(&mut peers, 1e6, "10.0.0.1").unwrap();
        }
        assert_eq!(
            knock(&mut peers, 1e6, "10.0.0.1"),
            Err(Refusal::TooOften),
            "no more than a burst"
        );
        assert_eq!(knock(&mut peers, 0.0, "10.0.0.1"), Err(Refusal::TooOften), "time stands still");
    }

    #[test]
    fn those_who_wait_are_bounded_by_address_and_in_all() {
        let mut peers = Peers::new(LIMITS);
        let now = Duration::ZERO;
        for _ in 0..3 {
            peers.arrive(now, ip("10.0.0.1")).unwrap();
        }
        assert_eq!(peers.arrive(now, ip("10.0.0.1")), Err(Refusal::Crowded));
        peers.arrive(now, ip("10.0.0.2")).unwrap();
        assert_eq!(peers.arrive(now, ip("10.0.0.3")), Err(Refusal::Crowded), "four in all");
        peers.leave(ip("10.0.0.1"));
        peers.arrive(now, ip("10.0.0.3")).unwrap();
        peers.leave(ip("10.0.0.9"));
        assert_eq!(peers.strangers, 4, "who never came does not leave");
    }

    #[test]
    fn a_network_of_ipv6_is_one_address_and_a_mapped_one_is_ipv4() {
        assert_eq!(network(ip("2001:db8::1")), network(ip("2001:db8::ffff:1")));
        assert_ne!(network(ip("2001:db8::1")), network(ip("2001:db8:0:1::1")));
        assert_eq!(network(ip("::ffff:10.0.0.1")), ip("10.0.0.1"));
    }

    #[test]
    fn memory_is_bounded_and_who_called_long_ago_is_forgotten() {
        let mut peers = Peers::new(Limits { strangers: 1 << 20, ..LIMITS });
        let address = |n: u32| IpAddr::V4(n.into());
        for n in 0..REMEMBERED as u32 {
            peers.arrive(Duration::ZERO, address(n)).unwrap();
            peers.leave(address(n));
        }
        let new = address(1 << 30);
        assert_eq!(peers.arrive(Duration::ZERO, new), Err(Refusal::Crowded));
        assert_eq!(peers.peers.len(), REMEMBERED);
        peers.arrive(Duration::from_secs(1), new).unwrap();
        assert_eq!(peers.peers.len(), 1);
    }

    #[test]
    fn all_workers_of_a_run_may_come_at_once_from_one_address() {
        for workers in [1, 8, 1024] {
            let mut peers = Peers::new(Limits::of(workers));
            for _ in 0..workers {
                peers.arrive(Duration::ZERO, ip("127.0.0.1")).unwrap();
            }
        }
    }
}
