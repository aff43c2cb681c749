//! RMSprop and AdamW on fp32 master weights, as `torch.optim` computes them.

use tch::{Device, Kind, TchError, Tensor};

use super::memory::bytes;
use super::parameters::Buckets;
use super::sharding::{Partition, Segment};
use super::types::{Algorithm, OptimizerSettings};

/// Elements updated at once on a CPU: gradient, state, master and two
/// temporaries then stay in cache, and each is read from memory once.
const CACHED_ELEMENTS: i64 = 1 << 16;

/// Masters and the optimiser's state of this rank's share: fp32, flat, in the
/// layout of the gradients' shares.
#[derive(Debug)]
pub(super) struct Optimizer {
    settings: OptimizerSettings,
    partition: Partition,
    /// Per bucket, in order: a buffer for each of the algorithm's moments.
    moments: Vec<Vec<Tensor>>,
    /// fp32 weights, per bucket; absent where the policy's own are fp32.
    masters: Option<Vec<Tensor>>,
    steps: u64,
}

impl Optimizer {
    /// Masters from the weights, and zero state.
    pub(super) fn new(
        buckets: &Buckets,
        settings: OptimizerSettings,
        partition: Partition,
    ) -> Result<Self, TchError> {
        let options = (Kind::Float, buckets.device());
        let zeros = |bucket| Tensor::f_zeros([partition.share_length(bucket)], options);
        let moments = buckets
            .list
            .iter()
            .map(|bucket| settings.algorithm.moments().iter().map(|_| zeros(bucket)).collect());
        let moments = moments.collect::<Result<_, TchError>>()?;
        let masters = match buckets.kind() {
            Kind::Float => None,
            _ => Some(buckets.list.iter().map(zeros).collect::<Result<Vec<_>, _>>()?),
        };
        for (bucket, masters) in buckets.list.iter().zip(masters.iter().flatten()) {
            for segment in partition.own(bucket) {
                segment.of(masters)?.f_copy_(&segment.weight()?)?;
            }
        }
        Ok(Self { settings, partition, moments, masters, steps: 0 })
    }

    /// Updates made.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// How gradients become updates.
    pub(super) fn algorithm(&self) -> Algorithm {
        self.settings.algorithm
    }

    /// Bytes of masters and of state.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let masters = self.masters.iter().flatten().map(bytes).sum();
        (masters, self.moments.iter().flatten().map(bytes).sum())
    }

    /// How much of a gradient of norm `norm` is kept, as `clip_grad_norm_` has it.
    pub(super) fn clip_factor(&self, norm: f64) -> f64 {
        match self.settings.max_grad_norm {
            0.0 => 1.0,
            bound => (bound / (norm + 1e-6)).min(1.0),
        }
    }

    /// The update in progress applied to this rank's share of a bucket: masters,
    /// state, and these elements of the policy's weights. `gradient` (`[share]`)
    /// counts `clip` times.
    pub(super) fn update(
        &mut self,
        buckets: &Buckets,
        bucket: usize,
        gradient: &Tensor,
        clip: f64,
        learning_rate: f64,
    ) -> Result<(), TchError> {
        let length = gradient.size1()?;
        let (piece, device) = match gradient.device() {
            Device::Cpu => (CACHED_ELEMENTS.min(length), Device::Cpu),
            device => (length, device),
        };
        let empty = || Tensor::f_empty([piece], (Kind::Float, device));
        let scratch = [empty()?, empty()?];
        for segment in self.partition.own(&buckets.list[bucket]) {
            let decays = segment.slot.tensor.dim() > 1;
            let rule = self.settings.algorithm.rule(self.steps + 1, clip, learning_rate, decays);
            let weight = segment.weight()?;
            let master = self.master(bucket, &segment)?;
            let gradient = segment.of(gradient)?;
            let moments = self.moments(bucket, &segment)?;
            let mut start = 0;
            while start < segment.length() {
                let count = piece.min(segment.length() - start);
                let part = |of: &Tensor| of.f_narrow(0, start, count);
                let mut values = part(&master)?;
                let mut state = moments.iter().map(part).collect::<Result<Vec<_>, _>>()?;
                let [a, b] = &scratch;
                let mut scratch = [a.f_narrow(0, 0, count)?, b.f_narrow(0, 0, count)?];
                rule.apply(&part(&gradient)?, &mut state, &mut values, &mut scratch)?;
                if self.masters.is_some() {
                    part(&weight)?.f_copy_(&values)?;
                }
                start += count;
            }
        }
        Ok(())
    }

    /// Declares the update in progress made, in all buckets.
    pub(super) fn advance(&mut self) {
        self.steps += 1;
    }

    /// The fp32 values of `segment`: its part of the master, or the weight itself.
    pub(super) fn master(&self, bucket: usize, segment: &Segment<'_>) -> Result<Tensor, TchError> {
        match &self.masters {
            Some(masters) => segment.of(&masters[bucket]),
            None => segment.weight(),
        }
    }

    /// The moments of `segment`, as [`Algorithm::moments`] names them.
    pub(super) fn moments(
        &self,
        bucket: usize,
        segment: &Segment<'_>,
    ) -> Result<Vec<Tensor>, TchError> {
        self.moments[bucket].iter().map(|moment| segment.of(moment)).collect()
    }

    /// Goes on after `steps` updates from masters and state that were written
    /// from outside: this rank's part of the weights becomes the masters', rounded.
    pub(super) fn resume(&mut self, buckets: &Buckets, steps: u64) -> Result<(), TchError> {
        self.steps = steps;
        for (bucket, masters) in buckets.list.iter().zip(self.masters.iter().flatten()) {
            for segment in self.partition.own(bucket) {
                segment.weight()?.f_copy_(&segment.of(masters)?)?;
            }
        }
        Ok(())
    }
}

