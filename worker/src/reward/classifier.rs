//! A decoder whose head is one score: transformers' `…ForSequenceClassification`.

use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use crate::model::{ConfigFile, Decoder, ModelConfig, ModelError, Purpose};
use crate::sample::last_states;

/// A decoder, and the score that its head gives the last token.
#[derive(Debug)]
pub(super) struct Classifier(Decoder);

impl Classifier {
    /// Loads the safetensors files in `dir`, whose configuration is `file`.
    pub(super) fn load(
        file: ConfigFile,
        dir: &Path,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let config = ModelConfig::of(file, Purpose::Rating)?;
        Ok(Self(Decoder::load_as(config, dir, kind, device)?))
    }

    pub(super) fn vocab_size(&self) -> i64 {
        self.0.config.vocab_size
    }

    /// The score of the last of `tokens` that is no padding, in fp32.
    pub(super) fn rate(&self, tokens: &[u32]) -> Result<Tensor, TchError> {
        let tokens = scored(tokens, self.0.config.pad_token_id);
        let score = self.0.head_weight().f_to_kind(Kind::Float)?;
        last_states(&self.0, &[tokens])?.f_linear(&score, None::<&Tensor>)
    }
}

/// `tokens` up to the one whose score counts. As in transformers, which looks for the padding
/// behind the tokens of a batch: a conversation that ends with the padding token is scored
/// ahead of it, and one that is nothing else at its first token.
fn scored(tokens: &[u32], padding: Option<i64>) -> &[u32] {
    let is_padding = |id: &u32| Some(i64::from(*id)) == padding;
    let last = tokens.iter().rposition(|id| !is_padding(id)).unwrap_or(0);
    &tokens[..=last]
}

#[cfg(test)]
mod tests {
    use super::scored;

    #[test]
    fn padding_behind_a_conversation_is_not_scored() {
        assert_eq!(scored(&[5, 0, 7], None), [5, 0, 7]);
        assert_eq!(scored(&[5, 0, 7], Some(0)), [5, 0, 7]);
        assert_eq!(scored(&[5, 0, 7, 0, 0], Some(0)), [5, 0, 7]);
        assert_eq!(scored(&[0, 0], Some(0)), [0]);
    }
}
