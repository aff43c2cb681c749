//! The MLP's gate: a = silu(g) ⊙ u.

use tch::{TchError, Tensor};

/// `gate_up` (`[rows, 2 · width]`, g and then u) → a, `[rows, width]`.
pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor, TchError> {
    let (gate, up) = halves(gate_up)?;
    gate.f_silu()?.f_mul_(&up)
}

/// As [`swiglu`], into `out`.
pub(crate) fn swiglu_into(gate_up: &Tensor, out: &Tensor) -> Result<(), TchError> {
    let (gate, up) = halves(gate_up)?;
    gate.f_silu()?.f_mul_out(out, &up).map(drop)
}

/// Overwrites `gate_up` with the gradient by it, given that by a, `gradient`; writes a
/// again to `activated`, both `[rows, width]`.
///
/// ```text
/// du = da ⊙ silu(g)        dg = da ⊙ u ⊙ silu'(g)
/// ```
pub(crate) fn swiglu_backward(
    gate_up: &Tensor,
    gradient: &Tensor,
    activated: &Tensor,
) -> Result<(), TchError> {
    let (gate, up) = halves(gate_up)?;
    let silu = gate.f_silu()?;
    let _ = silu.f_mul_out(activated, &up)?;
    let by_silu = gradient.f_mul(&up)?;
    let _ = silu.f_mul_out(&up, gradient)?;
    gate.f_silu_backward_grad_input(&gate, &by_silu).map(drop)
}

fn halves(gate_up: &Tensor) -> Result<(Tensor, Tensor), TchError> {
    let width = gate_up.size2()?.1 / 2;
    Ok((gate_up.f_narrow(1, 0, width)?, gate_up.f_narrow(1, width, width)?))
}
