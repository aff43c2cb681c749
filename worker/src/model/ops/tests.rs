//! Each backward against autograd.

use tch::{Device, Kind, Tensor};

use super::{Activation, Linear, NormScale, RmsNorm, pack};
use crate::kernels;

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Double, Device::Cpu))
}

/// Gradients of `(output · gradient).sum()` by `inputs`.
fn autograd(output: &Tensor, gradient: &Tensor, inputs: &[&Tensor]) -> Vec<Tensor> {
    Tensor::run_backward(&[(output * gradient).sum(Kind::Double)], inputs, true, false)
}

fn close(ours: &Tensor, theirs: &Tensor, bound: f64) {
    assert_eq!(ours.size(), theirs.size());
    let (ours, theirs) = (ours.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
    let difference = ((ours - &theirs).norm() / theirs.norm()).double_value(&[]);
    assert!(difference < bound, "{difference:.1e}");
}

/// Kinds of the kernels, and one that libtorch computes in.
const KINDS: [(Kind, f64); 3] = [(Kind::Float, 1e-6), (Kind::BFloat16, 1e-2), (Kind::Double, 1e-6)];

/// Widths of whole vectors, and with more behind them, or less.
const WIDTHS: [i64; 4] = [64, 70, 33, 8];

/// `x` with others' numbers beside each row.
fn apart(x: &Tensor) -> Tensor {
    let width = *x.size().last().unwrap();
    let wide = Tensor::cat(&[x, &x.ones_like()], -1);
    wide.narrow(-1, 0, width)
}

#[test]
fn a_norms_backward_is_its_derivative() {
    tch::manual_seed(1);
    for width in WIDTHS {
        let shape = [50, 3, width];
        let (x, weight, gradient) = (random(&shape), random(&[width]), random(&shape));
        let residual = random(&shape);
        let (x, weight) = (x.set_requires_grad(true), weight.set_requires_grad(true));
        for scale in [NormScale::Weight, NormScale::OnePlusWeight] {
            let factor = match scale {
                NormScale::Weight => weight.shallow_clone(),
                NormScale::OnePlusWeight => &weight + 1.0,
            };
            let y = x.rms_norm([width], Some(&factor), 1e-2);
            let theirs = autograd(&y, &gradient, &[&x, &weight]);

            for (kind, bound) in KINDS {
                let cast = |tensor: &Tensor| tensor.detach().to_kind(kind);
                let (x, weight, gradient) = (apart(&cast(&x)), cast(&weight), cast(&gradient));
                let norm = RmsNorm { weight: &weight, scale, eps: 1e-2 };
                let (output, again) = (x.empty_like(), apart(&x.zeros_like()));
                let by_x = apart(&x.zeros_like());
                let residual = cast(&residual);
                let more = [Some(&residual), Some(&output)];
                let by_weight = norm.backward(&x, &gradient, more, &by_x).unwrap();
                close(&by_x, &(&theirs[0] + residual.to_kind(Kind::Double)), bound);
                close(&by_weight, &theirs[1], bound);
                close(&output, &y.detach(), bound);
                norm.forward_into(&x, &again).unwrap();
                assert_eq!(norm.forward(&x).unwrap(), again);
                close(&again, &y.detach(), bound);

                // Over the gradient itself.
                let by_x = apart(&gradient);
                let _ = norm.backward(&x, &by_x, [None, None], &by_x).unwrap();
                close(&by_x, &theirs[0], bound);
            }
        }
    }
}

#[test]
fn a_gates_backward_is_its_derivative() {
    tch::manual_seed(2);
    for width in WIDTHS {
        // Far out, too, where exponentials overflow.
        let spread = Tensor::from_slice(&[1.0, 1.0, 10.0, 1.0, 200.0]).view([5, 1]);
        let gate_up = (random(&[5, 2 * width]) * spread).set_requires_grad(true);
        let gradient = random(&[5, width]);
        let parts = gate_up.chunk(2, 1);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let of_gate = match activation {
                Activation::Silu => parts[0].silu(),
                Activation::GeluTanh => parts[0].gelu("tanh"),
            };
            let activated = of_gate * &parts[1];
            let theirs = autograd(&activated, &gradient, &[&gate_up]);
            for (kind, bound) in KINDS {
                let ours = gate_up.detach().to_kind(kind).copy();
                close(&activation.gated(&ours).unwrap(), &activated.detach(), bound);
                let again = Tensor::empty([5, width], (kind, Device::Cpu));
                activation.gated_backward(&ours, &gradient.to_kind(kind), &again).unwrap();
                close(&ours, &theirs[0], bound);
                close(&again, &activated.detach(), bound);
            }
        }
    }
}

