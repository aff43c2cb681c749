//! How far a phase is, how fast it goes, and how long it will take.
//!
//! On a terminal: a bar. Elsewhere (a Slurm log, a file): a plain log line when
//! a phase starts, every ten seconds while it advances, and when it ends.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format;
use crate::domain::Iteration;

/// Time between two log lines of one phase.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What is being done, and how much of it there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Activity {
    /// A corpus file is read.
    Reading {
        /// Its name.
        file: String,
        /// Its length.
        bytes: u64,
    },
    /// A file comes from the hub.
    Downloading {
        /// Its name.
        file: String,
        /// Its length.
        bytes: u64,
    },
    /// Files are read and compared with their hashes.
    Checking {
        /// The folder.
        what: String,
        /// Its length.
        bytes: u64,
    },
    /// Replies are drawn; the work behind them is counted in tokens.
    Sampling {
        /// Which iteration.
        iteration: Iteration,
        /// How many in all.
        replies: u64,
    },
    /// A reward model rates replies.
    Rating {
        /// Which iteration.
        iteration: Iteration,
        /// How many in all.
        replies: u64,
    },
    /// Reference log-probabilities are computed.
    Scoring {
        /// Which iteration.
        iteration: Iteration,
        /// How many pairs in all.
        pairs: u64,
    },
    /// Optimiser steps are done; the work behind them is counted in pairs.
    Training {
        /// Which iteration.
        iteration: Iteration,
        /// How many in all.
        steps: u64,
    },
    /// Held-out pairs are evaluated.
    Evaluating {
        /// Which iteration.
        iteration: Iteration,
        /// How many pairs in all.
        pairs: u64,
    },
    /// A checkpoint is hashed and published.
    Publishing {
        /// Which iteration.
        iteration: Iteration,
        /// How many bytes in all.
        bytes: u64,
    },
}

impl Activity {
    /// `iteration 1: sampling`.
    pub fn title(&self) -> String {
        let (iteration, doing) = match self {
            Self::Reading { file, .. } => return format!("reading {file}"),
            Self::Downloading { file, .. } => return format!("downloading {file}"),
            Self::Checking { what, .. } => return format!("checking {what}"),
            Self::Sampling { iteration, .. } => (iteration, "sampling"),
            Self::Rating { iteration, .. } => (iteration, "rating"),
            Self::Scoring { iteration, .. } => (iteration, "scoring"),
            Self::Training { iteration, .. } => (iteration, "training"),
            Self::Evaluating { iteration, .. } => (iteration, "evaluating"),
            Self::Publishing { iteration, .. } => (iteration, "publishing"),
        };
        format!("iteration {iteration}: {doing}")
    }

    fn total(&self) -> u64 {
        match self {
            Self::Reading { bytes, .. }
            | Self::Downloading { bytes, .. }
            | Self::Checking { bytes, .. }
            | Self::Publishing { bytes, .. } => *bytes,
            Self::Sampling { replies, .. } | Self::Rating { replies, .. } => *replies,
            Self::Training { steps, .. } => *steps,
            Self::Scoring { pairs, .. } | Self::Evaluating { pairs, .. } => *pairs,
        }
    }

    /// `1,024 of 4,096 replies`.
    fn amount(&self, done: u64) -> String {
        let (total, unit) = match self {
            Self::Reading { bytes, .. }
            | Self::Downloading { bytes, .. }
            | Self::Checking { bytes, .. }
            | Self::Publishing { bytes, .. } => {
                return format!("{} of {}", format::bytes(done), format::bytes(*bytes));
            }
            Self::Sampling { replies, .. } | Self::Rating { replies, .. } => (replies, "replies"),
            Self::Training { steps, .. } => (steps, "steps"),
            Self::Scoring { pairs, .. } | Self::Evaluating { pairs, .. } => (pairs, "pairs"),
        };
        format!("{} of {} {unit}", format::count(done), format::count(*total))
    }

    /// `61.3 tokens/s`.
    fn rate(&self, gauge: &Gauge) -> String {
        match self {
            Self::Reading { .. }
            | Self::Downloading { .. }
            | Self::Checking { .. }
            | Self::Publishing { .. } => {
                format!("{}/s", format::bytes(gauge.per_second() as u64))
            }
            Self::Sampling { .. } => format!("{} tokens/s", format::rate(gauge.work_per_second())),
            Self::Training { .. } => format!("{} pairs/s", format::rate(gauge.work_per_second())),
            Self::Rating { .. } => format!("{} replies/s", format::rate(gauge.per_second())),
            Self::Scoring { .. } | Self::Evaluating { .. } => {
                format!("{} pairs/s", format::rate(gauge.per_second()))
            }
        }
    }
}

