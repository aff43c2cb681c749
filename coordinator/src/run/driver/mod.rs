//! Feeds the state machine and carries out what it decides.
//!
//! One task owns everything durable: the journal, the run directory, the links
//! to the workers. Long work on text and files goes to blocking threads, whose
//! results come back as events.

mod carry;
mod fault;
mod prepare;
mod publish;
mod resume;
mod summary;
mod view;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

pub(crate) use self::prepare::named_format;
pub use self::prepare::{Prepared, prepare};
pub use self::summary::summarise;
use self::view::View;
use super::command::{Command, ModelSource, PairRef, Rank, Report};
use super::machine::{Effect, Event, Machine, Outcome, PairSets, Position, RunShape};
use super::plan::{CostModel, Shard, plan_shards};
use crate::config::{Settings, StartWorkers};
use crate::domain::{Iteration, PairId, PairRow, ShardId, TokenPair};
use crate::server::{
    AttachPlan, Launcher, Link, Opening, Server, WorkerEvent, WorkerExit, find_worker,
    threads_per_worker,
};
use crate::store::metrics::MetricsLog;
use crate::store::{CommittedPhase, Journal, RunDir};
use crate::text::PairCounts;
use crate::ui::Progress;

/// Everything a run needs to begin or go on.
#[derive(Debug)]
pub struct Session {
    /// Checked settings; frozen in the run directory.
    pub settings: Settings,
    /// The model that the run began with.
    pub model_dir: PathBuf,
    /// Corpora and text.
    pub prepared: Arc<Prepared>,
    /// The directory, locked.
    pub run: RunDir,
    /// Its journal.
    pub journal: Journal,
    /// Name of the run, in manifests.
    pub run_id: String,
    /// Worker processes now; the settings name those that the run began with.
    pub workers: u32,
    /// The screen.
    pub progress: Progress,
}

/// Heartbeats and deadlines are looked at this often.
const TICK: Duration = Duration::from_millis(500);

/// Workers have this long to leave after they were told to.
const LEAVE_GRACE: Duration = Duration::from_secs(8);

/// Results of work on blocking threads.
enum Finished {
    Pairs(Iteration, Result<(Vec<PairRow>, PairCounts)>),
    Checkpoint(Result<()>),
}

/// The running session.
struct Driver {
    session: Session,
    machine: Machine,
    began: Instant,
    links: BTreeMap<Rank, Link>,
    generation: u64,
    shards: BTreeMap<ShardId, Shard>,
    /// Token ids of the iteration in hand.
    pairs: BTreeMap<PairId, TokenPair>,
    metrics: Option<MetricsLog>,
    last_step: Instant,
    view: View,
    finished: mpsc::UnboundedSender<Finished>,
    outcome: Option<Outcome>,
}

/// Runs a session to its end. Stops cleanly when `stop` resolves.
///
/// # Errors
/// What cannot be begun: no worker program, no port. What goes wrong later is
/// an [`Outcome::Failed`].
pub async fn drive(session: Session, mut stop: mpsc::Receiver<()>) -> Result<(Session, Outcome)> {
    let settings = session.settings.clone();
    let cost = cost_model(&session.model_dir)?;
    let prompts = session.prepared.prompt_lengths();
    let shape = RunShape::new(&settings, session.workers, cost, prompts);
    let (worker_events, mut from_workers) = mpsc::unbounded_channel();
    let (exits, mut exited) = mpsc::unbounded_channel();
    let (finished, mut from_threads) = mpsc::unbounded_channel();
    let mut driver = Driver::new(session, shape, finished)?;
    if driver.machine.position() == Position::Finished {
        driver.finish()?;
        return Ok((driver.session, Outcome::Finished));
    }
    let starts_workers = settings.launch.start == StartWorkers::Local;
    let program = starts_workers.then(|| find_worker(&settings.launch)).transpose()?;
    let opening = Opening::make(&settings.launch, &driver.session.run.join()).await?;
    let address = opening.address;
    let workers = driver.session.workers;
    let server = Server::start(opening, workers, worker_events);
    let mut launcher = Launcher::default();
    let threads = threads_per_worker(&settings.launch, workers);
    driver.record_start(threads)?;
    if let Some(program) = program {
        info!(%address, workers, threads, "start workers");
        for rank in (0..workers).map(Rank) {
            let log = driver.session.run.worker_log(rank.0);
            let (launch, exits) = (&settings.launch, exits.clone());
            launcher.start(&program, rank, launch, threads, &server.way, &log, exits)?;
        }
    } else if let Some(folder) = server.way.folder() {
        info!(%address, workers, "wait for workers; each needs `worker --join {} --slot N`", folder.display());
    }
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while driver.outcome.is_none() {
        tokio::select! {
            Some(event) = from_workers.recv() => driver.worker_event(event),
            Some(exit) = exited.recv() => driver.worker_exit(exit),
            Some(done) = from_threads.recv() => driver.thread_done(done),
            _ = stop.recv() => {
                info!("stop: workers end what they are at, what is committed stands");
                driver.feed(Event::StopRequested);
            }
            _ = tick.tick() => {
                for link in driver.links.values() {
                    link.send(crate::server::Outgoing::Heartbeat);
                }
                driver.feed(Event::Tick);
            }
        }
    }
    driver.view.close();
    // Links must close before the workers are waited for.
    driver.links.clear();
    launcher.reap(LEAVE_GRACE).await;
    let outcome = driver.outcome.take().unwrap_or(Outcome::Stopped);
    Ok((driver.session, outcome))
}

