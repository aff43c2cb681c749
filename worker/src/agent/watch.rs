//! What monitoring sees of a worker, and whether it is alive and ready.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drift_proto::watch::Watched;
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Counter, CounterVec, Encoder, Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use super::engine::{Command, Reply};

/// A stream's loop that has not turned for so long hangs. It turns with each
/// heartbeat, and heartbeats never wait for the engine.
const STALLED: Duration = Duration::from_secs(60);

/// A coordinator that misses this many heartbeats makes a worker unready, well
/// before it counts as lost.
const MISSED: f64 = 2.5;

/// A coordinator beats four times a second, whatever it asks of workers.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);

/// A worker, as monitoring sees it.
#[derive(Debug)]
pub struct Watch {
    registry: Registry,
    course: Mutex<Course>,
    attached: IntGauge,
    attachments: IntCounter,
    generation: IntGauge,
    heartbeat_age: Gauge,
    pending: IntGauge,
    commands: IntCounterVec,
    command_seconds: CounterVec,
    failures: IntCounter,
    tokens_sampled: IntCounter,
    replies_sampled: IntCounter,
    pairs_scored: IntCounter,
    steps_trained: IntCounter,
    pairs_trained: IntCounter,
    tokens_trained: IntCounter,
    reduction: Counter,
    exposed: Counter,
    snapshot_copy: Gauge,
    snapshot_write: Gauge,
}

/// What depends on the clock.
#[derive(Debug, Default)]
struct Course {
    /// Of the stream's loop, while there is a stream.
    turned: Option<Instant>,
    heard: Option<Instant>,
    /// Longest silence of a coordinator to which this worker is ready.
    patience: Duration,
    /// Tokens that the shard in hand was said to have so far.
    told: u64,
    /// Names of commands that are unanswered, oldest first, and since when the first
    /// of them is the engine's only one.
    pending: std::collections::VecDeque<&'static str>,
    began: Option<Instant>,
}