/// One step's update of some weights, with its numbers worked out.
#[derive(Debug, Clone, Copy)]
struct Rule {
    algorithm: Algorithm,
    /// Counts from 1.
    step: f64,
    clip: f64,
    learning_rate: f64,
    /// Whether weight decay is for these weights.
    decays: bool,
}

impl Algorithm {
    /// The running means that it keeps, as `torch.optim` calls them.
    pub(super) fn moments(&self) -> &'static [&'static str] {
        match self {
            Self::RmsProp { .. } => &["square_avg"],
            Self::AdamW { .. } => &["exp_avg", "exp_avg_sq"],
        }
    }

    fn rule(self, step: u64, clip: f64, learning_rate: f64, decays: bool) -> Rule {
        Rule { algorithm: self, step: step as f64, clip, learning_rate, decays }
    }
}

impl Rule {
    /// Updates `moments` and `weight` by `gradient`, each `[n]`, as `scratch` is.
    /// All arithmetic is in place and in the order in which `torch.optim` does
    /// it, constants first where it multiplies by one: `addcmul_` and `addcdiv_`
    /// take none here.
    fn apply(
        &self,
        gradient: &Tensor,
        moments: &mut [Tensor],
        weight: &mut Tensor,
        scratch: &mut [Tensor; 2],
    ) -> Result<(), TchError> {
        let [a, b] = scratch;
        let lr = self.learning_rate;
        match (self.algorithm, moments) {
            (Algorithm::RmsProp { alpha, epsilon }, [square_avg]) => {
                // v ← αv + (1−α)g², w ← w − lr · g / (√v + ε), with the clip in the constants
                let _ = gradient.f_mul_scalar_out(b, (1.0 - alpha) * self.clip * self.clip)?;
                let _ = square_avg.f_mul_scalar_(alpha)?.f_addcmul_(b, gradient)?;
                let _ = square_avg.f_sqrt_out(b)?.f_add_scalar_(epsilon)?;
                let change = gradient.f_mul_scalar_out(a, -lr * self.clip)?;
                weight.f_addcdiv_(&change, b).map(drop)
            }
            (Algorithm::AdamW { beta1, beta2, epsilon, weight_decay }, [exp_avg, exp_avg_sq]) => {
                if self.decays {
                    let _ = weight.f_mul_scalar_(1.0 - lr * weight_decay)?;
                }
                // m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²
                let gradient = self.clipped(gradient, a)?;
                let _ = exp_avg.f_lerp_(&gradient, 1.0 - beta1)?;
                let _ = gradient.f_mul_scalar_out(b, 1.0 - beta2)?;
                let _ = exp_avg_sq.f_mul_scalar_(beta2)?.f_addcmul_(b, &gradient)?;
                // w ← w − lr · m̂ / (√v̂ + ε), with m̂ = m/(1−β₁ᵗ) and v̂ = v/(1−β₂ᵗ)
                let root = exp_avg_sq.f_sqrt_out(b)?;
                let _ = root
                    .shallow_clone()
                    .f_div_scalar_((1.0 - beta2.powf(self.step)).sqrt())?
                    .f_add_scalar_(epsilon)?;
                let change = exp_avg.f_mul_scalar_out(a, -lr / (1.0 - beta1.powf(self.step)))?;
                weight.f_addcdiv_(&change, b).map(drop)
            }
            (_, moments) => {
                Err(TchError::Kind(format!("{} moments for {:?}", moments.len(), self.algorithm)))
            }
        }
    }

