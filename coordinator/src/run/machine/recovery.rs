//! What follows when a worker is lost.
//!
//! Where nobody waits for it in a collective, the others go on: what it held goes to
//! whoever is free, or waits for its successor, which loads the weights that the
//! phase computes with. Elsewhere the run rewinds: everybody drops what they hold,
//! the group forms anew, and all go on from the last commit or snapshot, to the same
//! bytes.

use super::{
    Command, Effect, Machine, ModelSource, Now, Outcome, Phase, Position, Rank, RatingPlan,
    Reference, Resume, ShardId, Stage, State, Watch,
};

impl Machine {
    /// A worker is gone: its stream closed, its process ended, or nothing is heard.
    pub(super) fn lost(&mut self, now: Now, rank: Rank, why: &str, effects: &mut Vec<Effect>) {
        let at_once = self.members.lost(now, rank);
        if self.is_exhausted(rank, why, effects) {
            return;
        }
        effects.push(Effect::Lost(rank, why.to_owned()));
        if self.is_leaving && !self.is_replaced_in_place(rank) {
            // What is on disk stands; to make up for it would take longer than is left.
            self.end(Outcome::Stopped, effects);
            return;
        }
        if at_once {
            effects.push(Effect::Start(rank));
        }
        if self.is_replaced_in_place(rank) {
            self.is_grouped = false;
            let held = self.stage_mut().map(|stage| stage.lost(rank)).unwrap_or_default();
            for shard in held {
                self.shard_lost(shard, why, effects);
            }
            self.advance(effects);
        } else if !matches!(self.state, State::Attaching { .. } | State::Over) {
            self.rewind(effects);
        }
    }

    /// A command failed, and its worker lives.
    pub(super) fn failed(&mut self, now: Now, rank: Rank, why: &str, effects: &mut Vec<Effect>) {
        if !self.is_proven {
            self.end(Outcome::Failed(format!("worker {rank}: {why}")), effects);
            return;
        }
        if self.is_replaced_in_place(rank) {
            // Whatever it is that failed may have left it in any state.
            self.lost(now, rank, why, effects);
            return;
        }
        if matches!(self.state, State::Attaching { .. }) {
            return;
        }
        // Perhaps of a peer's end, whose news is still on its way.
        self.members.failed();
        if !self.is_exhausted(rank, why, effects) {
            effects.push(Effect::Failed(rank, why.to_owned()));
            self.rewind(effects);
        }
    }

    fn is_exhausted(&mut self, rank: Rank, why: &str, effects: &mut Vec<Effect>) -> bool {
        let losses = self.members.losses();
        let is_exhausted = losses > self.shape.max_losses;
        if is_exhausted {
            let why = format!(
                "worker {rank} is lost: {why}\n(loss {losses} without progress in between; launch.max_losses = {})",
                self.shape.max_losses
            );
            self.end(Outcome::Failed(why), effects);
        }
        is_exhausted
    }

    /// Whether the others go on without this rank: no collective waits for it, and
    /// it alone holds nothing that is needed.
    fn is_replaced_in_place(&self, rank: Rank) -> bool {
        let State::Working { iteration, phase } = &self.state else { return false };
        let is_last = |epoch| epoch == self.shape.extent.last_epoch(*iteration);
        match phase {
            Phase::Sampling(_)
            | Phase::Rating(_)
            | Phase::Pairing
            | Phase::Scoring(_)
            | Phase::Publishing => true,
            // The model that was saved is what they evaluate.
            Phase::Evaluating { epoch, .. } => is_last(*epoch),
            Phase::Saving { epoch, stage, .. } => is_last(*epoch) && !stage.needs(rank),
            Phase::Training { .. } => false,
        }
    }

    /// Weights that a worker loads which comes while others work: where it has pairs to
    /// score yet, and where not.
    pub(super) fn weights_now(&self) -> (ModelSource, ModelSource) {
        let extent = &self.shape.extent;
        let policy = match &self.state {
            State::Working { iteration: k, phase } => match phase {
                Phase::Scoring(_) if self.shape.training.reference == Reference::Initial => {
                    return (ModelSource::Base, extent.start_of(*k));
                }
                Phase::Saving { epoch, .. } | Phase::Evaluating { epoch, .. } => {
                    ModelSource::Snapshot(*k, *epoch)
                }
                Phase::Publishing => ModelSource::Snapshot(*k, extent.last_epoch(*k)),
                _ => extent.start_of(*k),
            },
            State::Grouping { then: Some(position), .. } => extent.needs(*position).0,
            _ => extent.needs(self.resume.position).0,
        };
        (policy, policy)
    }

