//! Reward models: one number for a whole conversation; higher is better.
//!
//! | file | models |
//! |---|---|
//! | `deberta.rs` | the encoder DeBERTa-v3 with a classifier of one label |
//! | `classifier.rs` | any decoder of `model/` whose head is one score |
//!
//! Sequences are computed one by one: a rating is a function of the model and its own
//! sequence to the last bit, whatever else is rated with it.

mod classifier;
mod deberta;

use std::ops::ControlFlow;
use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use crate::host;
use crate::model::{ConfigFile, ModelError, Purpose, check_tokens, classes, product_kind};
use classifier::Classifier;
use deberta::Deberta;

/// A model that rates sequences of its own token ids.
#[derive(Debug)]
pub struct RewardModel(Kinds);

#[derive(Debug)]
enum Kinds {
    Deberta(Deberta),
    Classifier(Classifier),
}

/// Why there are no ratings.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    /// The observer asked to stop.
    #[error("stopped before all was rated")]
    Stopped,
    /// Something was asked for that cannot be rated.
    #[error("{0}")]
    Invalid(String),
    /// The model gave what is no number.
    #[error("sequence {0} has a rating that is not finite: the reward model's weights are damaged")]
    NotFinite(usize),
    /// libtorch refused: out of memory, as a rule.
    #[error(transparent)]
    Torch(#[from] TchError),
}

impl RewardModel {
    /// Loads `config.json` and the safetensors files in `dir` on `device`, as `kind`, or
    /// widened where the device has no products of it.
    ///
    /// Every tensor is checked against the configuration before the first is read. Errors
    /// name the file and what is wrong in it.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let file = ConfigFile::read(dir)?;
        let kind = product_kind(kind, device);
        let mut supported = classes(Purpose::Rating);
        Ok(Self(match file.class() {
            Some(deberta::CLASS) => Kinds::Deberta(Deberta::load(file, dir, kind, device)?),
            Some(class) if supported.contains(&class) => {
                Kinds::Classifier(Classifier::load(file, dir, kind, device)?)
            }
            _ => {
                supported.insert(0, deberta::CLASS);
                return Err(file.unsupported_class(&supported));
            }
        }))
    }

    /// The rating of each sequence, in order.
    ///
    /// `observe` is called after every sequence with the number of those that are rated; when
    /// it breaks, this ends as [`RewardError::Stopped`].
    ///
    /// # Errors
    /// Sequences without tokens, with ids outside the vocabulary, or longer than an encoder
    /// was made for; a rating that is no number; libtorch's.
    pub fn rate(
        &self,
        sequences: &[Vec<u32>],
        observe: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<f64>, RewardError> {
        for (at, tokens) in sequences.iter().enumerate() {
            self.check(at, tokens).map_err(RewardError::Invalid)?;
        }
        let mut ratings = Vec::with_capacity(sequences.len());
        for (at, tokens) in sequences.iter().enumerate() {
            let rating = host::read_one(&tch::no_grad(|| self.forward(tokens))?)?;
            if !rating.is_finite() {
                return Err(RewardError::NotFinite(at));
            }
            ratings.push(rating);
            if observe(ratings.len()).is_break() {
                return Err(RewardError::Stopped);
            }
        }
        Ok(ratings)
    }

    fn check(&self, at: usize, tokens: &[u32]) -> Result<(), String> {
        let (vocab_size, longest) = match &self.0 {
            Kinds::Deberta(model) => (model.vocab_size(), Some(model.longest())),
            // Rotary positions go on beyond what the model was made for.
            Kinds::Classifier(model) => (model.vocab_size(), None),
        };
        check_tokens(vocab_size, &format_args!("sequence {at}"), tokens)?;
        match longest {
            Some(longest) if tokens.len() as i64 > longest => Err(format!(
                "sequence {at} has {} tokens, but the reward model's max_position_embeddings is \
                 {longest}: cut it to that",
                tokens.len()
            )),
            _ => Ok(()),
        }
    }

    /// The rating of `tokens`: one element.
    fn forward(&self, tokens: &[u32]) -> Result<Tensor, TchError> {
        match &self.0 {
            Kinds::Deberta(model) => model.rate(tokens),
            Kinds::Classifier(model) => model.rate(tokens),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
