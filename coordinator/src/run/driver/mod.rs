//! Feeds the state machine and carries out what it decides.
//!
//! One task owns everything durable: the journal, the run directory, the links
//! to the workers. Long work on text and files goes to blocking threads, whose
//! results come back as events.

mod carry;
mod corpora;
mod fault;
mod members;
mod pairs;
mod prepare;
mod prompts;
mod publish;
mod rating;
mod resume;
mod salvage;
mod summary;
mod view;
mod watch;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tracing::{debug, info};

pub(crate) use self::corpora::named_format;
pub use self::corpora::{Corpora, Reading};
use self::members::Peer;
pub use self::prepare::{Prepared, prepare};
pub(crate) use self::prepare::{reward_text, text_model, tokenise};
pub use self::prompts::Prompts;
use self::rating::Ratable;
pub use self::salvage::salvage;
pub use self::summary::summarise;
use self::view::View;
pub use self::watch::Watch;
use super::command::{Command, ModelSource, PairRef, Rank, Report, SnapshotId};
use super::machine::{Effect, Event, Machine, Outcome, PairSets, Position, Resume, RunShape};
use super::plan::{CostModel, Shard, plan_shards};
use crate::config::{Settings, StartWorkers};
use crate::domain::{Iteration, PairId, PairRow, ShardId, TokenPair};
use crate::server::{
    Allocation, LaunchPlan, Launcher, Opening, Outgoing, Server, WorkerEvent, WorkerExit,
    find_worker, threads_per_worker,
};
use crate::store::metrics::MetricsLog;
use crate::store::{Commit, CommittedPhase, FileEntry, JournalWriter, RunDir, names};
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
    pub journal: JournalWriter,
    /// Name of the run, in manifests.
    pub run_id: String,
    /// Worker processes now; the settings name those that the run began with.
    pub workers: u32,
    /// The screen.
    pub progress: Progress,
    /// What monitoring sees.
    pub watch: Arc<Watch>,
}

/// How a run is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Workers drop what they are at.
    Now,
    /// As soon as what is under way is saved.
    Soon,
}

/// Heartbeats and deadlines are looked at this often.
const TICK: Duration = Duration::from_millis(250);

/// Workers have this long to leave after they were told to.
const LEAVE_GRACE: Duration = Duration::from_secs(4);

/// Results of work on blocking threads.
enum Finished {
    Rating(Result<Vec<Vec<Ratable>>>),
    Pairs(Iteration, Result<(Vec<PairRow>, PairCounts, FileEntry)>),
    Checkpoint(Result<()>),
}