    /// A worker was lost over a shard. One that takes its worker with it each time is
    /// set aside, or ends the run.
    fn shard_lost(&mut self, shard: ShardId, why: &str, effects: &mut Vec<Effect>) {
        let tries = self.tries.entry(shard).or_default();
        *tries += 1;
        if *tries < self.shape.shard_tries {
            return;
        }
        let what = format!("shard {shard} was tried {tries} times, and its worker lost each time");
        if !self.shape.skip_poison {
            let why = format!(
                "{what}, last: {why}\nleave it out with --set launch.poison_shard=skip, in a new run"
            );
            self.end(Outcome::Failed(why), effects);
            return;
        }
        if let State::Working { iteration, phase: Phase::Sampling(stage) } = &mut self.state
            && stage.withdraw(shard)
        {
            effects.push(Effect::SetAside(*iteration, shard, what));
            self.members.progressed();
        }
    }

    /// Everybody drops what they hold; then the group forms anew.
    fn rewind(&mut self, effects: &mut Vec<Effect>) {
        if self.is_leaving {
            self.end(Outcome::Stopped, effects);
            return;
        }
        effects.push(Effect::Call(self.members.call()));
        effects.push(Effect::Rewind);
        self.is_grouped = false;
        self.state = State::Attaching { is_resumed: false };
    }

    /// What is on disk says where to go on.
    pub(super) fn rewound(&mut self, resume: Resume, effects: &mut Vec<Effect>) {
        let State::Attaching { is_resumed, .. } = &mut self.state else { return };
        *is_resumed = true;
        self.pairs = resume.pairs.clone();
        self.references = resume.references.clone();
        self.tokens = resume.tokens;
        self.watch = Watch::default();
        self.resume = resume;
        self.form(effects);
    }

    /// Goes on once all are here and it is known where.
    pub(super) fn form(&mut self, effects: &mut Vec<Effect>) {
        let is_ready = matches!(self.state, State::Attaching { is_resumed: true, .. });
        if !is_ready || !self.members.all_here() {
            return;
        }
        self.members.none_fresh();
        if self.shape.world_size == 1 {
            self.load(effects);
        } else {
            self.group(None, effects);
        }
    }

    /// Forms the process group; then goes on at `then`, or loads what is needed.
    pub(super) fn group(&mut self, then: Option<Position>, effects: &mut Vec<Effect>) {
        self.groups += 1;
        let open = Command::OpenGroup { number: self.groups, store: None };
        let stage = Stage::first(self.shape.world_size, open);
        self.state = State::Grouping { stage, then };
        self.advance(effects);
    }

    pub(super) fn stage(&self) -> Option<&Stage> {
        match &self.state {
            State::Grouping { stage, .. } | State::Loading(stage) => Some(stage),
            State::Working { phase, .. } => match phase {
                Phase::Sampling(stage)
                | Phase::Rating(Some(RatingPlan { stage, .. }))
                | Phase::Scoring(stage)
                | Phase::Training { stage, .. }
                | Phase::Saving { stage, .. }
                | Phase::Evaluating { stage, .. } => Some(stage),
                Phase::Rating(None) | Phase::Pairing | Phase::Publishing => None,
            },
            State::Attaching { .. } | State::Over => None,
        }
    }

    pub(super) fn stage_mut(&mut self) -> Option<&mut Stage> {
        match &mut self.state {
            State::Grouping { stage, .. } | State::Loading(stage) => Some(stage),
            State::Working { phase, .. } => match phase {
                Phase::Sampling(stage)
                | Phase::Rating(Some(RatingPlan { stage, .. }))
                | Phase::Scoring(stage)
                | Phase::Training { stage, .. }
                | Phase::Saving { stage, .. }
                | Phase::Evaluating { stage, .. } => Some(stage),
                Phase::Rating(None) | Phase::Pairing | Phase::Publishing => None,
            },
            State::Attaching { .. } | State::Over => None,
        }
    }
}
