//! What workers tell: taken if it belongs to the state, refused if not.

use super::{
    Command, Effect, Epoch, Machine, Now, Outcome, Phase, Position, Rank, RatingPlan, Report,
    Stage, State,
};
use crate::store::CommittedPhase;
use serde_json::json;

impl Machine {
    pub(super) fn told(&mut self, now: Now, rank: Rank, report: Report, effects: &mut Vec<Effect>) {
        if let Report::Failed(why) = &report {
            self.failed(now, rank, why, effects);
            return;
        }
        if report.is_final() && !self.stage_mut().is_some_and(|stage| stage.answered(rank)) {
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
            (State::Grouping { stage, .. }, Report::StoreListening(address)) => {
                let join = Command::OpenGroup { number: self.groups, store: Some(address) };
                stage.add_for_others(&join, rank);
            }
            (State::Grouping { .. } | State::Loading(_), Report::Done)
            // Somebody who took a lost worker's place has its weights.
            | (State::Grouping { .. } | State::Loading(_) | State::Working { .. }, Report::ModelReady { .. })
            | (State::Working { phase: Phase::Sampling(_), .. }, Report::SampleProgress { .. })
            | (State::Working { phase: Phase::Training { .. }, .. }, Report::Done) => {}
            (
                State::Working { iteration, phase: Phase::Sampling(_) },
                Report::ShardDone { shard, samples },
            ) => {
                self.members.progressed();
                effects.push(Effect::RecordShard(*iteration, shard, samples));
            }
            (
                State::Working { iteration, phase: Phase::Rating(Some(plan)) },
                Report::Rated { batch, ratings },
            ) => {
                let asked = usize::try_from(batch).ok().and_then(|at| plan.batches.get(at));
                if asked != Some(&ratings.len()) {
                    return Err("Rated, with another number of ratings than samples,");
                }
                self.members.progressed();
                effects.push(Effect::RecordRatings(*iteration, batch, ratings));
            }
            (
                State::Working { iteration, phase: Phase::Scoring(_) },
                Report::Scored { logps, .. },
            ) => {
                self.members.progressed();
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
            (_, Report::SnapshotWritten { step, files, seconds }) => {
                self.snapshot_written(rank, step, (files, seconds), effects);
            }
            (_, Report::SnapshotFailed { step, why }) => self.snapshot_failed(step, why, effects),
            _ => return Err(name),
        }
        Ok(())
    }

    /// Hands out what there is room for, and leaves a state whose work is done.
    pub(super) fn advance(&mut self, effects: &mut Vec<Effect>) {
        let (scoring, policy) = self.weights_now();
        let welcome = |stage: &Stage, rank: Rank| {
            let scores = stage.waits(rank, |command| matches!(command, Command::Score { .. }));
            Command::LoadModel(if scores { scoring } else { policy })
        };
        let members = &mut self.members;
        match &mut self.state {
            State::Grouping { stage, then } => {
                let then = *then;
                stage.dispatch(members, &welcome, effects);
                if stage.is_done() {
                    self.is_grouped = true;
                    match then {
                        Some(position) => self.go_on(position, effects),
                        None => self.load(effects),
                    }
                }
            }
            State::Loading(stage) => {
                stage.dispatch(members, &welcome, effects);
                if stage.is_done() {
                    self.is_proven = true;
                    self.go_on(self.resume.position, effects);
                }
            }
            State::Working { iteration, phase } => {
                let k = *iteration;
                match phase {
                    Phase::Sampling(stage) => {
                        stage.dispatch(members, &welcome, effects);
                        if stage.is_done() && stage.is_cut() {
                            self.end(Outcome::Stopped, effects);
                        } else if stage.is_done() {
                            self.sampled(k, effects);
                        }
                    }
                    Phase::Rating(Some(RatingPlan { stage, .. })) => {
                        stage.dispatch(members, &welcome, effects);
                        if stage.is_done() {
                            self.commit(k, CommittedPhase::Rated, None, json!({}), effects);
                            self.go_on(Position::Pairing(k), effects);
                        }
                    }
                    Phase::Scoring(stage) => {
                        stage.dispatch(members, &welcome, effects);
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
                        stage.dispatch(members, &welcome, effects);
                        // Cut short, it waits for its snapshot.
                        if stage.is_done() && !stage.is_cut() {
                            self.begin_saving(k, epoch, effects);
                        }
                    }
                    Phase::Saving { epoch, stage, files } => {
                        let epoch = *epoch;
                        stage.dispatch(members, &welcome, effects);
                        if stage.is_done() {
                            let files = std::mem::take(files);
                            self.saved(k, epoch, files, effects);
                        }
                    }
                    Phase::Evaluating { stage, .. } => {
                        stage.dispatch(members, &welcome, effects);
                        if stage.is_done() {
                            self.evaluated(effects);
                        }
                    }
                    Phase::Rating(None) | Phase::Pairing | Phase::Publishing => {}
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
        Report::Rated { .. } => "Rated",
        Report::Stepped(_) => "Stepped",
        Report::StateSaved(_) => "StateSaved",
        Report::SnapshotWritten { .. } => "SnapshotWritten",
        Report::SnapshotFailed { .. } => "SnapshotFailed",
        Report::ModelSaved(_) => "ModelSaved",
        Report::Failed(_) => "Failed",
    }
}
