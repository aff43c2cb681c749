//! The state machine: every decision of a run, and no clock, chance or I/O.

mod events;
mod leaving;
mod members;
mod phases;
mod position;
mod recovery;
mod reports;
mod snapshots;
mod stage;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

pub use self::events::{
    Effect, Event, Now, Outcome, PhaseName, ReductionSeconds, RunShape, SnapshotKind,
};
use self::members::Members;
pub use self::position::{Extent, PairSets, Position, Resume};
use self::snapshots::Saves;
pub use self::snapshots::SnapshotRule;
use self::stage::Stage;
use super::command::{
    Command, ModelSource, PairRef, Rank, Report, SaveSeconds, SnapshotId, StepOutcomes, WrittenFile,
};
use super::health::{self, ConcernName, Signs};
use super::metrics::{EvaluationMetrics, Progress, ScoredPair, StepMetrics, StepPair};
use super::objective::Objective;
use super::plan::{self, PairSize, StepPlan};
use crate::config::Reference;
use crate::domain::{Epoch, Iteration, PairId, ReferenceLogps, ShardId, Step};
use crate::store::CommittedPhase;

/// What the run is doing.
///
/// ```text
/// Attaching ─▶ Grouping ─▶ Loading ─▶ Working ─▶ Over
///
/// Working, iteration 0 (warm start) to K:
///   Sampling ─▶ Rating ─▶ Pairing ─▶ Scoring ─▶ Training ─▶ Saving ─▶ Evaluating ─▶ Publishing
///   (not in 0)  (where a                           ▲                       │
///               method asks)                       └──── next epoch ───────┘
/// ```
///
/// Every arrow within `Working` is a commit. Any state goes to `Over` by a stop or a
/// failed effect, and back to `Attaching` by the loss of a worker that others wait
/// for; see `recovery.rs` for when they need not. Before `Training`, `Grouping` comes
/// again if somebody was replaced since.
#[derive(Debug)]
enum State {
    /// Until each rank has its worker, and it is known where to go on.
    Attaching { is_resumed: bool },
    /// The process group forms; then the run goes on, or loads what it needs.
    Grouping { stage: Stage, then: Option<Position> },
    /// Weights, and training state where a run resumes, are loaded.
    Loading(Stage),
    /// An iteration is under way.
    Working { iteration: Iteration, phase: Phase },
    /// The outcome was told.
    Over,
}

#[derive(Debug)]
enum Phase {
    Sampling(Stage),
    /// Without a plan at first: a thread makes it of what was sampled.
    Rating(Option<RatingPlan>),
    Pairing,
    Scoring(Stage),
    Training {
        epoch: Epoch,
        stage: Stage,
        steps: Vec<StepPlan>,
        gathering: Gathering,
        saves: Saves,
    },
    Saving {
        epoch: Epoch,
        stage: Stage,
        files: Vec<WrittenFile>,
    },
    Evaluating {
        epoch: Epoch,
        stage: Stage,
        policy: BTreeMap<PairId, ReferenceLogps>,
    },
    Publishing,
}

#[derive(Debug)]
struct RatingPlan {
    stage: Stage,
    /// How many samples each batch has.
    batches: Vec<usize>,
}

/// Ranks' parts of the steps under way.
type Gathering = BTreeMap<Step, BTreeMap<Rank, StepOutcomes>>;

/// One run's state. See [`Event`] and [`Effect`] for what goes in and comes out.
#[derive(Debug)]
pub struct Machine {
    shape: RunShape,
    state: State,
    resume: Resume,
    now: Now,
    members: Members,
    /// Whether all members are in one process group.
    is_grouped: bool,
    /// Groups formed so far.
    groups: u64,
    /// Whether this process once had its workers ready: what fails before that fails
    /// for good.
    is_proven: bool,
    /// How often each shard of the iteration was lost with its worker.
    tries: BTreeMap<ShardId, u32>,
    /// The last step that was ever recorded.
    furthest: Option<(Iteration, Step)>,
    pairs: PairSets,
    references: BTreeMap<PairId, ReferenceLogps>,
    /// Tokens trained in the iteration so far.
    tokens: u64,
    watch: Watch,
    /// It is to stop as soon as nothing is lost by it.
    is_leaving: bool,
}

/// How the iteration's training has gone, since this process follows it.
#[derive(Debug, Default)]
struct Watch {
    steps: Vec<Signs>,
    told: BTreeSet<ConcernName>,
}

impl Machine {
    /// A machine that goes on where `resume` says.
    pub fn new(now: Now, shape: RunShape, resume: Resume) -> Self {
        Self {
            state: State::Attaching { is_resumed: true },
            now,
            members: Members::new(now, shape.world_size),
            is_grouped: false,
            groups: 0,
            is_proven: false,
            tries: BTreeMap::new(),
            furthest: None,
            pairs: resume.pairs.clone(),
            references: resume.references.clone(),
            tokens: resume.tokens,
            watch: Watch::default(),
            is_leaving: false,
            resume,
            shape,
        }
    }

    /// How many iterations and epochs the run has.
    pub fn extent(&self) -> Extent {
        self.shape.extent
    }

    /// How many commands wait for a worker, and how many workers have in hand.
    pub fn commands(&self) -> (usize, usize) {
        self.stage().map_or((0, 0), Stage::counts)
    }