    /// `gradient` itself, or its clipped copy in `scratch`.
    fn clipped(&self, gradient: &Tensor, scratch: &Tensor) -> Result<Tensor, TchError> {
        if self.clip < 1.0 {
            gradient.f_mul_scalar_out(scratch, self.clip)
        } else {
            Ok(gradient.shallow_clone())
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GRADIENTS: [[f64; 3]; 4] =
        [[3.0, -0.5, 1e-4], [-1.0, -0.25, 2e-4], [0.5, 8.0, 0.0], [2.0, 0.125, -1e-4]];
    const CLIP: f64 = 0.5;
    const RATE: f64 = 0.1;

    /// The weights after each of the steps.
    fn run(algorithm: Algorithm, decays: bool) -> Vec<Vec<f64>> {
        let zeros = || Tensor::zeros([3], (Kind::Float, Device::Cpu));
        let mut moments: Vec<Tensor> = algorithm.moments().iter().map(|_| zeros()).collect();
        let mut weight = Tensor::from_slice(&[1.0f32, 2.0, -3.0]);
        let steps = (1..).zip(GRADIENTS).map(|(step, gradient)| {
            let gradient = Tensor::from_slice(&gradient.map(|g| g as f32));
            let rule = algorithm.rule(step, CLIP, RATE, decays);
            rule.apply(&gradient, &mut moments, &mut weight, &mut [zeros(), zeros()]).unwrap();
            (0..3).map(|at| weight.double_value(&[at])).collect()
        });
        steps.collect()
    }

    fn assert_close(ours: &[Vec<f64>], expected: &[Vec<f64>]) {
        for (ours, expected) in ours.iter().flatten().zip(expected.iter().flatten()) {
            assert!((ours / expected - 1.0).abs() < 2e-6, "{ours} {expected}");
        }
    }

    #[test]
    fn rmsprop_is_its_formula() {
        let (alpha, epsilon) = (0.9, 1e-2);
        let (mut v, mut w) = ([0.0f64; 3], [1.0, 2.0, -3.0]);
        let expected: Vec<Vec<f64>> = GRADIENTS
            .map(|gradient| {
                for at in 0..3 {
                    let g = gradient[at] * CLIP;
                    v[at] = alpha * v[at] + (1.0 - alpha) * g * g;
                    w[at] -= RATE * g / (v[at].sqrt() + epsilon);
                }
                w.to_vec()
            })
            .to_vec();
        assert_close(&run(Algorithm::RmsProp { alpha, epsilon }, true), &expected);
    }

    #[test]
    fn adamw_is_its_formula_and_spares_norms_and_biases() {
        let (beta1, beta2, epsilon, weight_decay) = (0.9, 0.95, 1e-3, 0.2);
        let algorithm = Algorithm::AdamW { beta1, beta2, epsilon, weight_decay };
        for (decays, decay) in [(true, weight_decay), (false, 0.0)] {
            let (mut m, mut v, mut w) = ([0.0f64; 3], [0.0f64; 3], [1.0, 2.0, -3.0]);
            let mut expected = Vec::new();
            for (step, gradient) in (1..).zip(GRADIENTS) {
                for at in 0..3 {
                    let g = gradient[at] * CLIP;
                    m[at] = beta1 * m[at] + (1.0 - beta1) * g;
                    v[at] = beta2 * v[at] + (1.0 - beta2) * g * g;
                    let m_hat = m[at] / (1.0 - beta1.powi(step));
                    let v_hat = v[at] / (1.0 - beta2.powi(step));
                    w[at] -= RATE * decay * w[at];
                    w[at] -= RATE * m_hat / (v_hat.sqrt() + epsilon);
                }
                expected.push(w.to_vec());
            }
            assert_close(&run(algorithm, decays), &expected);
        }
    }
}
