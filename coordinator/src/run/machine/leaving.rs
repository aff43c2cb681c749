//! A stop in good time: the run ends as soon as nothing is lost by it.
//!
//! In training that is behind a snapshot of the steps in hand, in sampling behind the
//! shards in hand, and elsewhere behind the phase's commit. Who cannot wait for that
//! stops at once, with [`super::Event::StopRequested`], and computes again what no
//! snapshot holds.

use super::{Effect, Machine, Outcome, Phase, State};

impl Machine {
    /// Takes no more up, and ends once what is in hand is on disk.
    pub(super) fn leave(&mut self, effects: &mut Vec<Effect>) {
        if std::mem::replace(&mut self.is_leaving, true) {
            return;
        }
        match &mut self.state {
            // Nothing is in hand yet, or again.
            State::Attaching { .. } | State::Grouping { .. } | State::Loading(_) => {
                self.end(Outcome::Stopped, effects);
            }
            State::Working { phase: Phase::Sampling(stage), .. } => {
                stage.withhold_shared();
                self.advance(effects);
            }
            State::Working { phase: Phase::Training { .. }, .. } => {
                self.save_if_due(effects);
                self.advance(effects);
            }
            State::Working { .. } | State::Over => {}
        }
    }
}
