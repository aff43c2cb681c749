//! Rotary position embeddings, types "default" and "llama3".

use std::f64::consts::PI;
use std::path::Path;

use serde_json::{Map, Value};
use tch::{Device, Kind, TchError, Tensor};

use super::config::RawConfig;
use super::error::ModelError;

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

/// Rotation of each token's queries and keys.
#[derive(Debug)]
pub struct Rotary {
    /// `[tokens, head_dim]`: cos θ, both halves alike.
    pub cos: Tensor,
    /// `[tokens, head_dim]`: −sin θ, then sin θ. With the sign of
    /// "rotate half" in here, rotating is `x * cos + swap_halves(x) * sin`.
    pub sin: Tensor,
}

impl RopeConfig {
    /// From either spelling: `rope_theta` and `rope_scaling` of transformers 4,
    /// or `rope_parameters` of transformers 5.
    pub(super) fn parse(raw: &RawConfig, path: &Path) -> Result<Self, ModelError> {
        let (name, section) = match (&raw.rope_parameters, &raw.rope_scaling) {
            (Some(new), Some(old)) if new != old => {
                let problem = "rope_parameters and rope_scaling disagree; keep one of them";
                return Err(ModelError::malformed(path, problem));
            }
            (Some(new), _) => ("rope_parameters", Some(new)),
            (None, old) => ("rope_scaling", old.as_ref()),
        };
        let empty = Map::new();
        let section = Section { name, values: section.unwrap_or(&empty), path };

        let theta = match (section.number("rope_theta")?, raw.rope_theta) {
            (Some(inner), Some(outer)) if inner != outer => {
                let problem = format!("rope_theta is {outer}, but {name}.rope_theta is {inner}");
                return Err(ModelError::malformed(path, problem));
            }
            (inner, outer) => inner.or(outer).unwrap_or(10_000.0),
        };
        if !(theta.is_finite() && theta > 0.0) {
            let problem = format!("rope_theta is {theta}, expected a positive number");
            return Err(ModelError::malformed(path, problem));
        }
        if let Some(factor) = section.number("partial_rotary_factor")?
            && factor != 1.0
        {
            let field = format!("{name}.partial_rotary_factor");
            return Err(ModelError::unsupported(path, &field, factor, "1"));
        }

        let kind = section.values.get("rope_type").or_else(|| section.values.get("type"));
        let scaling = match kind.map(|k| (k, k.as_str())) {
            None | Some((_, Some("default"))) => RopeScaling::Default,
            Some((_, Some("llama3"))) => section.llama3()?,
            Some((other, _)) => {
                let field = format!("{name}.rope_type");
                return Err(ModelError::unsupported(path, &field, other, "default and llama3"));
            }
        };
        // A scaling without its type would be dropped in silence otherwise, and
        // so would one that is nested by layer type.
        let plain = ["rope_theta", "partial_rotary_factor"];
        if let (None, Some(other)) =
            (kind, section.values.keys().find(|key| !plain.contains(&key.as_str())))
        {
            let problem = format!("{name} has {other} but no rope_type");
            return Err(ModelError::malformed(path, problem));
        }
        Ok(Self { theta, scaling })
    }