impl Driver {
    fn new(
        mut session: Session,
        shape: RunShape,
        finished: mpsc::UnboundedSender<Finished>,
    ) -> Result<Self> {
        let workers = session.workers;
        let (resume, rows) =
            resume::resume(&session.run, &mut session.journal, shape.extent, workers)?;
        let shards = plan_shards(&shape.prompts, shape.sharding)
            .into_iter()
            .map(|shard| (shard.id, shard))
            .collect();
        let generation = session.journal.next_generation()?;
        let pairs = by_id(rows);
        let view = View::new(session.progress.clone(), session.settings.run.log_steps);
        let driver = Self {
            machine: Machine::new(Duration::ZERO, shape, resume),
            session,
            began: Instant::now(),
            links: BTreeMap::new(),
            generation,
            shards,
            pairs,
            metrics: None,
            last_step: Instant::now(),
            view,
            finished,
            outcome: None,
        };
        driver.renew_metrics()?;
        Ok(driver)
    }

    /// Everything is published: commits so, if the run died just before it did.
    fn finish(&mut self) -> Result<()> {
        let commits = self.session.journal.commits()?;
        let last = commits.last().filter(|commit| commit.phase != CommittedPhase::Finished);
        match last.map(|commit| commit.iteration) {
            Some(k) => self.commit(k, CommittedPhase::Finished, None, serde_json::json!({})),
            None => Ok(()),
        }
    }

    /// Keeps with how many workers the run goes on this time, and on how many
    /// threads: both decide its bytes.
    fn record_start(&mut self, threads: usize) -> Result<()> {
        let kind = format!("start {}", self.generation);
        let start = serde_json::json!({
            "workers": self.session.workers, "threads": threads, "at": unix_seconds()
        });
        self.session.journal.record_counts(&kind, &start)?;
        Ok(())
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Gives the machine an event, and carries out what follows from it.
    fn feed(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in self.machine.step(self.now(), event) {
                debug!(?effect, "carry out");
                if let Err(error) = self.carry_out(effect) {
                    // The effects behind a failed one rest on it.
                    events.push_back(Event::EffectFailed(format!("{error:#}")));
                    break;
                }
            }
        }
    }

    fn worker_event(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Attach { rank, about, link, answer } => {
                let plan = match self.admit(rank) {
                    Ok(plan) => plan,
                    Err(why) => {
                        warn!(%rank, why, "refuse a worker");
                        let _ = answer.send(Err(why));
                        return;
                    }
                };
                link.welcome(rank, plan);
                if answer.send(Ok(plan)).is_ok() {
                    info!(%rank, about, "worker attached");
                    self.links.insert(rank, link);
                    self.feed(Event::Attached(rank));
                }
            }
            WorkerEvent::Report(rank, report) => {
                self.view.report(&report);
                self.feed(Event::Told(rank, report));
            }
            WorkerEvent::Heartbeat(rank) => self.feed(Event::Heard(rank)),
            WorkerEvent::Lost(rank, why) => {
                self.links.remove(&rank);
                self.feed(Event::Lost(rank, format!("{why}{}", self.log_hint(rank))));
            }
        }
    }

    fn admit(&self, rank: Rank) -> Result<AttachPlan, String> {
        let world_size = self.session.workers;
        if rank.0 >= world_size {
            return Err(format!("slot {rank} is outside this run's {world_size} workers"));
        }
        if self.links.contains_key(&rank) {
            return Err(format!("slot {rank} has its worker already"));
        }
        Ok(AttachPlan {
            generation: self.generation,
            world_size,
            heartbeat: self.session.settings.launch.heartbeat,
        })
    }

    fn worker_exit(&mut self, exit: WorkerExit) {
        let mut why = format!("its process ended ({})", exit.status);
        if !exit.last_lines.is_empty() {
            why.push_str("; its last lines:");
            for line in &exit.last_lines {
                why.push_str("\n    ");
                why.push_str(line);
            }
        }
        self.links.remove(&exit.rank);
        self.feed(Event::Lost(exit.rank, why));
    }

    fn thread_done(&mut self, done: Finished) {
        let event = match done {
            Finished::Pairs(k, Ok((rows, counts))) => {
                let sets: PairSets = resume::sizes(&rows);
                self.pairs = by_id(rows);
                let kind = format!("pairs of iteration {k}");
                match self.session.journal.record_counts(&kind, &serde_json::json!(counts)) {
                    Ok(()) => Event::PairsBuilt(sets),
                    Err(error) => Event::EffectFailed(error.to_string()),
                }
            }
            Finished::Checkpoint(Ok(())) => Event::CheckpointPublished,
            Finished::Pairs(_, Err(error)) | Finished::Checkpoint(Err(error)) => {
                Event::EffectFailed(format!("{error:#}"))
            }
        };
        self.feed(event);
    }

    fn log_hint(&self, rank: Rank) -> String {
        let log = self.session.run.worker_log(rank.0);
        // A worker that somebody else started has its log somewhere else.
        if log.exists() { format!("; its log is {}", log.display()) } else { String::new() }
    }

    fn link(&self, rank: Rank) -> Result<&Link> {
        match self.links.get(&rank) {
            Some(link) => Ok(link),
            None => bail!("worker {rank} is gone"),
        }
    }
}

/// What pairs cost in the model that is trained, by its `config.json`.
fn cost_model(model_dir: &Path) -> Result<CostModel> {
    let path = model_dir.join("config.json");
    let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    CostModel::from_config_json(&text)
        .with_context(|| format!("read the decoder's shape in {}", path.display()))
}

fn by_id(rows: Vec<PairRow>) -> BTreeMap<PairId, TokenPair> {
    rows.into_iter().map(|row| (row.tokens.id, row.tokens)).collect()
}

/// Seconds since 1970, for people; no decision rests on them.
fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
