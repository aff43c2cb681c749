//! DeBERTa-v3's `config.json`, read strictly.

use serde::Deserialize;
use serde_json::Value;

use crate::model::{
    ConfigFile, ModelError, check_one_label, layers, refuse_quantized, size, typed,
};

/// The encoder's shape and constants, checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DebertaConfig {
    /// Rows of the embedding.
    pub(super) vocab_size: i64,
    /// Width of the residual stream.
    pub(super) hidden_size: i64,
    /// Width of the feed-forward layers.
    pub(super) intermediate_size: i64,
    /// Number of layers.
    pub(super) num_hidden_layers: i64,
    /// Heads of a layer; divides `hidden_size`.
    pub(super) num_attention_heads: i64,
    /// Tokens that a sequence has at most.
    pub(super) max_position_embeddings: i64,
    /// ε under LayerNorm's root.
    pub(super) layer_norm_eps: f64,
    /// How distances between tokens come in.
    pub(super) positions: Positions,
}

/// How distances between tokens come into attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Positions {
    /// Distances from here on are one.
    pub(super) farthest: i64,
    /// How many kinds of distances there are each way; none where each is one of its own.
    pub(super) buckets: Option<i64>,
    /// Whether a query looks at the distance to a key.
    pub(super) content_to_position: bool,
    /// Whether a key is looked at from the distance to the query.
    pub(super) position_to_content: bool,
    /// Whether the embeddings of distances are normed.
    pub(super) normed: bool,
}

impl Positions {
    /// Rows of the embedding of distances each way.
    pub(super) fn span(&self) -> i64 {
        self.buckets.unwrap_or(self.farthest)
    }
}

/// The entries of `config.json` that change what is computed.
#[derive(Deserialize)]
struct RawConfig {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    attention_head_size: Option<i64>,
    embedding_size: Option<i64>,
    pooler_hidden_size: Option<i64>,
    max_position_embeddings: Option<i64>,
    type_vocab_size: Option<i64>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    pooler_hidden_act: Option<String>,
    relative_attention: Option<bool>,
    max_relative_positions: Option<i64>,
    position_buckets: Option<i64>,
    position_biased_input: Option<bool>,
    pos_att_type: Option<Names>,
    share_att_key: Option<bool>,
    norm_rel_ebd: Option<String>,
    conv_kernel_size: Option<i64>,
    quantization_config: Option<Value>,
}

/// Names as a list, or in one string with bars between them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    List(Vec<String>),
    Barred(String),
}

impl Names {
    fn list(self) -> Vec<String> {
        match self {
            Self::List(names) => names,
            Self::Barred(names) => barred(&names),
        }
    }
}

fn barred(names: &str) -> Vec<String> {
    names.split('|').map(|name| name.trim().to_lowercase()).collect()
}

impl DebertaConfig {
    /// Checks what `file` says of a `DebertaV2ForSequenceClassification`.
    ///
    /// Errors name the file, the field, what it holds and what is supported.
    pub(super) fn of(file: ConfigFile) -> Result<Self, ModelError> {
        file.check_type("deberta-v2", super::CLASS)?;
        check_one_label(&file)?;
        let ConfigFile { path, entries } = file;
        let raw: RawConfig = typed(entries, &path)?;
        let malformed = |problem: String| ModelError::malformed(&path, problem);
        let unsupported = |field: &str, found: &dyn ToString, supported: &str| {
            Err(ModelError::unsupported(&path, field, found.to_string(), supported))
        };

        refuse_quantized(raw.quantization_config.as_ref(), &path)?;
        // What is absent is as transformers has it for an absent entry, which is not always
        // what DeBERTa-v3 has.
        for (field, found, supported) in [
            ("relative_attention", raw.relative_attention.unwrap_or(false), true),
            ("position_biased_input", raw.position_biased_input.unwrap_or(true), false),
            ("share_att_key", raw.share_att_key.unwrap_or(false), true),
        ] {
            if found != supported {
                return unsupported(field, &found, &format!("{supported}, as DeBERTa-v3 has it"));
            }
        }
        for (field, found) in [
            ("type_vocab_size", raw.type_vocab_size.unwrap_or(0)),
            ("conv_kernel_size", raw.conv_kernel_size.unwrap_or(0)),
        ] {
            if found > 0 {
                return unsupported(field, &found, "0, as DeBERTa-v3 has it");
            }
        }
        for (field, found) in
            [("hidden_act", &raw.hidden_act), ("pooler_hidden_act", &raw.pooler_hidden_act)]
        {
            if let Some(found) = found.as_deref().filter(|name| *name != "gelu") {
                return unsupported(field, &found, "gelu");
            }
        }

        let size = |field: &str, value: i64| size(field, value, &path);
        let hidden_size = size("hidden_size", raw.hidden_size)?;
        let heads = size("num_attention_heads", raw.num_attention_heads)?;
        if hidden_size % heads != 0 {
            return Err(malformed(format!(
                "hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
            )));
        }
        for (field, found, expected, what) in [
            ("attention_head_size", raw.attention_head_size, hidden_size / heads, "of a head"),
            ("embedding_size", raw.embedding_size, hidden_size, "hidden_size"),
            ("pooler_hidden_size", raw.pooler_hidden_size, hidden_size, "hidden_size"),
        ] {
            if let Some(found) = found.filter(|&found| found != expected) {
                return unsupported(field, &found, &format!("{expected}, the size {what}"));
            }
        }
        let layer_norm_eps = raw.layer_norm_eps.unwrap_or(1e-7);
        if !(layer_norm_eps.is_finite() && layer_norm_eps >= 0.0) {
            return Err(malformed(format!(
                "layer_norm_eps is {layer_norm_eps}, expected a number from 0"
            )));
        }
        let longest = size("max_position_embeddings", raw.max_position_embeddings.unwrap_or(512))?;
        let farthest = match raw.max_relative_positions {
            Some(farthest) if farthest > 0 => size("max_relative_positions", farthest)?,
            _ => longest,
        };
        let buckets = raw.position_buckets.filter(|&buckets| buckets > 0);
        // Near distances have half of the buckets, and the others share what is beyond.
        if let Some(buckets) = buckets.filter(|buckets| *buckets < 2 || farthest - 1 <= buckets / 2)
        {
            return Err(malformed(format!(
                "position_buckets is {buckets}, expected 2 to under {}: twice the farthest \
                 distance, which is {farthest}",
                2 * (farthest - 1)
            )));
        }
        let ways = raw.pos_att_type.map(Names::list).unwrap_or_default();
        if ways.is_empty() || ways.iter().any(|way| way != "c2p" && way != "p2c") {
            let found = if ways.is_empty() { "missing".to_owned() } else { ways.join("|") };
            return unsupported("pos_att_type", &found, "c2p, p2c and both");
        }
        let norms = barred(raw.norm_rel_ebd.as_deref().unwrap_or("none"));
        if let Some(norm) = norms.iter().find(|norm| *norm != "layer_norm" && *norm != "none") {
            return unsupported("norm_rel_ebd", norm, "layer_norm and none");
        }
        let has = |names: &[String], name: &str| names.iter().any(|one| one == name);
        Ok(Self {
            vocab_size: size("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: size("intermediate_size", raw.intermediate_size)?,
            num_hidden_layers: layers(raw.num_hidden_layers, &path)?,
            num_attention_heads: heads,
            max_position_embeddings: longest,
            layer_norm_eps,
            positions: Positions {
                farthest,
                buckets,
                content_to_position: has(&ways, "c2p"),
                position_to_content: has(&ways, "p2c"),
                normed: has(&norms, "layer_norm"),
            },
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