    /// Inverse frequencies `[head_dim / 2]` in fp32, by the same tensor
    /// operations in the same order as transformers' `modeling_rope_utils`,
    /// so that not even the last bit differs.
    pub(super) fn inverse_frequencies(
        &self,
        head_dim: i64,
        device: Device,
    ) -> Result<Tensor, TchError> {
        let exponents = Tensor::f_arange_start_step(0, head_dim, 2, (Kind::Int64, Device::Cpu))?
            .f_to_kind(Kind::Float)?
            .f_div_scalar(head_dim as f64)?;
        let plain = Tensor::f_pow_scalar(self.theta, &exponents)?.f_reciprocal()?;
        let frequencies = match self.scaling {
            RopeScaling::Default => plain,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: context,
            } => {
                let wavelength = plain.f_reciprocal()?.f_mul_scalar(2.0 * PI)?;
                let long = wavelength.f_gt(context / low_freq_factor)?;
                let short = wavelength.f_lt(context / high_freq_factor)?;
                let stretched = plain.f_div_scalar(factor)?.f_where_self(&long, &plain)?;
                let smooth = wavelength
                    .f_reciprocal()?
                    .f_mul_scalar(context)?
                    .f_sub_scalar(low_freq_factor)?
                    .f_div_scalar(high_freq_factor - low_freq_factor)?;
                let keep = smooth.f_neg()?.f_add_scalar(1.0)?;
                let blended = keep
                    .f_mul(&stretched)?
                    .f_div_scalar(factor)?
                    .f_add(&smooth.f_mul(&stretched)?)?;
                let medium = long.f_logical_or(&short)?.f_logical_not()?;
                blended.f_where_self(&medium, &stretched)?
            }
        };
        frequencies.f_to_device(device)
    }
}

impl Rotary {
    /// Angles for `positions` (`[tokens]`, i64) in fp32, cast to `kind` at the end.
    pub(super) fn new(
        inverse_frequencies: &Tensor,
        positions: &Tensor,
        kind: Kind,
    ) -> Result<Self, TchError> {
        let angles =
            positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_mul(inverse_frequencies)?;
        let cos = angles.f_cos()?;
        let sin = angles.f_sin()?;
        Ok(Self {
            cos: Tensor::f_cat(&[&cos, &cos], -1)?.f_to_kind(kind)?,
            sin: Tensor::f_cat(&[&sin.f_neg()?, &sin], -1)?.f_to_kind(kind)?,
        })
    }

    /// Rotates `x` (`[tokens, heads, head_dim]`).
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let half = self.cos.size2()?.1 / 2;
        let swapped = x.f_roll([half], [-1])?;
        let straight = x.f_mul(&self.cos.f_unsqueeze(1)?)?;
        straight.f_add(&swapped.f_mul(&self.sin.f_unsqueeze(1)?)?)
    }

    /// The rotations of `length` tokens from `start`.
    pub(crate) fn narrow(&self, start: i64, length: i64) -> Result<Self, TchError> {
        Ok(Self {
            cos: self.cos.f_narrow(0, start, length)?,
            sin: self.sin.f_narrow(0, start, length)?,
        })
    }

    /// The rotations back. A rotation's transpose is its inverse, so this is also
    /// how gradients go back through [`Self::rotate`].
    pub(crate) fn inverse(&self) -> Result<Self, TchError> {
        Ok(Self { cos: self.cos.shallow_clone(), sin: self.sin.f_neg()? })
    }
}

/// The part of `config.json` that describes the scaling.
struct Section<'a> {
    name: &'a str,
    values: &'a Map<String, Value>,
    path: &'a Path,
}

impl Section<'_> {
    fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        match self.values.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                let problem = format!("{}.{field} is {value}, expected a number", self.name);
                ModelError::malformed(self.path, problem)
            }),
        }
    }

    fn positive(&self, field: &str) -> Result<f64, ModelError> {
        match self.number(field)? {
            Some(value) if value > 0.0 => Ok(value),
            found => {
                let found = found.map_or("missing".to_owned(), |value| value.to_string());
                let problem = format!(
                    "{}.{field} is {found}, expected a positive number for rope_type llama3",
                    self.name
                );
                Err(ModelError::malformed(self.path, problem))
            }
        }
    }

    fn llama3(&self) -> Result<RopeScaling, ModelError> {
        let (low, high) = (self.positive("low_freq_factor")?, self.positive("high_freq_factor")?);
        if high <= low {
            let problem = format!(
                "{0}.high_freq_factor {high} is not above {0}.low_freq_factor {low}",
                self.name
            );
            return Err(ModelError::malformed(self.path, problem));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.positive("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: self.positive("original_max_position_embeddings")?,
        })
    }
}
