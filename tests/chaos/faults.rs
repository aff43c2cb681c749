//! What is done to whom, and where in the run's story.

use std::time::Duration;

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, for good: only its silence tells.
    Stop,
    /// SIGSTOP, and SIGCONT after a while that is shorter than the deadline.
    Pause,
    /// SIGTERM; for a coordinator.
    Term,
    /// Its host's cable is out, for longer than the deadline.
    Cut,
    /// Its host's cable is out, for less.
    Blink,
    /// Its host's cable carries little, for longer than the deadline.
    Congest,
}

/// Whom it happens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Worker(u32),
    Coordinator,
}

/// One fault.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    /// The line that it follows.
    pub(crate) place: String,
    /// How long after it.
    pub(crate) delay: Duration,
    pub(crate) victim: Victim,
    pub(crate) kind: Kind,
}

/// What happens to one run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Schedule {
    /// In the order of their places.
    pub(crate) faults: Vec<Fault>,
    /// Whether its workers are on hosts of their own.
    pub(crate) over_hosts: bool,
}

/// A paused process is silent for this long, and so is a host whose cable blinks.
pub(crate) const PAUSE: Duration = Duration::from_millis(700);

/// A host that is cut off, or whose cable is congested, is so for this long: the
/// deadline of these runs is two seconds.
pub(crate) const ABSENCE: Duration = Duration::from_millis(3500);

impl Schedule {
    /// Two to four faults, at places of an undisturbed run's story; `over_hosts`, some of
    /// them are of cables.
    pub(crate) fn draw(seed: u64, places: &[String], workers: u32, over_hosts: bool) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut at: Vec<usize> = (0..2 + dice.below(3)).map(|_| dice.below(places.len())).collect();
        at.sort_unstable();
        at.dedup();
        let fault = |at: usize| {
            let victim = match dice.below(3) {
                0 => Victim::Coordinator,
                _ => Victim::Worker(dice.below(workers as usize) as u32),
            };
            let by_cable = over_hosts && dice.below(2) == 0;
            let kind = match (victim, dice.below(6)) {
                (_, 0..3) if by_cable => Kind::Cut,
                (_, 3) if by_cable => Kind::Blink,
                (_, _) if by_cable => Kind::Congest,
                (Victim::Coordinator, 0..2) => Kind::Term,
                (Victim::Coordinator, _) => Kind::Kill,
                (Victim::Worker(_), 0..4) => Kind::Kill,
                // Only who started a process can kill one that is stopped.
                (Victim::Worker(_), 4) if !over_hosts => Kind::Stop,
                (Victim::Worker(_), _) => Kind::Pause,
            };
            let delay = Duration::from_millis(dice.below(120) as u64);
            Fault { place: places[at].clone(), delay, victim, kind }
        };
        Self { faults: at.into_iter().map(fault).collect(), over_hosts }
    }

    /// For each phase of a story, a run that is told to stop in the midst of it.
    pub(crate) fn stop_in_each_phase(places: &[String]) -> Vec<Self> {
        let begins: Vec<&String> = places.iter().filter(|p| p.starts_with("begin ")).collect();
        let stop = |place: &&String| {
            let (place, delay) = ((*place).clone(), Duration::from_millis(15));
            let fault = Fault { place, delay, victim: Victim::Coordinator, kind: Kind::Term };
            Self { faults: vec![fault], over_hosts: false }
        };
        begins.iter().map(stop).collect()
    }
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.over_hosts {
            f.write_str("over hosts: ")?;
        }
        for (n, Fault { place, delay, victim, kind }) in self.faults.iter().enumerate() {
            let separator = if n == 0 { "" } else { "; " };
            write!(
                f,
                "{separator}{kind:?} {victim:?} {} ms after \u{201c}{place}\u{201d}",
                delay.as_millis()
            )?;
        }
        Ok(())
    }
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n.max(1)
    }
}
