//! The MLP's gate: a = φ(g) ⊙ u.

use tch::{TchError, Tensor};

use crate::kernels;

/// φ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// g σ(g): with it the gate is SwiGLU.
    Silu,
    /// GELU by its approximation with tanh, `gelu_pytorch_tanh`: GeGLU.
    GeluTanh,
}

/// What libtorch calls the approximation.
const TANH: &str = "tanh";

impl Activation {
    /// By the name that `config.json` has for it.
    pub(in crate::model) fn named(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu_pytorch_tanh" => Some(Self::GeluTanh),
            _ => None,
        }
    }

    /// `gate_up` (`[rows, 2 · width]`, g and then u) → a, `[rows, width]`.
    pub(crate) fn gated(self, gate_up: &Tensor) -> Result<Tensor, TchError> {
        let (rows, width) = gate_up.size2()?;
        if kernels::are_for(gate_up.kind(), gate_up.device()) {
            let out = Tensor::f_empty([rows, width / 2], (gate_up.kind(), gate_up.device()))?;
            kernels::gated(gate_up, self == Self::GeluTanh, &out)?;
            return Ok(out);
        }
        let (gate, up) = halves(gate_up)?;
        self.apply(&gate)?.f_mul_(&up)
    }

    /// Overwrites `gate_up` with the gradient by it, given that by a, `gradient`; writes a
    /// again to `activated`, both `[rows, width]`.
    ///
    /// ```text
    /// du = da ⊙ φ(g)        dg = da ⊙ u ⊙ φ'(g)
    /// ```
    pub(crate) fn gated_backward(
        self,
        gate_up: &Tensor,
        gradient: &Tensor,
        activated: &Tensor,
    ) -> Result<(), TchError> {
        if kernels::are_for(gate_up.kind(), gate_up.device()) {
            return kernels::gated_backward(gate_up, gradient, self == Self::GeluTanh, activated);
        }
        let (gate, up) = halves(gate_up)?;
        let of_gate = self.apply(&gate)?;
        let _ = of_gate.f_mul_out(activated, &up)?;
        let by_activation = gradient.f_mul(&up)?;
        let _ = of_gate.f_mul_out(&up, gradient)?;
        match self {
            Self::Silu => gate.f_silu_backward_grad_input(&gate, &by_activation).map(drop),
            Self::GeluTanh => {
                gate.f_gelu_backward_grad_input(&gate, &by_activation, TANH).map(drop)
            }
        }
    }

    fn apply(self, gate: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Self::Silu => gate.f_silu(),
            Self::GeluTanh => gate.f_gelu(TANH),
        }
    }
}

fn halves(gate_up: &Tensor) -> Result<(Tensor, Tensor), TchError> {
    let width = gate_up.size2()?.1 / 2;
    Ok((gate_up.f_narrow(1, 0, width)?, gate_up.f_narrow(1, width, width)?))
}