impl Watch {
    /// Nothing has happened yet.
    ///
    /// # Errors
    /// Two metrics of one name.
    pub fn new(slot: u32, device: &str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let info = Opts::new("drift_worker_info", "Always 1.");
        let info = IntGaugeVec::new(info, &["version", "libtorch", "slot", "device"])?;
        let about = [env!("CARGO_PKG_VERSION"), crate::LIBTORCH_VERSION, &slot.to_string(), device];
        info.with_label_values(&about).set(1);
        registry.register(Box::new(info))?;
        let gauge = |name: &str, help: &str| kept(&registry, Gauge::new(name, help));
        let number = |name: &str, help: &str| kept(&registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| kept(&registry, IntCounter::new(name, help));
        let commands = Opts::new("drift_worker_commands_total", "Commands answered, by name.");
        let seconds =
            Opts::new("drift_worker_command_seconds_total", "Time spent on them, by name.");
        Ok(Self {
            course: Mutex::default(),
            attached: number("drift_worker_attached", "Whether a coordinator let it in.")?,
            attachments: counter("drift_worker_attachments_total", "How often one did.")?,
            generation: number("drift_worker_generation", "Of the run's membership.")?,
            heartbeat_age: gauge(
                "drift_worker_coordinator_heartbeat_age_seconds",
                "Time since the coordinator was last heard; -1 where there is none.",
            )?,
            pending: number("drift_worker_commands_pending", "Commands not answered yet.")?,
            commands: kept(&registry, IntCounterVec::new(commands, &["command"]))?,
            command_seconds: kept(&registry, CounterVec::new(seconds, &["command"]))?,
            failures: counter("drift_worker_command_failures_total", "Commands that failed.")?,
            tokens_sampled: counter("drift_worker_sampled_tokens_total", "Tokens drawn.")?,
            replies_sampled: counter("drift_worker_sampled_replies_total", "Replies drawn.")?,
            pairs_scored: counter("drift_worker_scored_pairs_total", "Pairs scored.")?,
            steps_trained: counter("drift_worker_training_steps_total", "Steps made.")?,
            pairs_trained: counter("drift_worker_trained_pairs_total", "This rank's pairs.")?,
            tokens_trained: counter("drift_worker_trained_tokens_total", "Packed tokens.")?,
            reduction: kept(
                &registry,
                Counter::new(
                    "drift_worker_reduction_seconds_total",
                    "Time in which gradients were summed over ranks.",
                ),
            )?,
            exposed: kept(
                &registry,
                Counter::new(
                    "drift_worker_reduction_exposed_seconds_total",
                    "Of it, time in which the rank only waited.",
                ),
            )?,
            snapshot_copy: gauge(
                "drift_worker_snapshot_copy_seconds",
                "How long the last snapshot held training up.",
            )?,
            snapshot_write: gauge(
                "drift_worker_snapshot_write_seconds",
                "How long it was then written, beside training.",
            )?,
            registry,
        })
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        // Times on show: a panic elsewhere leaves them as good as they were.
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A coordinator let this worker in, or called it into a new generation.
    pub(super) fn attached(&self, generation: u64, heartbeat: Duration) {
        self.attached.set(1);
        self.attachments.inc();
        self.generation.set(generation as i64);
        let now = Some(Instant::now());
        let patience = heartbeat.mul_f64(MISSED).max(LEAST_PATIENCE);
        self.pending.set(0);
        *self.course() = Course { turned: now, heard: now, patience, ..Course::default() };
    }

    /// There is no stream any more.
    pub(super) fn detached(&self) {
        self.attached.set(0);
        self.pending.set(0);
        *self.course() = Course::default();
    }

    /// The coordinator said something.
    pub(super) fn heard(&self) {
        self.course().heard = Some(Instant::now());
    }

    /// A heartbeat went up.
    pub(super) fn turned(&self) {
        self.course().turned = Some(Instant::now());
    }

    /// The engine is given a command.
    pub(super) fn command(&self, command: &Command) {
        let mut course = self.course();
        course.pending.push_back(command.name());
        course.began.get_or_insert_with(Instant::now);
        self.pending.set(course.pending.len() as i64);
    }

    /// It told something.
    pub(super) fn reply(&self, reply: &Reply) {
        match reply {
            Reply::SampleProgress { tokens, .. } => {
                let told = std::mem::replace(&mut self.course().told, *tokens);
                self.tokens_sampled.inc_by(tokens.saturating_sub(told));
            }
            Reply::Sampled { samples, .. } => {
                let told = std::mem::take(&mut self.course().told);
                let tokens: u64 = samples.iter().map(|sample| sample.tokens.len() as u64).sum();
                self.tokens_sampled.inc_by(tokens.saturating_sub(told));
                self.replies_sampled.inc_by(samples.len() as u64);
            }
            Reply::Scored { logps, .. } => self.pairs_scored.inc_by(logps.len() as u64),
            Reply::Stepped { report, .. } => {
                self.steps_trained.inc();
                self.pairs_trained.inc_by(report.pairs.len() as u64);
                self.tokens_trained.inc_by(report.tokens);
                self.reduction.inc_by(report.reduction.busy.max(0.0));
                self.exposed.inc_by(report.reduction.exposed.max(0.0));
            }
            Reply::SnapshotWritten { copy_seconds, write_seconds, .. } => {
                self.snapshot_copy.set(*copy_seconds);
                self.snapshot_write.set(*write_seconds);
            }
            Reply::Failed(_) => self.failures.inc(),
            _ => {}
        }
        if reply.is_final() {
            self.answered();
        }
    }

    fn answered(&self) {
        let mut course = self.course();
        let Some(name) = course.pending.pop_front() else { return };
        let now = Instant::now();
        let next = (!course.pending.is_empty()).then_some(now);
        let began = std::mem::replace(&mut course.began, next).unwrap_or(now);
        self.commands.with_label_values(&[name]).inc();
        self.command_seconds.with_label_values(&[name]).inc_by((now - began).as_secs_f64());
        self.pending.set(course.pending.len() as i64);
    }
}

impl Watched for Watch {
    fn alive(&self) -> Result<(), String> {
        match self.course().turned.map(|turned| turned.elapsed()) {
            Some(since) if since > STALLED => {
                Err(format!("the stream's loop has not turned for {} s", since.as_secs()))
            }
            _ => Ok(()),
        }
    }

    fn ready(&self) -> Result<(), String> {
        let course = self.course();
        match course.heard.map(|heard| heard.elapsed()) {
            None => Err("no coordinator has let this worker in yet".to_owned()),
            Some(age) if age > course.patience => {
                Err(format!("the coordinator was last heard {:.1} s ago", age.as_secs_f64()))
            }
            Some(_) => Ok(()),
        }
    }

    fn metrics(&self) -> String {
        let heard = self.course().heard;
        self.heartbeat_age.set(heard.map_or(-1.0, |heard| heard.elapsed().as_secs_f64()));
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("# {error}\n"),
        }
    }
}

fn kept<M: Collector + Clone + 'static>(
    registry: &Registry,
    metric: prometheus::Result<M>,
) -> prometheus::Result<M> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_ready_while_it_hears_its_coordinator() {
        let watch = Watch::new(1, "cpu").unwrap();
        assert!(watch.ready().unwrap_err().contains("no coordinator"));
        watch.attached(7, Duration::from_secs(1));
        assert_eq!(watch.ready(), Ok(()));
        watch.course().heard = Instant::now().checked_sub(Duration::from_secs(3));
        assert!(watch.ready().unwrap_err().contains("last heard 3.0 s ago"));
        assert_eq!(watch.alive(), Ok(()), "a silent peer is no reason to be restarted");
        watch.heard();
        assert_eq!(watch.ready(), Ok(()));
        watch.course().turned = Instant::now().checked_sub(Duration::from_secs(61));
        assert!(watch.alive().unwrap_err().contains("61 s"));
        watch.detached();
        assert!(watch.ready().is_err() && watch.alive().is_ok(), "it looks for another");
    }

    #[test]
    fn commands_are_counted_when_they_are_answered() {
        let watch = Watch::new(1, "cpu").unwrap();
        watch.attached(7, Duration::from_secs(1));
        let score = || Command::Score { batch: 0, micro_batches: Vec::new() };
        watch.command(&score());
        watch.command(&score());
        watch.reply(&Reply::StoreListening("not final".to_owned()));
        watch.reply(&Reply::Scored { batch: 0, logps: Vec::new() });
        let text = watch.metrics();
        for line in [
            "drift_worker_attached 1",
            "drift_worker_generation 7",
            "drift_worker_commands_pending 1",
            "drift_worker_commands_total{command=\"score\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        let info = "slot=\"1\"";
        assert!(text.contains(info) && text.contains("process_resident_memory_bytes "), "{text}");
    }
}
