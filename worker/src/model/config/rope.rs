//! Rotary embeddings as `config.json` tells of them.

use std::path::Path;

use serde_json::{Map, Value};

use super::RawConfig;
use super::family::Architecture;
use crate::model::error::ModelError;

/// Base and scaling of the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Stretching of rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All are divided by `factor`.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths are divided by `factor`, short ones kept,
    /// those between interpolated.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context of the first pre-training, in tokens.
        original_max_position_embeddings: f64,
    },
}

/// Keys by which `rope_parameters` of transformers 5 nests sections in a Gemma-3 file.
const NESTED: [&str; 2] = ["full_attention", "sliding_attention"];

/// The rotary embedding of layers that see everything, and that of layers with a window
/// where it is another. From either spelling: `rope_theta` and `rope_scaling` of
/// transformers 4, or `rope_parameters` of transformers 5.
pub(super) fn parse(
    raw: &RawConfig,
    architecture: Architecture,
    path: &Path,
) -> Result<(RopeConfig, Option<RopeConfig>), ModelError> {
    let (name, section) = match (&raw.rope_parameters, &raw.rope_scaling) {
        (Some(new), Some(old)) if new != old => {
            let problem = "rope_parameters and rope_scaling disagree; keep one of them";
            return Err(ModelError::malformed(path, problem));
        }
        (Some(new), _) => ("rope_parameters", Some(new)),
        (None, old) => ("rope_scaling", old.as_ref()),
    };
    let empty = Map::new();
    let values = section.unwrap_or(&empty);
    let global = Outer { name: "rope_theta", theta: raw.rope_theta, default: architecture.theta() };
    if architecture != Architecture::Gemma3 {
        let section = Section { name: name.to_owned(), values, path };
        return Ok((section.config(&global)?, None));
    }
    let local = Outer {
        name: "rope_local_base_freq",
        theta: raw.rope_local_base_freq,
        default: Architecture::LOCAL_THETA,
    };
    if !values.keys().any(|key| NESTED.contains(&key.as_str())) {
        let section = Section { name: name.to_owned(), values, path };
        let unscaled = Section { name: local.name.to_owned(), values: &empty, path };
        return Ok((section.config(&global)?, Some(unscaled.config(&local)?)));
    }
    if let Some(stray) = values.keys().find(|key| !NESTED.contains(&key.as_str())) {
        let problem = format!("{name} has {stray} beside sections by layer type");
        return Err(ModelError::malformed(path, problem));
    }
    let nested = |key: &str| {
        let name = format!("{name}.{key}");
        match values.get(key) {
            Some(Value::Object(values)) => Ok(Section { name, values, path }),
            _ => Err(ModelError::malformed(path, format!("{name} is missing, or no section"))),
        }
    };
    let [full, sliding] = NESTED;
    Ok((nested(full)?.config(&global)?, Some(nested(sliding)?.config(&local)?)))
}

/// A base outside the section that describes the scaling.
struct Outer {
    name: &'static str,
    theta: Option<f64>,
    default: f64,
}

/// The part of `config.json` that describes the scaling.
struct Section<'a> {
    name: String,
    values: &'a Map<String, Value>,
    path: &'a Path,
}

impl Section<'_> {
    fn config(&self, outer: &Outer) -> Result<RopeConfig, ModelError> {
        let Self { name, values, path } = self;
        let theta = match (self.number("rope_theta")?, outer.theta) {
            (Some(inner), Some(theta)) if inner != theta => {
                let problem =
                    format!("{} is {theta}, but {name}.rope_theta is {inner}", outer.name);
                return Err(ModelError::malformed(path, problem));
            }
            (inner, theta) => inner.or(theta).unwrap_or(outer.default),
        };
        if !(theta.is_finite() && theta > 0.0) {
            let problem = format!("{} is {theta}, expected a positive number", outer.name);
            return Err(ModelError::malformed(path, problem));
        }
        if let Some(factor) = self.number("partial_rotary_factor")?
            && factor != 1.0
        {
            let field = format!("{name}.partial_rotary_factor");
            return Err(ModelError::unsupported(path, &field, factor, "1"));
        }

        let kind = values.get("rope_type").or_else(|| values.get("type"));
        let scaling = match kind.map(|k| (k, k.as_str())) {
            None | Some((_, Some("default"))) => RopeScaling::Default,
            Some((_, Some("linear"))) => {
                RopeScaling::Linear { factor: self.positive("factor", "linear")? }
            }
            Some((_, Some("llama3"))) => self.llama3()?,
            Some((other, _)) => {
                let field = format!("{name}.rope_type");
                let supported = "default, linear and llama3";
                return Err(ModelError::unsupported(path, &field, other, supported));
            }
        };
        // A scaling without its type would be dropped in silence otherwise, and
        // so would one that is nested by layer type.
        let plain = ["rope_theta", "partial_rotary_factor"];
        if let (None, Some(other)) =
            (kind, values.keys().find(|key| !plain.contains(&key.as_str())))
        {
            let problem = format!("{name} has {other} but no rope_type");
            return Err(ModelError::malformed(path, problem));
        }
        Ok(RopeConfig { theta, scaling })
    }

    fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        match self.values.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                let problem = format!("{}.{field} is {value}, expected a number", self.name);
                ModelError::malformed(self.path, problem)
            }),
        }
    }

    fn positive(&self, field: &str, kind: &str) -> Result<f64, ModelError> {
        match self.number(field)? {
            Some(value) if value > 0.0 => Ok(value),
            found => {
                let found = found.map_or("missing".to_owned(), |value| value.to_string());
                let problem = format!(
                    "{}.{field} is {found}, expected a positive number for rope_type {kind}",
                    self.name
                );
                Err(ModelError::malformed(self.path, problem))
            }
        }
    }

    fn llama3(&self) -> Result<RopeScaling, ModelError> {
        let positive = |field| self.positive(field, "llama3");
        let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
        if high <= low {
            let problem = format!(
                "{0}.high_freq_factor {high} is not above {0}.low_freq_factor {low}",
                self.name
            );
            return Err(ModelError::malformed(self.path, problem));
        }
        Ok(RopeScaling::Llama3 {
            factor: positive("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: positive("original_max_position_embeddings")?,
        })
    }
}