/// The running session.
struct Driver {
    session: Session,
    /// Where the run lies, and the hash by which workers know it.
    place: (String, Vec<u8>),
    machine: Machine,
    began: Instant,
    ticks: u64,
    launcher: Launcher,
    peers: BTreeMap<Rank, Peer>,
    /// The last one given out: to a worker that attached, or to those that were called.
    generation: u64,
    /// Those to be given out next: the journal was told of them.
    generations: Range<u64>,
    losses: u64,
    shards: BTreeMap<ShardId, Shard>,
    /// What the reward model reads of the iteration in hand, while it is rated.
    rating: Vec<Vec<Ratable>>,
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
pub async fn drive(session: Session, mut stop: mpsc::Receiver<Stop>) -> Result<(Session, Outcome)> {
    let settings = session.settings.clone();
    let cost = cost_model(&session.model_dir)?;
    let prompts = session.prepared.prompt_lengths();
    let shape =
        RunShape::new(&settings, session.workers, cost, prompts, session.prepared.is_rated());
    let (worker_events, mut from_workers) = mpsc::unbounded_channel();
    let (exits, mut exited) = mpsc::unbounded_channel();
    let (finished, mut from_threads) = mpsc::unbounded_channel();
    let start = Start::of(session, shape)?;
    if start.resume.position == Position::Finished {
        return Ok((start.finish()?, Outcome::Finished));
    }
    let starts_workers = settings.launch.start != StartWorkers::None;
    let by_slurm = settings.launch.start == StartWorkers::Slurm;
    let job = by_slurm.then(|| Allocation::of_this_job(start.session.workers)).transpose()?;
    let program = starts_workers.then(|| find_worker(&settings.launch)).transpose()?;
    let opening = Opening::make(&settings.launch, &start.session.run.join()).await?;
    let address = opening.address;
    let workers = start.session.workers;
    job.as_ref().map_or(Ok(()), |job| job.reaches(address))?;
    let server = Server::start(opening, workers, worker_events);
    let threads =
        threads_per_worker(&settings.launch, job.as_ref().map_or(workers, Allocation::per_node));
    let plan = program.map(|program| LaunchPlan {
        program,
        threads,
        way: Arc::clone(&server.way),
        logs: start.session.run.logs(),
        settings: settings.launch.clone(),
        job,
    });
    let mut driver = Driver::new(start, Launcher::new(plan, exits), finished)?;
    driver.record_start(threads)?;
    driver.session.watch.begin(workers, &settings.launch);
    info!(%address, workers, threads, "start workers");
    for rank in (0..workers).map(Rank) {
        driver.launcher.start(rank)?;
    }
    if let Some(folder) = server.way.folder().filter(|_| !starts_workers) {
        info!(%address, workers, "wait for workers; each needs `worker --join {} --slot N`", folder.display());
    }
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while driver.outcome.is_none() {
        tokio::select! {
            Some(event) = from_workers.recv() => driver.worker_event(event),
            Some(exit) = exited.recv() => driver.worker_exit(exit),
            Some(done) = from_threads.recv() => driver.thread_done(done),
            Some(stop) = stop.recv() => match stop {
                Stop::Now => {
                    info!("stop: workers end what they are at, what is committed stands");
                    driver.feed(Event::StopRequested);
                }
                Stop::Soon => {
                    info!("stop soon: what is under way is saved first");
                    driver.feed(Event::LeaveRequested);
                }
            },
            _ = tick.tick() => {
                // Whoever was heard while the loop was at something is not silent.
                for _ in 0..from_workers.len() {
                    if let Ok(event) = from_workers.try_recv() {
                        driver.worker_event(event);
                    }
                }
                driver.tick();
            }
        }
    }
    driver.view.close();
    // Links must close before the workers are waited for.
    driver.peers.clear();
    driver.launcher.reap(LEAVE_GRACE).await;
    let mut outcome = driver.outcome.take().unwrap_or(Outcome::Stopped);
    // What workers told is on disk, whatever ended the run.
    if let Err(error) = driver.session.journal.journal()
        && !matches!(outcome, Outcome::Failed(_))
    {
        outcome = Outcome::Failed(error.to_string());
    }
    Ok((driver.session, outcome))
}

/// A session, and where it goes on.
struct Start {
    session: Session,
    shape: RunShape,
    resume: Resume,
    pairs: BTreeMap<PairId, TokenPair>,
}

impl Start {
    fn of(mut session: Session, shape: RunShape) -> Result<Self> {
        let workers = session.workers;
        let (resume, rows) =
            resume::resume(&session.run, session.journal.journal()?, shape.extent, workers)?;
        Ok(Self { session, shape, resume, pairs: by_id(rows) })
    }

