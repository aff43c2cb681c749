//! Which blocks see a window of tokens, and how long it is.

use std::path::Path;

use super::family::Architecture;
use super::{RawConfig, size};
use crate::model::error::ModelError;

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// Of each block how many tokens a query sees, itself included; none where all before it.
pub(super) fn parse(
    raw: &RawConfig,
    architecture: Architecture,
    path: &Path,
) -> Result<Vec<Option<i64>>, ModelError> {
    let layers = super::layers(raw.num_hidden_layers, path)?;
    let by_family = slides(raw, architecture, path)?;
    let slides: Vec<bool> = match &raw.layer_types {
        Some(types) => by_type(types, layers, path)?,
        None => (0..layers).map(&by_family).collect(),
    };
    // Where transformers looks at something else, a file must not say otherwise.
    let fixed = matches!(architecture, Architecture::Llama | Architecture::Mistral);
    if fixed && let Some(&stray) = slides.iter().find(|&&slides| slides != by_family(0)) {
        let [found, supported] = [stray, !stray].map(|slides| if slides { SLIDING } else { FULL });
        let supported = format!("{supported} in every layer of a {architecture:?}");
        return Err(ModelError::unsupported(path, "layer_types", found, &supported));
    }
    if !slides.contains(&true) {
        return Ok(vec![None; slides.len()]);
    }
    let Some(window) = raw.sliding_window else {
        let problem = "sliding_window is missing, but there are layers of sliding_attention";
        return Err(ModelError::malformed(path, problem));
    };
    let window = size("sliding_window", window, path)?;
    let off = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3)
        && raw.use_sliding_window != Some(true);
    if off {
        let problem = "layer_types has sliding_attention, but use_sliding_window is not true";
        return Err(ModelError::malformed(path, problem));
    }
    Ok(slides.into_iter().map(|slides| slides.then_some(window)).collect())
}

/// Whether a block has a window, where no `layer_types` tells.
fn slides(
    raw: &RawConfig,
    architecture: Architecture,
    path: &Path,
) -> Result<impl Fn(i64) -> bool, ModelError> {
    let pattern = size("sliding_window_pattern", raw.sliding_window_pattern.unwrap_or(1), path)?;
    let there = raw.sliding_window.is_some();
    let switched_on = there && raw.use_sliding_window == Some(true);
    let first = raw.max_window_layers.unwrap_or(28);
    Ok(move |layer: i64| match architecture {
        Architecture::Llama => false,
        Architecture::Mistral => there,
        Architecture::Qwen2 | Architecture::Qwen3 => switched_on && layer >= first,
        Architecture::Gemma3 => (layer + 1) % pattern != 0,
    })
}

fn by_type(types: &[String], layers: i64, path: &Path) -> Result<Vec<bool>, ModelError> {
    if types.len() as i64 != layers {
        let problem = format!("layer_types has {} entries for {layers} layers", types.len());
        return Err(ModelError::malformed(path, problem));
    }
    let slides = |kind: &String| match kind.as_str() {
        FULL => Ok(false),
        SLIDING => Ok(true),
        other => {
            let supported = format!("{FULL} and {SLIDING}");
            Err(ModelError::unsupported(path, "layer_types", other, &supported))
        }
    };
    types.iter().map(slides).collect()
}
