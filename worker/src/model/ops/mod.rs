//! The decoder's operations, each forward with its backward beside it.
//!
//! Derivatives are written out rather than left to autograd: a block then keeps
//! exactly what its backward needs, and elementwise work can go through a few
//! rows at a time while they are in cache.

mod linear;
mod norm;
mod product;
mod swiglu;

pub(crate) use linear::Linear;
pub(crate) use norm::{NormGradients, RmsNorm};
pub use product::product_kind;
pub(crate) use product::{multiply, operand, operands};
pub(crate) use swiglu::{swiglu, swiglu_backward, swiglu_into};

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
