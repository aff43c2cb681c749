//! The models at hand: the policy, what samples with its weights, and what rates beside it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tch::{Device, Kind};

use super::Command;
use crate::model::Decoder;
use crate::reward::RewardModel;
use crate::sample::Sampler;
use crate::train::Trainer;

/// All models that a worker holds.
pub(super) struct Models {
    device: Device,
    trainer: Option<Trainer>,
    /// Of the weights as they are: gone as soon as they change.
    sampler: Option<Sampler>,
    reward: Option<Reward>,
}

/// A reward model, and what it was loaded from.
struct Reward {
    directory: PathBuf,
    kind: Kind,
    model: RewardModel,
}

impl Models {
    pub(super) fn none(device: Device) -> Self {
        Self { device, trainer: None, sampler: None, reward: None }
    }

    /// Drops what `command` makes stale, and what it has no use for where memory is needed.
    pub(super) fn make_room_for(&mut self, command: &Command) {
        if !matches!(command, Command::Rate { .. }) {
            self.reward = None;
        }
        match command {
            // Two policies need not fit.
            Command::LoadModel { .. } => (self.trainer, self.sampler) = (None, None),
            // The weights change; or their cache makes room for the reward model.
            Command::BeginTraining(_) | Command::TrainStep(_) | Command::Rate { .. } => {
                self.sampler = None;
            }
            _ => {}
        }
    }

    /// Loads the policy; returns how many parameters it has.
    pub(super) fn load(&mut self, directory: &Path, kind: Kind) -> Result<u64> {
        let decoder = Decoder::load(directory, kind, self.device)?;
        let parameters = decoder
            .blocks
            .iter()
            .flat_map(|block| block.parameters())
            .chain(decoder.outer_parameters())
            .map(|parameter| parameter.tensor.numel() as u64)
            .sum();
        self.trainer = Some(Trainer::new(decoder));
        Ok(parameters)
    }

    pub(super) fn trainer(&mut self) -> Result<&mut Trainer> {
        self.trainer.as_mut().context("no model is loaded")
    }

    pub(super) fn sampler(&mut self) -> Result<&mut Sampler> {
        if self.sampler.is_none() {
            // Sampling begins an iteration: what trained the last one makes room for the cache.
            self.trainer()?.end();
            self.sampler = Some(Sampler::new(self.trainer()?.policy())?);
        }
        self.sampler.as_mut().context("no sampler")
    }

    /// The reward model in `directory`, which is loaded if another is at hand, or none.
    pub(super) fn reward(&mut self, directory: &Path, kind: Kind) -> Result<&RewardModel> {
        let is_it = |held: &Reward| held.directory == directory && held.kind == kind;
        if !self.reward.as_ref().is_some_and(is_it) {
            // The other goes first: two need not fit.
            self.reward = None;
            let model =
                RewardModel::load(directory, kind, self.device).context("load the reward model")?;
            self.reward = Some(Reward { directory: directory.to_owned(), kind, model });
        }
        Ok(&self.reward.as_ref().context("no reward model")?.model)
    }
}
