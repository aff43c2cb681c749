//! What workers tell: taken if it belongs to the state, refused if not.

use super::{Command, Effect, Epoch, Machine, Outcome, Phase, Position, Rank, Report, State};
use crate::store::CommittedPhase;
use serde_json::json;

impl Machine {
    pub(super) fn told(&mut self, rank: Rank, report: Report, effects: &mut Vec<Effect>) {
        let is_final = report.is_final();
        let stage = match &mut self.state {
            State::Grouping(stage) | State::Loading(stage) => Some(stage),
            State::Working { phase, .. } => match phase {
                Phase::Sampling(stage)
                | Phase::Scoring(stage)
                | Phase::Training { stage, .. }
                | Phase::Saving { stage, .. }
                | Phase::Evaluating { stage, .. } => Some(stage),
                Phase::Pairing | Phase::Publishing => None,
            },
            State::Attaching { .. } | State::Over => None,
        };
        if let Report::Failed(message) = report {
            self.end(Outcome::Failed(format!("worker {rank}: {message}")), effects);
            return;
        }
        if is_final && !stage.is_some_and(|stage| stage.answered(rank)) {
            self.unexpected(rank, name_of(&report), effects);
            return;
        }
        if let Err(what) = self.take(rank, report, effects) {
            self.unexpected(rank, what, effects);
            return;
        }
        self.advance(effects);
    }

    /// Takes what a report carries; refuses one that does not belong to the state.
    pub(super) fn take(
        &mut self,
        rank: Rank,
        report: Report,
        effects: &mut Vec<Effect>,
    ) -> Result<(), &'static str> {
        let name = name_of(&report);
        match (&mut self.state, report) {
            (State::Grouping(stage), Report::StoreListening(address)) => {
                let join = Command::OpenGroup { store: Some(address) };
                stage.add_for_others(&join, rank);
            }
            (State::Grouping(_) | State::Loading(_), Report::Done)
            | (State::Loading(_), Report::ModelReady { .. })
            | (State::Working { phase: Phase::Scoring(_), .. }, Report::ModelReady { .. })
            | (State::Working { phase: Phase::Sampling(_), .. }, Report::SampleProgress { .. })
            | (State::Working { phase: Phase::Training { .. }, .. }, Report::Done) => {}
            (
                State::Working { iteration, phase: Phase::Sampling(_) },
                Report::ShardDone { shard, samples },
            ) => effects.push(Effect::RecordShard(*iteration, shard, samples)),
            (
                State::Working { iteration, phase: Phase::Scoring(_) },
                Report::Scored { logps, .. },
            ) => {
                self.references.extend(logps.iter().copied());
                effects.push(Effect::RecordReferences(*iteration, logps));
            }
            (
                State::Working { phase: Phase::Evaluating { policy, .. }, .. },
                Report::Scored { logps, .. },
            ) => policy.extend(logps),
            (
                State::Working { phase: Phase::Training { gathering, .. }, .. },
                Report::Stepped(outcomes),
            ) => {
                let step = outcomes.step;
                gathering.entry(step).or_default().insert(rank, outcomes);
                self.join_step(step, effects);
            }
            (
                State::Working { phase: Phase::Saving { files, .. }, .. },
                Report::StateSaved(written) | Report::ModelSaved(written),
            ) => files.extend(written),
            _ => return Err(name),
        }
        Ok(())
    }

    /// Hands out what there is room for, and leaves a state whose work is done.
    pub(super) fn advance(&mut self, effects: &mut Vec<Effect>) {
        match &mut self.state {
            State::Grouping(stage) => {
                stage.dispatch(effects);
                if stage.is_done() {
                    self.load(effects);
                }
            }
            State::Loading(stage) => {
                stage.dispatch(effects);
                if stage.is_done() {
                    self.go_on(self.resume.position, effects);
                }
            }
            State::Working { iteration, phase } => {
                let k = *iteration;
                match phase {
                    Phase::Sampling(stage) => {
                        stage.dispatch(effects);
                        if stage.is_done() {
                            self.commit(k, CommittedPhase::Sampled, None, json!({}), effects);
                            self.go_on(Position::Pairing(k), effects);
                        }
                    }
                    Phase::Scoring(stage) => {
                        stage.dispatch(effects);
                        if stage.is_done() {
                            // Another number of workers deals pairs out otherwise, and
                            // would not compute the very same numbers.
                            let detail = json!({ "workers": self.shape.world_size });
                            self.commit(k, CommittedPhase::Scored, None, detail, effects);
                            self.go_on(Position::Training(k, Epoch(0)), effects);
                        }
                    }
                    Phase::Training { epoch, stage, .. } => {
                        let epoch = *epoch;
                        stage.dispatch(effects);
                        if stage.is_done() {
                            self.begin_saving(k, epoch, effects);
                        }
                    }
                    Phase::Saving { epoch, stage, files } => {
                        let epoch = *epoch;
                        stage.dispatch(effects);
                        if stage.is_done() {
                            let files = std::mem::take(files);
                            self.saved(k, epoch, files, effects);
                        }
                    }
                    Phase::Evaluating { stage, .. } => {
                        stage.dispatch(effects);
                        if stage.is_done() {
                            self.evaluated(effects);
                        }
                    }
                    Phase::Pairing | Phase::Publishing => {}
                }
            }
            State::Attaching { .. } | State::Over => {}
        }
    }
}

fn name_of(report: &Report) -> &'static str {
    match report {
        Report::StoreListening(_) => "StoreListening",
        Report::Done => "Done",
        Report::ModelReady { .. } => "ModelReady",
        Report::SampleProgress { .. } => "SampleProgress",
        Report::ShardDone { .. } => "ShardDone",
        Report::Scored { .. } => "Scored",
        Report::Stepped(_) => "Stepped",
        Report::StateSaved(_) => "StateSaved",
        Report::ModelSaved(_) => "ModelSaved",
        Report::Failed(_) => "Failed",
    }
}