/// Where a phase stands: what its line is computed from.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Gauge {
    /// Done before this process took over: part of the amount, not of the rate.
    inherited: u64,
    done: u64,
    /// Tokens or pairs behind what was done here, where they are counted apart.
    work: u64,
    elapsed: Duration,
}

impl Gauge {
    fn per_second(&self) -> f64 {
        self.done.saturating_sub(self.inherited) as f64 / self.elapsed.as_secs_f64()
    }

    fn work_per_second(&self) -> f64 {
        self.work as f64 / self.elapsed.as_secs_f64()
    }
}

/// `1,024 of 4,096 replies, 61.3 tokens/s, 3 min 12 s left`.
fn running(activity: &Activity, gauge: &Gauge) -> String {
    let amount = activity.amount(gauge.done);
    // The first replies of a phase over some microseconds are no rate.
    let too_soon = gauge.elapsed < Duration::from_secs(1);
    if too_soon || (gauge.done <= gauge.inherited && gauge.work == 0) {
        return amount;
    }
    let rate = activity.rate(gauge);
    if gauge.done <= gauge.inherited {
        return format!("{amount}, {rate}");
    }
    let left = activity.total().saturating_sub(gauge.done) as f64 / gauge.per_second();
    format!("{amount}, {rate}, {} left", format::seconds(left))
}

/// `done: 4,096 of 4,096 replies in 12 min 40 s, 61.3 tokens/s`.
fn finished(activity: &Activity, gauge: &Gauge) -> String {
    let whole = if gauge.done >= activity.total() { "done" } else { "stopped" };
    let amount = activity.amount(gauge.done);
    let mut text = format!("{whole}: {amount} in {}", format::seconds(gauge.elapsed.as_secs_f64()));
    if !gauge.elapsed.is_zero() && (gauge.done > gauge.inherited || gauge.work > 0) {
        text.push_str(", ");
        text.push_str(&activity.rate(gauge));
    }
    text
}

/// The bars of this process. Clones share the screen.
#[derive(Debug, Clone)]
pub struct Progress {
    bars: MultiProgress,
}

impl Progress {
    /// On standard error: bars if it is a terminal, log lines if not.
    pub fn stderr() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)) }
    }

    /// Log lines only.
    pub fn lines() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()) }
    }

    /// Begins to show an activity.
    pub fn begin(&self, activity: Activity) -> Bar {
        self.resume(activity, 0)
    }

    /// As [`Progress::begin`], where `done` is what an earlier process did: it
    /// counts as done, and not as speed.
    pub fn resume(&self, activity: Activity, done: u64) -> Bar {
        let bar = self.bar(&activity, done);
        let now = Instant::now();
        let state = State { inherited: done, done, work: 0, began: now, line_at: now, open: true };
        let bar = Bar { activity, bar, state: Mutex::new(state) };
        if bar.bar.is_none() {
            bar.log(&running(&bar.activity, &bar.state().gauge(now)));
        }
        bar
    }

    /// The screen, for whatever else writes on it.
    pub(super) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    fn bar(&self, activity: &Activity, done: u64) -> Option<ProgressBar> {
        if self.bars.is_hidden() {
            return None;
        }
        let template = "{spinner} {prefix}  [{bar:24}] {percent:>3} %  {msg}";
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(activity.total())
            .with_style(style.progress_chars("=> "))
            .with_prefix(activity.title())
            .with_position(done);
        let bar = self.bars.add(bar);
        // So that a long step does not look like a dead process.
        bar.enable_steady_tick(Duration::from_millis(250));
        Some(bar)
    }
}

/// One activity on show. Dropped before [`Bar::finish`], it says "stopped".
#[derive(Debug)]
pub struct Bar {
    activity: Activity,
    bar: Option<ProgressBar>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    inherited: u64,
    done: u64,
    work: u64,
    began: Instant,
    line_at: Instant,
    open: bool,
}

impl State {
    fn gauge(&self, now: Instant) -> Gauge {
        let elapsed = now.saturating_duration_since(self.began);
        Gauge { inherited: self.inherited, done: self.done, work: self.work, elapsed }
    }
}

impl Bar {
    /// `more` are done.
    pub fn advance(&self, more: u64) {
        self.change(|state| state.done += more);
    }