    /// Everything is published: commits so, if the run died just before it did.
    fn finish(mut self) -> Result<Session> {
        let journal = self.session.journal.journal()?;
        carry::renew_metrics(journal, &self.session.run)?;
        let commits = journal.commits()?;
        if let Some(last) = commits.last().filter(|last| last.phase != CommittedPhase::Finished) {
            let (iteration, phase) = (last.iteration, CommittedPhase::Finished);
            let detail = serde_json::json!({});
            let commit = Commit { iteration, phase, epoch: None, at: unix_seconds(), detail };
            carry::commit_to(journal, &commit)?;
        }
        Ok(self.session)
    }
}

impl Driver {
    fn new(
        start: Start,
        launcher: Launcher,
        finished: mpsc::UnboundedSender<Finished>,
    ) -> Result<Self> {
        let Start { mut session, shape, resume, pairs } = start;
        let shards = plan_shards(&shape.prompts, shape.sharding)
            .into_iter()
            .map(|shard| (shard.id, shard))
            .collect();
        carry::renew_metrics(session.journal.journal()?, &session.run)?;
        let root = std::path::absolute(session.run.root()).context("find the run directory")?;
        let config = session.run.config_path();
        let config =
            std::fs::read(&config).with_context(|| format!("read {}", config.display()))?;
        Ok(Self {
            place: (carry::utf8(&root)?, Sha256::digest(&config).to_vec()),
            generation: 0,
            // One for this start, and one for each worker that attaches.
            generations: session.journal.journal()?.next_generations(1 + session.workers)?,
            view: View::new(session.progress.clone(), session.settings.run.log_steps),
            machine: Machine::new(Duration::ZERO, shape, resume),
            session,
            began: Instant::now(),
            ticks: 0,
            launcher,
            peers: BTreeMap::new(),
            losses: 0,
            shards,
            rating: Vec::new(),
            pairs,
            metrics: None,
            last_step: Instant::now(),
            finished,
            outcome: None,
        })
    }

    /// Keeps with how many workers the run goes on this time, and on how many
    /// threads: both decide its bytes.
    fn record_start(&mut self, threads: usize) -> Result<()> {
        let generation = self.next_generation()?;
        let kind = format!("start {generation}");
        let start = serde_json::json!({
            "workers": self.session.workers, "threads": threads, "at": unix_seconds()
        });
        self.session.journal.journal()?.record_counts(&kind, &start)?;
        Ok(())
    }

    /// Looks at deadlines, and lets a part of the workers know that their coordinator
    /// lives: each hears so once in a heartbeat, and they are spread over it.
    fn tick(&mut self) {
        self.ticks += 1;
        let heartbeat = self.session.settings.launch.heartbeat;
        let parts = (heartbeat / TICK.as_secs_f64()).floor().max(1.0) as u64;
        for (rank, peer) in &self.peers {
            if u64::from(rank.0) % parts == self.ticks % parts {
                peer.link.send(Outgoing::Heartbeat);
            }
        }
        self.feed(Event::Tick);
        self.session.watch.turned(self.machine.commands());
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
                match self.carry_out(effect) {
                    Ok(next) => events.extend(next),
                    Err(error) => {
                        // The effects behind a failed one rest on it.
                        events.push_back(Event::EffectFailed(format!("{error:#}")));
                        break;
                    }
                }
            }
        }
    }

    fn thread_done(&mut self, done: Finished) {
        let event = match done {
            Finished::Rating(Ok(batches)) => {
                self.rating = batches;
                Event::RatingPlanned(self.rating.iter().map(Vec::len).collect())
            }
            Finished::Pairs(k, Ok((rows, counts, file))) => {
                let sets: PairSets = resume::sizes(&rows);
                self.pairs = by_id(rows);
                let kind = format!("pairs of iteration {k}");
                let recorded = self.session.journal.journal().and_then(|journal| {
                    journal.record_counts(&kind, &serde_json::json!(counts))?;
                    journal.record_file(&names::pairs(k), &file)
                });
                match recorded {
                    Ok(()) => Event::PairsBuilt(sets),
                    Err(error) => Event::EffectFailed(error.to_string()),
                }
            }
            Finished::Checkpoint(Ok(())) => Event::CheckpointPublished,
            Finished::Rating(Err(error))
            | Finished::Pairs(_, Err(error))
            | Finished::Checkpoint(Err(error)) => Event::EffectFailed(format!("{error:#}")),
        };
        self.feed(event);
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
