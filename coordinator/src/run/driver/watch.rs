//! What monitoring sees of a run: gauges and counters, and whether it is alive and
//! ready. It listens to effects and reports, and decides nothing.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drift_proto::watch::Watched;
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Encoder, Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use super::{Effect, Rank};
use crate::config::LaunchSettings;
use crate::run::command::Report;
use crate::run::machine::PhaseName;
use crate::run::metrics::StepMetrics;
use crate::store::CommittedPhase;

/// A driver's loop that has not turned for so long hangs. It turns four times a
/// second; a disk that syncs slowly may hold it up.
const STALLED: Duration = Duration::from_secs(60);

/// A worker that misses this many heartbeats makes the run unready, well before it
/// counts as lost.
const MISSED: f64 = 2.5;

/// As `drift_phase` names them.
const PHASES: [(PhaseName, &str); 8] = [
    (PhaseName::Preparing, "preparing"),
    (PhaseName::Sampling, "sampling"),
    (PhaseName::Rating, "rating"),
    (PhaseName::Pairing, "pairing"),
    (PhaseName::Scoring, "scoring"),
    (PhaseName::Training, "training"),
    (PhaseName::Evaluating, "evaluating"),
    (PhaseName::Publishing, "publishing"),
];

/// One run, as monitoring sees it.
#[derive(Debug)]
pub struct Watch {
    registry: Registry,
    course: Mutex<Course>,
    phase: IntGaugeVec,
    iteration: IntGauge,
    epoch: IntGauge,
    planned: IntGauge,
    done: IntGauge,
    step: IntGauge,
    loss: Gauge,
    margin: Gauge,
    accuracy: Gauge,
    learning_rate: Gauge,
    grad_norm: Gauge,
    evaluation_margin: Gauge,
    evaluation_accuracy: Gauge,
    tokens_sampled: IntCounter,
    replies_sampled: IntCounter,
    replies_rated: IntCounter,
    pairs_scored: IntCounter,
    steps_trained: IntCounter,
    pairs_trained: IntCounter,
    queue: IntGauge,
    leases: IntGauge,
    workers: IntGauge,
    attached: IntGauge,
    heartbeat_age: GaugeVec,
    losses: IntCounter,
    failures: IntCounter,
    rewinds: IntCounter,
    left_out: IntCounter,
    warnings: IntCounterVec,
    snapshot_age: Gauge,
    snapshot_copy: Gauge,
    snapshot_write: Gauge,
    snapshots: IntCounterVec,
}

/// What depends on the clock.
#[derive(Debug, Default)]
struct Course {
    /// Of the driver's loop; none before it began.
    turned: Option<Instant>,
    /// Longest silence of a worker in a run that is ready.
    patience: Duration,
    workers: u32,
    heard: BTreeMap<Rank, Instant>,
    snapshot: Option<Instant>,
}