#[test]
fn a_linear_layers_backward_is_its_derivative() {
    tch::manual_seed(3);
    let (x, weight, bias) = (random(&[5, 8]), random(&[6, 8]), random(&[6]));
    let [x, weight, bias] = [x, weight, bias].map(|leaf| leaf.set_requires_grad(true));
    let gradient = random(&[5, 6]);
    let y = x.linear(&weight, Some(&bias));
    let theirs = autograd(&y, &gradient, &[&x, &weight, &bias]);

    let cast = |tensor: &Tensor| tensor.detach().to_kind(Kind::Float);
    let (x, weight, bias, gradient) = (cast(&x), cast(&weight), cast(&bias), cast(&gradient));
    let layer = Linear { weight: &weight, bias: Some(&bias) };
    close(&layer.forward(&x).unwrap(), &y.detach(), 1e-6);
    close(&layer.backward(&gradient).unwrap(), &theirs[0], 1e-6);
    close(&Linear::by_weight(&gradient, &x).unwrap(), &theirs[1], 1e-6);
    close(&Linear::by_bias(&gradient).unwrap(), &theirs[2], 1e-6);
}

#[test]
fn packed_weights_are_multiplied_as_others() {
    tch::manual_seed(4);
    for (kind, bound) in [(Kind::Float, 1e-6), (Kind::BFloat16, 1e-2)] {
        let cast = |shape: &[i64]| random(shape).to_kind(kind);
        // Outputs that come in whole panels, and some that do not; a panel in one piece, and in
        // several.
        for (outputs, inputs) in [(64, 24), (40, 24), (64, 600)] {
            let (weight, bias) = (cast(&[outputs, inputs]), cast(&[outputs]));
            let packed = pack(&weight).unwrap();
            assert_ne!(packed.is_mkldnn(), packed.dim() == 3, "packed in one way");
            for rows in [1, 3, 16, 17, 100] {
                let x = cast(&[rows, inputs]);
                for bias in [None, Some(&bias)] {
                    let ours = Linear { weight: &packed, bias }.forward(&x).unwrap();
                    let plain = Linear { weight: &weight, bias }.forward(&x).unwrap();
                    assert_eq!(ours.kind(), kind);
                    close(&ours, &plain, bound);
                }
            }
        }
    }
}

/// Guesses are right only if a row comes out the same with whatever it is computed together.
#[test]
fn a_row_by_a_laid_out_weight_does_not_depend_on_those_beside_it() {
    tch::manual_seed(5);
    for kind in [Kind::Float, Kind::BFloat16] {
        let weight = random(&[64, 600]).to_kind(kind);
        let panels = kernels::lay_out(&weight).unwrap().expect("64 outputs fill panels");
        assert_eq!(panels.kind(), kind, "in half the memory");
        let x = random(&[100, 600]).to_kind(Kind::Float);
        let together = kernels::multiply_laid_out(&x, &panels, None).unwrap();
        for (row, rows) in [(0, 1), (3, 2), (7, 7), (30, 16)] {
            let apart = kernels::multiply_laid_out(&x.narrow(0, row, rows), &panels, None).unwrap();
            assert_eq!(apart, together.narrow(0, row, rows));
        }
        close(&together, &x.to_kind(Kind::Double).matmul(&weight.to_kind(Kind::Double).tr()), 1e-6);
    }
}
