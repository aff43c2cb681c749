//! The state machine: every decision of a run, and no clock, chance or I/O.

mod events;
mod phases;
mod position;
mod reports;
mod stage;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

pub use self::events::{
    Effect, Event, Now, Outcome, PhaseName, ReductionSeconds, RunShape, SnapshotKind,
};
pub use self::position::{Extent, PairSets, Position, Resume};
use self::stage::Stage;
use super::command::{Command, ModelSource, PairRef, Rank, Report, StepOutcomes, WrittenFile};
use super::health::{self, ConcernName, Signs};
use super::metrics::{EvaluationMetrics, Progress, ScoredPair, StepMetrics, StepPair};
use super::objective::Objective;
use super::plan::{self, PairSize, StepPlan};
use crate::config::Reference;
use crate::domain::{Epoch, Iteration, PairId, ReferenceLogps, Step};
use crate::store::CommittedPhase;

/// What the run is doing.
///
/// ```text
/// Attaching ─▶ Grouping ─▶ Loading ─▶ Working ─▶ Over
///
/// Working, iteration 0 (warm start) to K:
///   Sampling ─▶ Pairing ─▶ Scoring ─▶ Training ─▶ Saving ─▶ Evaluating ─▶ Publishing
///   (not in 0)                           ▲                       │
///                                        └──── next epoch ───────┘
/// ```
///
/// Every arrow within `Working` is a commit. Any state goes to `Over` by a stop,
/// a lost worker or a failed effect.
#[derive(Debug)]
enum State {
    /// Until each rank has its worker.
    Attaching { since: Now },
    /// The process group forms.
    Grouping(Stage),
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
    Pairing,
    Scoring(Stage),
    Training { epoch: Epoch, stage: Stage, steps: Vec<StepPlan>, gathering: Gathering },
    Saving { epoch: Epoch, stage: Stage, files: Vec<WrittenFile> },
    Evaluating { epoch: Epoch, stage: Stage, policy: BTreeMap<PairId, ReferenceLogps> },
    Publishing,
}

/// Ranks' parts of the steps under way.
type Gathering = BTreeMap<Step, BTreeMap<Rank, StepOutcomes>>;

/// One run's state. See [`Event`] and [`Effect`] for what goes in and comes out.
#[derive(Debug)]
pub struct Machine {
    shape: RunShape,
    state: State,
    resume: Resume,
    /// When each attached worker was last heard.
    heard: Vec<Option<Now>>,
    pairs: PairSets,
    references: BTreeMap<PairId, ReferenceLogps>,
    /// Tokens trained in the iteration so far.
    tokens: u64,
    watch: Watch,
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
            state: State::Attaching { since: now },
            heard: vec![None; shape.world_size],
            pairs: resume.pairs.clone(),
            references: resume.references.clone(),
            tokens: resume.tokens,
            watch: Watch::default(),
            resume,
            shape,
        }
    }

    /// Where it goes on once its workers are ready.
    pub fn position(&self) -> Position {
        self.resume.position
    }

    /// Takes one event; returns what is to be done, in order.
    pub fn step(&mut self, now: Now, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        if matches!(self.state, State::Over) {
            return effects;
        }
        match event {
            Event::Attached(rank) => self.attached(now, rank, &mut effects),
            Event::Lost(rank, why) => {
                self.end(Outcome::Failed(format!("worker {rank} is lost: {why}")), &mut effects);
            }
            Event::Heard(rank) => self.hear(now, rank),
            Event::Told(rank, report) => {
                self.hear(now, rank);
                self.told(rank, report, &mut effects);
            }
            Event::PairsBuilt(pairs) => self.pairs_built(pairs, &mut effects),
            Event::CheckpointPublished => self.published(&mut effects),
            Event::EffectFailed(why) => self.end(Outcome::Failed(why), &mut effects),
            Event::StopRequested => self.end(Outcome::Stopped, &mut effects),
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
        self.hear(now, rank);
        if let Some(heard) = self.heard.get_mut(rank.index()) {
            *heard = Some(now);
        }
        if !matches!(self.state, State::Attaching { .. }) || self.heard.iter().any(Option::is_none)
        {
            return;
        }
        if self.shape.world_size == 1 {
            self.load(effects);
            return;
        }
        let mut stage = Stage::first(self.shape.world_size, Command::OpenGroup { store: None });
        stage.dispatch(effects);
        self.state = State::Grouping(stage);
    }

    fn hear(&mut self, now: Now, rank: Rank) {
        if let Some(Some(heard)) = self.heard.get_mut(rank.index()) {
            *heard = now;
        }
    }

    fn tick(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if let State::Attaching { since } = self.state
            && now.saturating_sub(since) > self.shape.start_timeout
        {
            let missing: Vec<_> = (0..self.heard.len())
                .filter(|&rank| self.heard[rank].is_none())
                .map(|rank| rank.to_string())
                .collect();
            let why = format!(
                "worker {} did not attach within {:?}; see its log, or raise launch.start_timeout",
                missing.join(", "),
                self.shape.start_timeout
            );
            self.end(Outcome::Failed(why), effects);
            return;
        }
        let silent = self.heard.iter().position(|heard| {
            heard.is_some_and(|heard| now.saturating_sub(heard) > self.shape.heartbeat_deadline)
        });
        if let Some(rank) = silent {
            let why = format!(
                "worker {rank} was silent for longer than launch.heartbeat_deadline ({:?})",
                self.shape.heartbeat_deadline
            );
            self.end(Outcome::Failed(why), effects);
        }
    }

    fn load(&mut self, effects: &mut Vec<Effect>) {
        let (model, state) = self.shape.extent.needs(self.resume.position);
        let mut commands = vec![Command::LoadModel(model)];
        if let Some((iteration, epoch)) = state {
            commands.push(Command::BeginTraining);
            commands.push(Command::LoadState(iteration, epoch));
        }
        let mut stage = Stage::bound(vec![commands; self.shape.world_size]);
        stage.dispatch(effects);
        self.state = State::Loading(stage);
    }

    fn go_on(&mut self, position: Position, effects: &mut Vec<Effect>) {
        match position {
            Position::Start => {
                self.commit(Iteration(0), CommittedPhase::Prepared, None, json!({}), effects);
                self.go_on(self.shape.extent.first(), effects);
            }
            Position::Sampling(k) => self.begin_sampling(k, effects),
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
        effects.push(Effect::Commit { iteration, phase, epoch, detail });
    }
}