impl Watch {
    /// Nothing has happened yet.
    ///
    /// # Errors
    /// Two metrics of one name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let build = IntGaugeVec::new(Opts::new("drift_build_info", "Always 1."), &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(build))?;
        let gauge = |name: &str, help: &str| kept(&registry, Gauge::new(name, help));
        let number = |name: &str, help: &str| kept(&registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| kept(&registry, IntCounter::new(name, help));
        let counters = |name: &str, help: &str, label: &str| {
            kept(&registry, IntCounterVec::new(Opts::new(name, help), &[label]))
        };
        let phase = Opts::new("drift_phase", "1 for the phase that the run is in, 0 for others.");
        let age = Opts::new(
            "drift_worker_heartbeat_age_seconds",
            "Time since a worker that is attached was last heard.",
        );
        let watch = Self {
            course: Mutex::default(),
            phase: kept(&registry, IntGaugeVec::new(phase, &["phase"]))?,
            iteration: number("drift_iteration", "Iteration in hand; 0 is the warm start.")?,
            epoch: number("drift_epoch", "Epoch in hand, from 0.")?,
            planned: number("drift_phase_planned", "Replies, pairs or steps of the phase.")?,
            done: number("drift_phase_done", "Of these, those that are done.")?,
            step: number("drift_training_step", "Last step of the iteration, from 0.")?,
            loss: gauge("drift_training_loss", "Mean loss of the last step.")?,
            margin: gauge("drift_training_reward_margin", "Mean margin of the last step.")?,
            accuracy: gauge(
                "drift_training_reward_accuracy_ratio",
                "Share of the last step's pairs whose chosen reward is higher.",
            )?,
            learning_rate: gauge("drift_training_learning_rate", "Rate of the last step.")?,
            grad_norm: gauge("drift_training_grad_norm", "Before clipping, of the last step.")?,
            evaluation_margin: gauge(
                "drift_evaluation_reward_margin",
                "Mean margin of the held-out pairs.",
            )?,
            evaluation_accuracy: gauge(
                "drift_evaluation_reward_accuracy_ratio",
                "Share of the held-out pairs whose chosen reward is higher.",
            )?,
            tokens_sampled: counter("drift_sampled_tokens_total", "Tokens of recorded replies.")?,
            replies_sampled: counter("drift_sampled_replies_total", "Replies recorded.")?,
            replies_rated: counter("drift_rated_replies_total", "Replies rated.")?,
            pairs_scored: counter("drift_scored_pairs_total", "Pairs scored, and evaluated.")?,
            steps_trained: counter("drift_training_steps_total", "Steps, repeated ones too.")?,
            pairs_trained: counter("drift_trained_pairs_total", "Pairs of these steps.")?,
            queue: number("drift_queue_commands", "Commands that wait for a worker.")?,
            leases: number("drift_leases", "Commands that workers have in hand.")?,
            workers: number("drift_workers", "Workers that the run has places for.")?,
            attached: number("drift_workers_attached", "Workers that are attached.")?,
            heartbeat_age: kept(&registry, GaugeVec::new(age, &["rank"]))?,
            losses: counter("drift_worker_losses_total", "Workers lost and replaced.")?,
            failures: counter("drift_command_failures_total", "Commands that failed.")?,
            rewinds: counter("drift_rewinds_total", "Returns to what is on disk.")?,
            left_out: counter("drift_shards_left_out_total", "Shards set aside.")?,
            warnings: counters("drift_warnings_total", "Signs of bad training.", "concern")?,
            snapshot_age: gauge(
                "drift_snapshot_age_seconds",
                "Time since training state was saved; -1 where this process saved none.",
            )?,
            snapshot_copy: gauge(
                "drift_snapshot_copy_seconds",
                "How long the last snapshot inside an epoch held training up.",
            )?,
            snapshot_write: gauge(
                "drift_snapshot_write_seconds",
                "How long it was then written, beside training.",
            )?,
            snapshots: counters("drift_snapshots_total", "Snapshots by result.", "result")?,
            registry,
        };
        watch.show_phase(PhaseName::Preparing);
        Ok(watch)
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        // Times on show: a panic elsewhere leaves them as good as they were.
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver's loop begins, with places for so many workers.
    pub(super) fn begin(&self, workers: u32, launch: &LaunchSettings) {
        self.workers.set(workers.into());
        let patience = (launch.heartbeat * MISSED).min(launch.heartbeat_deadline);
        let mut course = self.course();
        course.workers = workers;
        course.patience = Duration::from_secs_f64(patience);
        course.turned = Some(Instant::now());
    }

    /// The loop turned; so many commands wait, and so many are in hand.
    pub(super) fn turned(&self, (queued, leased): (usize, usize)) {
        self.queue.set(queued as i64);
        self.leases.set(leased as i64);
        self.course().turned = Some(Instant::now());
    }

    /// A worker was heard, for the first time or again.
    pub(super) fn heard(&self, rank: Rank) {
        self.course().heard.insert(rank, Instant::now());
    }

    /// A worker has no place any more.
    pub(super) fn gone(&self, rank: Rank) {
        self.course().heard.remove(&rank);
        // It may never have been asked for.
        let _ = self.heartbeat_age.remove_label_values(&[&rank.to_string()]);
    }

    /// A worker that is listened to tells something.
    pub(super) fn report(&self, report: &Report) {
        match report {
            Report::Scored { logps, .. } => {
                self.pairs_scored.inc_by(logps.len() as u64);
                self.done.add(logps.len() as i64);
            }
            Report::Rated { ratings, .. } => {
                self.replies_rated.inc_by(ratings.len() as u64);
                self.done.add(ratings.len() as i64);
            }
            _ => {}
        }
    }

    /// Something is about to be done.
    pub(super) fn effect(&self, effect: &Effect) {
        match effect {
            Effect::Began(iteration, phase, epoch, planned, done) => {
                self.show_phase(*phase);
                self.iteration.set(iteration.0.into());
                self.epoch.set(epoch.map_or(0, |epoch| epoch.0).into());
                self.planned.set(*planned as i64);
                self.done.set(*done as i64);
            }
            Effect::RecordShard(_, _, samples) => {
                let tokens = samples.iter().map(|sample| sample.tokens.len() as u64).sum();
                self.tokens_sampled.inc_by(tokens);
                self.replies_sampled.inc_by(samples.len() as u64);
                self.done.add(samples.len() as i64);
            }
            Effect::RecordStep { step, pairs, metrics, .. } => {
                self.step.set(step.0 as i64);
                self.steps_trained.inc();
                self.pairs_trained.inc_by(*pairs as u64);
                self.done.inc();
                self.show_step(metrics);
            }
            Effect::Commit { phase: CommittedPhase::Evaluated, detail, .. } => {
                for (gauge, name) in [
                    (&self.evaluation_margin, "eval_rewards/margins"),
                    (&self.evaluation_accuracy, "eval_rewards/accuracies"),
                ] {
                    gauge.set(detail[name].as_f64().unwrap_or(f64::NAN));
                }
            }
            Effect::KeepSnapshot(..) => {
                self.course().snapshot = Some(Instant::now());
                self.snapshots.with_label_values(&["kept"]).inc();
            }
            Effect::SnapshotKept(_, seconds) => {
                self.snapshot_copy.set(seconds.copy);
                self.snapshot_write.set(seconds.write);
            }
            Effect::SnapshotFailed(..) => self.snapshots.with_label_values(&["failed"]).inc(),
            Effect::Lost(rank, _) => {
                self.losses.inc();
                self.gone(*rank);
            }
            Effect::Failed(..) => self.failures.inc(),
            Effect::Rewind => self.rewinds.inc(),
            Effect::SetAside(..) => self.left_out.inc(),
            Effect::Warn(_, concern) => {
                self.warnings.with_label_values(&[concern.name().as_str()]).inc();
            }
            _ => {}
        }
    }

    fn show_phase(&self, shown: PhaseName) {
        for (phase, name) in PHASES {
            self.phase.with_label_values(&[name]).set((phase == shown).into());
        }
    }

    fn show_step(&self, metrics: &StepMetrics) {
        self.loss.set(metrics.loss);
        self.margin.set(metrics.rewards_margins);
        self.accuracy.set(metrics.rewards_accuracies);
        self.learning_rate.set(metrics.learning_rate);
        self.grad_norm.set(metrics.grad_norm);
    }
}

impl Watched for Watch {
    fn alive(&self) -> Result<(), String> {
        match self.course().turned.map(|turned| turned.elapsed()) {
            Some(since) if since > STALLED => {
                Err(format!("the run's loop has not turned for {} s", since.as_secs()))
            }
            _ => Ok(()),
        }
    }