    /// `done` are done in all; never goes back.
    pub fn set(&self, done: u64) {
        self.change(|state| state.done = state.done.max(done));
    }

    /// `more` tokens (sampling) or pairs (training) of work were done.
    pub fn work(&self, more: u64) {
        self.change(|state| state.work += more);
    }

    /// `work` tokens or pairs were done in all by this process; never goes back.
    pub fn set_work(&self, work: u64) {
        self.change(|state| state.work = state.work.max(work));
    }

    /// The activity has ended.
    pub fn finish(self) {
        self.end();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Numbers on show: a panic elsewhere leaves them as good as they were.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let now = Instant::now();
        let mut state = self.state();
        change(&mut state);
        let line = running(&self.activity, &state.gauge(now));
        if let Some(bar) = &self.bar {
            bar.set_position(state.done);
            bar.set_message(line);
        } else if now.saturating_duration_since(state.line_at) >= LINE_EVERY {
            state.line_at = now;
            drop(state);
            self.log(&line);
        }
    }

    fn end(&self) {
        let mut state = self.state();
        if !std::mem::take(&mut state.open) {
            return;
        }
        let line = finished(&self.activity, &state.gauge(Instant::now()));
        drop(state);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.log(&line);
    }

    fn log(&self, line: &str) {
        tracing::info!("{}: {line}", self.activity.title());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn sampling() -> Activity {
        Activity::Sampling { iteration: Iteration(1), replies: 4096 }
    }

    fn gauge(inherited: u64, done: u64, work: u64, seconds: u64) -> Gauge {
        Gauge { inherited, done, work, elapsed: Duration::from_secs(seconds) }
    }

    #[test]
    fn a_running_line_has_amount_rate_and_time_left() {
        assert_eq!(
            running(&sampling(), &gauge(0, 1024, 61_340, 1000)),
            "1,024 of 4,096 replies, 61.3 tokens/s, 50 min 00 s left"
        );
        let reading = Activity::Reading { file: "a.json".into(), bytes: 1_600_000_000 };
        assert_eq!(
            running(&reading, &gauge(0, 800_000_000, 0, 10)),
            "800 MB of 1.6 GB, 80 MB/s, 10 s left"
        );
        let training = Activity::Training { iteration: Iteration(0), steps: 96 };
        assert_eq!(
            running(&training, &gauge(0, 24, 96, 32)),
            "24 of 96 steps, 3.00 pairs/s, 1 min 36 s left"
        );
    }

    #[test]
    fn what_an_earlier_process_did_is_not_speed() {
        let scoring = Activity::Scoring { iteration: Iteration(2), pairs: 400 };
        assert_eq!(
            running(&scoring, &gauge(300, 350, 0, 10)),
            "350 of 400 pairs, 5.00 pairs/s, 10 s left"
        );
        assert_eq!(running(&scoring, &gauge(300, 300, 0, 10)), "300 of 400 pairs");
    }

    #[test]
    fn tokens_show_before_the_first_reply_is_whole() {
        assert_eq!(
            running(&sampling(), &gauge(0, 0, 500, 10)),
            "0 of 4,096 replies, 50.0 tokens/s"
        );
    }

    #[test]
    fn the_last_line_tells_done_from_stopped() {
        assert_eq!(
            finished(&sampling(), &gauge(0, 4096, 46_588, 760)),
            "done: 4,096 of 4,096 replies in 12 min 40 s, 61.3 tokens/s"
        );
        assert_eq!(
            finished(&sampling(), &gauge(0, 0, 0, 0)),
            "stopped: 0 of 4,096 replies in 0.0 s"
        );
    }

    #[test]
    fn off_a_terminal_a_phase_is_a_line_at_start_each_ten_seconds_and_at_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = Arc::new(file.reopen().unwrap());
        let subscriber = tracing_subscriber::fmt().with_writer(writer).without_time().finish();
        tracing::subscriber::with_default(subscriber, || {
            let bar = Progress::lines().begin(sampling());
            bar.advance(1);
            bar.state().line_at -= LINE_EVERY;
            bar.advance(1);
            bar.advance(1);
            bar.set(2);
            drop(bar);
        });
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].ends_with("iteration 1: sampling: 0 of 4,096 replies"), "{text}");
        assert!(lines[1].ends_with(": 2 of 4,096 replies"), "{text}");
        assert!(lines[2].contains(": stopped: 3 of 4,096 replies in "), "{text}");
    }
}