    /// Takes one event; returns what is to be done, in order.
    pub fn step(&mut self, now: Now, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        if matches!(self.state, State::Over) {
            return effects;
        }
        self.now = now;
        match event {
            Event::Attached(rank) => self.attached(now, rank, &mut effects),
            Event::Lost(rank, why) => self.lost(now, rank, &why, &mut effects),
            Event::StartFailed(rank, why) if self.members.knows(rank) => {
                self.lost(now, rank, &why, &mut effects);
            }
            Event::StartFailed(rank, why) => {
                let why = format!("worker {rank} did not start: {why}");
                self.end(Outcome::Failed(why), &mut effects);
            }
            Event::Heard(rank) => self.members.heard(now, rank),
            Event::Told(rank, report) => {
                self.members.heard(now, rank);
                self.told(now, rank, report, &mut effects);
            }
            Event::Rewound(resume) => self.rewound(*resume, &mut effects),
            Event::RatingPlanned(batches) => self.rating_planned(batches, &mut effects),
            Event::PairsBuilt(pairs) => self.pairs_built(pairs, &mut effects),
            Event::CheckpointPublished => self.published(&mut effects),
            Event::EffectFailed(why) => self.end(Outcome::Failed(why), &mut effects),
            Event::StopRequested => self.end(Outcome::Stopped, &mut effects),
            Event::LeaveRequested => self.leave(&mut effects),
            Event::Tick => self.tick(now, &mut effects),
        }
        effects
    }

    fn end(&mut self, outcome: Outcome, effects: &mut Vec<Effect>) {
        self.state = State::Over;
        effects.push(Effect::Dismiss);
        effects.push(Effect::End(outcome));
    }

    fn unexpected(&mut self, rank: Rank, what: &str, effects: &mut Vec<Effect>) {
        let why = format!(
            "worker {rank} answered {what} where nothing of the kind was asked; coordinator and worker are of different builds"
        );
        self.end(Outcome::Failed(why), effects);
    }

    fn attached(&mut self, now: Now, rank: Rank, effects: &mut Vec<Effect>) {
        // One that comes while others wait for it gets its weights as they do.
        let is_fresh = !matches!(self.state, State::Attaching { .. });
        self.members.attached(now, rank, is_fresh);
        if is_fresh {
            self.advance(effects);
        } else {
            self.form(effects);
        }
    }

    fn tick(&mut self, now: Now, effects: &mut Vec<Effect>) {
        effects.extend(self.members.due(now).into_iter().map(Effect::Start));
        let missing = self.members.missing(now, self.shape.start_timeout);
        if !missing.is_empty() {
            let missing: Vec<_> = missing.iter().map(Rank::to_string).collect();
            let why = format!(
                "worker {} did not attach within {:?}; see its log, or raise launch.start_timeout",
                missing.join(", "),
                self.shape.start_timeout
            );
            self.end(Outcome::Failed(why), effects);
            return;
        }
        for rank in self.members.silent(now, self.shape.heartbeat_deadline) {
            let why = format!(
                "it was silent for longer than launch.heartbeat_deadline ({:?})",
                self.shape.heartbeat_deadline
            );
            if !matches!(self.state, State::Over) {
                self.lost(now, rank, &why, effects);
            }
        }
    }

    fn load(&mut self, effects: &mut Vec<Effect>) {
        let (model, state) = self.resume.needs(&self.shape.extent);
        let mut commands = vec![Command::LoadModel(model)];
        if let Some(snapshot) = state {
            commands.push(Command::BeginTraining);
            commands.push(Command::LoadState(snapshot));
        }
        self.state = State::Loading(Stage::bound(vec![commands; self.shape.world_size]));
        self.advance(effects);
    }

    fn go_on(&mut self, position: Position, effects: &mut Vec<Effect>) {
        if self.is_leaving && position != Position::Finished {
            self.end(Outcome::Stopped, effects);
            return;
        }
        match position {
            Position::Start => {
                self.commit(Iteration(0), CommittedPhase::Prepared, None, json!({}), effects);
                self.go_on(self.shape.extent.first(), effects);
            }
            Position::Sampling(k) => self.begin_sampling(k, effects),
            Position::Rating(k) => {
                self.enter(k, Phase::Rating(None));
                effects.push(Effect::PlanRating(k));
            }
            Position::Pairing(k) => {
                self.enter(k, Phase::Pairing);
                effects.push(Effect::Began(k, PhaseName::Pairing, None, 0, 0));
                effects.push(Effect::BuildPairs(k));
            }
            Position::Scoring(k) => self.begin_scoring(k, effects),
            Position::Training(k, epoch) => self.begin_training(k, epoch, effects),
            Position::Evaluating(k, epoch) => self.begin_evaluating(k, epoch, effects),
            Position::Publishing(k) => {
                self.enter(k, Phase::Publishing);
                effects.push(Effect::Began(k, PhaseName::Publishing, None, 0, 0));
                effects.push(Effect::Publish(k, self.shape.extent.last_epoch(k)));
            }
            Position::Finished => {
                let last = Iteration(self.shape.extent.iterations);
                self.commit(last, CommittedPhase::Finished, None, json!({}), effects);
                self.end(Outcome::Finished, effects);
            }
        }
    }

    fn enter(&mut self, iteration: Iteration, phase: Phase) {
        self.state = State::Working { iteration, phase };
    }

    fn commit(
        &mut self,
        iteration: Iteration,
        phase: CommittedPhase,
        epoch: Option<Epoch>,
        detail: serde_json::Value,
        effects: &mut Vec<Effect>,
    ) {
        self.members.progressed();
        effects.push(Effect::Commit { iteration, phase, epoch, detail });
    }
}
