//! Rotary position embeddings: frequencies, and rotations by them.

use std::f64::consts::PI;

use tch::{Device, Kind, TchError, Tensor};

use super::config::{RopeConfig, RopeScaling};
use crate::kernels;

/// Rotation of each token's queries and keys.
#[derive(Debug)]
pub struct Rotary {
    /// `[tokens, head_dim]`: cos θ, both halves alike.
    pub cos: Tensor,
    /// `[tokens, head_dim]`: −sin θ, then sin θ. With the sign of
    /// "rotate half" in here, rotating is `x * cos + swap_halves(x) * sin`.
    pub sin: Tensor,
}

/// The rotations of one pass: layers with a window may have their own.
#[derive(Debug)]
pub struct Rotations {
    pub(super) global: Rotary,
    pub(super) local: Option<Rotary>,
}

impl Rotations {
    /// Those of layers with a window, or of layers without.
    pub(crate) fn of(&self, windowed: bool) -> &Rotary {
        self.local.as_ref().filter(|_| windowed).unwrap_or(&self.global)
    }
}

impl RopeConfig {
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
            RopeScaling::Linear { factor } => plain.f_div_scalar(factor)?,
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
        #[expect(clippy::disallowed_methods, reason = "once, as the model is loaded")]
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

    /// Rotates `x` (`[tokens, heads, head_dim]`) in place.
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<(), TchError> {
        if kernels::are_for(x.kind(), x.device()) {
            return kernels::rotate(x, &self.cos, &self.sin);
        }
        let half = self.cos.size2()?.1 / 2;
        let swapped = x.f_roll([half], [-1])?.f_mul_(&self.sin.f_unsqueeze(1)?)?;
        let _ = x.shallow_clone().f_mul_(&self.cos.f_unsqueeze(1)?)?.f_add_(&swapped)?;
        Ok(())
    }

    /// The rotations back. A rotation's transpose is its inverse, so this is also
    /// how gradients go back through [`Self::rotate`].
    pub(crate) fn inverse(&self) -> Result<Self, TchError> {
        Ok(Self { cos: self.cos.shallow_clone(), sin: self.sin.f_neg()? })
    }
}
