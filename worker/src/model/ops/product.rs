//! Matrix products, in a kind that the device has instructions for.
//!
//! Weights and activations are kept in bf16. A processor that cannot multiply bf16 is
//! given it by libtorch an element at a time, at a tenth of its fp32 rate: there operands
//! are widened, multiplied in fp32, and products rounded once at the end. That is what
//! bf16 instructions compute too: exact products, summed in fp32.

use std::sync::LazyLock;

use tch::{Device, Kind, TchError, Tensor};

use super::packed;

/// Whether this processor multiplies bf16.
static NATIVE_BF16: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("bf16");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
});

/// In what kind matrices of `kind` are multiplied on `device`.
pub fn product_kind(kind: Kind, device: Device) -> Kind {
    match (kind, device) {
        (Kind::BFloat16, Device::Cpu) if !*NATIVE_BF16 => Kind::Float,
        _ => kind,
    }
}

/// `x` as the operand of a product: itself, or widened.
pub(crate) fn operand(x: &Tensor) -> Result<Tensor, TchError> {
    x.f_to_kind(product_kind(x.kind(), x.device()))
}

/// `x` (`[rows, in]`) times `weight`ᵀ (`[out, in]`, packed or not), plus `bias` (`[out]`), in the
/// kind of a product: `[rows, out]`.
pub(crate) fn multiply(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    let (x, bias) = (operand(x)?, bias.map(operand).transpose()?);
    match packed::multiply(&x, weight, bias.as_ref())? {
        Some(product) => Ok(product),
        None => x.f_linear(&operand(weight)?, bias.as_ref()),
    }
}

/// Operands, as many as there are.
pub(crate) fn operands<const N: usize>(all: [&Tensor; N]) -> Result<[Tensor; N], TchError> {
    let mut widened = all.map(Tensor::shallow_clone);
    for x in &mut widened {
        *x = operand(x)?;
    }
    Ok(widened)
}
