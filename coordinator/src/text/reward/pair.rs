//! A question and an answer, as a model for pairs of texts reads them.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{Tokenizer, TruncationDirection, TruncationParams, TruncationStrategy};

use crate::domain::Message;
use crate::text::error::TextError;
use crate::text::files::read_json_if_present;
use crate::text::model::load_tokenizer;
use crate::text::special::SpecialTokens;

/// Tokenizer of pairs, once as it is and once cutting to length.
#[derive(Debug)]
pub(super) struct PairText {
    path: PathBuf,
    max_length: usize,
    whole: Tokenizer,
    cut: Tokenizer,
}

impl PairText {
    /// The tokenizer in `directory`; it cuts as with `transformers`' `truncation=True`.
    pub(super) fn load(directory: &Path, max_length: usize) -> Result<Self, TextError> {
        let path = directory.join("tokenizer.json");
        let whole = load_tokenizer(directory, &SpecialTokens::read(directory)?)?;
        let config = read_json_if_present(&directory.join("tokenizer_config.json"))?;
        let direction = match config.get("truncation_side").and_then(Value::as_str) {
            Some("left") => TruncationDirection::Left,
            _ => TruncationDirection::Right,
        };
        let strategy = TruncationStrategy::LongestFirst;
        let truncation = TruncationParams { direction, max_length, strategy, stride: 0 };
        let mut cut = whole.clone();
        cut.with_truncation(Some(truncation)).map_err(|error| TextError::Tokenizer {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        Ok(Self { path, max_length, whole, cut })
    }

    /// The turns of `context` as the question, as many of the last ones as fit, and `reply`.
    pub(super) fn sequence(&self, context: &[Message], reply: &str) -> Result<Vec<u32>, TextError> {
        let last = context.len().saturating_sub(1);
        for oldest in 0..last {
            let ids = self.encode(&self.whole, &context[oldest..], reply)?;
            if ids.len() <= self.max_length {
                return Ok(ids);
            }
        }
        self.encode(&self.cut, &context[last..], reply)
    }

    fn encode(
        &self,
        tokenizer: &Tokenizer,
        turns: &[Message],
        reply: &str,
    ) -> Result<Vec<u32>, TextError> {
        let texts: Vec<&str> = turns.iter().map(|turn| turn.content.as_str()).collect();
        let encoding = tokenizer.encode_fast((texts.join("\n\n"), reply), true);
        let encoding = encoding.map_err(|error| TextError::Encode {
            path: self.path.clone(),
            reason: error.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }
}
