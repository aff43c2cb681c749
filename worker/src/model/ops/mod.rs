//! The decoder's operations, each forward with its backward beside it.
//!
//! Derivatives are written out rather than left to autograd: a block then keeps
//! exactly what its backward needs, and elementwise work can go through a few
//! rows at a time while they are in cache.

mod gated;
mod linear;
mod mask;
mod norm;
mod packed;
mod product;

pub use gated::Activation;
pub(crate) use linear::Linear;
pub(crate) use mask::{aligned, causal_mask};
pub use norm::NormScale;
pub(crate) use norm::RmsNorm;
pub(crate) use packed::pack;
pub use product::product_kind;
pub(crate) use product::{multiply, operand, operands};

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