    fn ready(&self) -> Result<(), String> {
        let course = self.course();
        if course.turned.is_none() {
            return Err("the run is being prepared".to_owned());
        }
        for rank in (0..course.workers).map(Rank) {
            match course.heard.get(&rank).map(Instant::elapsed) {
                None => return Err(format!("no worker {rank} is attached")),
                Some(age) if age > course.patience => {
                    let age = age.as_secs_f64();
                    return Err(format!("worker {rank} was last heard {age:.1} s ago"));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn metrics(&self) -> String {
        let course = self.course();
        self.attached.set(course.heard.len() as i64);
        for (rank, heard) in &course.heard {
            let age = heard.elapsed().as_secs_f64();
            self.heartbeat_age.with_label_values(&[&rank.to_string()]).set(age);
        }
        let snapshot = course.snapshot.map_or(-1.0, |at| at.elapsed().as_secs_f64());
        self.snapshot_age.set(snapshot);
        drop(course);
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
    use crate::domain::{Iteration, ShardId};

    fn watch(heartbeat: f64) -> Watch {
        let watch = Watch::new().unwrap();
        let launch = LaunchSettings { heartbeat, ..LaunchSettings::default() };
        watch.begin(2, &launch);
        watch
    }

    #[test]
    fn a_run_is_ready_while_it_hears_all_of_its_workers() {
        let fresh = Watch::new().unwrap();
        assert!(fresh.alive().is_ok());
        assert!(fresh.ready().unwrap_err().contains("prepared"));
        let watch = watch(0.02);
        watch.heard(Rank(0));
        assert!(watch.ready().unwrap_err().contains("no worker 1"));
        watch.heard(Rank(1));
        assert_eq!(watch.ready(), Ok(()));
        std::thread::sleep(Duration::from_millis(80));
        watch.heard(Rank(0));
        assert!(watch.ready().unwrap_err().contains("worker 1 was last heard"));
        assert_eq!(watch.alive(), Ok(()), "a silent peer is no reason to be restarted");
        watch.effect(&Effect::Lost(Rank(1), "silent".to_owned()));
        assert!(watch.ready().unwrap_err().contains("no worker 1"));
    }

    #[test]
    fn a_loop_that_does_not_turn_is_not_alive() {
        let watch = watch(1.0);
        watch.course().turned = Instant::now().checked_sub(STALLED + Duration::from_secs(1));
        assert!(watch.alive().unwrap_err().contains("has not turned for 61 s"));
        watch.turned((0, 0));
        assert_eq!(watch.alive(), Ok(()));
    }

    #[test]
    fn metrics_follow_what_happens() {
        let watch = watch(1.0);
        watch.heard(Rank(0));
        watch.turned((3, 2));
        let k = Iteration(2);
        watch.effect(&Effect::Began(k, PhaseName::Sampling, None, 12, 4));
        watch.effect(&Effect::RecordShard(k, ShardId(1), Vec::new()));
        watch.effect(&Effect::Lost(Rank(1), "killed".to_owned()));
        let text = watch.metrics();
        for line in [
            "drift_phase{phase=\"sampling\"} 1",
            "drift_phase{phase=\"training\"} 0",
            "drift_iteration 2",
            "drift_phase_planned 12",
            "drift_phase_done 4",
            "drift_queue_commands 3",
            "drift_leases 2",
            "drift_workers 2",
            "drift_workers_attached 1",
            "drift_worker_losses_total 1",
            "drift_snapshot_age_seconds -1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        assert!(text.contains("drift_worker_heartbeat_age_seconds{rank=\"0\"} "), "{text}");
        assert!(text.contains("process_resident_memory_bytes "), "{text}");
        assert!(!text.contains("rank=\"1\""), "who is gone has no age:\n{text}");
    }
}
