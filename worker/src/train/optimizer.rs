//! RMSprop and AdamW on fp32 master weights, as `torch.optim` computes them.

use tch::{Kind, TchError, Tensor};

use super::memory::bytes;
use super::parameters::Buckets;
use super::sharding::{Partition, Segment};
use super::types::{Algorithm, OptimizerSettings};
use crate::kernels;

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
        for segment in self.partition.own(&buckets.list[bucket]) {
            let decays = segment.slot.tensor.dim() > 1;
            let rule = self.settings.algorithm.rule(self.steps + 1, clip, learning_rate, decays);
            let weight = segment.weight()?;
            let rounded = self.masters.as_ref().map(|_| &weight);
            let mut values = self.master(bucket, &segment)?;
            let gradient = segment.of(gradient)?;
            let mut moments = self.moments(bucket, &segment)?;
            if kernels::are_for(weight.kind(), weight.device()) {
                rule.apply_at_once(&gradient, &moments, &values, rounded)?;
            } else {
                rule.apply(&gradient, &mut moments, &mut values)?;
                if let Some(rounded) = rounded {
                    rounded.shallow_clone().f_copy_(&values)?;
                }
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
    /// Updates `moments` and `values` by `gradient`, each `[n]`, in the order in which
    /// `torch.optim` does it, constants first where it multiplies by one: `addcmul_` and
    /// `addcdiv_` take none here.
    fn apply(
        &self,
        gradient: &Tensor,
        moments: &mut [Tensor],
        values: &mut Tensor,
    ) -> Result<(), TchError> {
        let lr = self.learning_rate;
        match (self.algorithm, moments) {
            (Algorithm::RmsProp { alpha, epsilon }, [square_avg]) => {
                // v ← αv + (1−α)g², w ← w − lr · g / (√v + ε), with the clip in the constants
                let part = gradient.f_mul_scalar((1.0 - alpha) * self.clip * self.clip)?;
                let _ = square_avg.f_mul_scalar_(alpha)?.f_addcmul_(&part, gradient)?;
                let root = square_avg.f_sqrt_out(&part)?.f_add_scalar_(epsilon)?;
                let change = gradient.f_mul_scalar(-lr * self.clip)?;
                values.f_addcdiv_(&change, &root).map(drop)
            }
            (Algorithm::AdamW { beta1, beta2, epsilon, weight_decay }, [exp_avg, exp_avg_sq]) => {
                if self.decays {
                    let _ = values.f_mul_scalar_(1.0 - lr * weight_decay)?;
                }
                // m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²
                let gradient = gradient.f_mul_scalar(self.clip)?;
                let _ = exp_avg.f_lerp_(&gradient, 1.0 - beta1)?;
                let part = gradient.f_mul_scalar(1.0 - beta2)?;
                let _ = exp_avg_sq.f_mul_scalar_(beta2)?.f_addcmul_(&part, &gradient)?;
                // w ← w − lr · m̂ / (√v̂ + ε), with m̂ = m/(1−β₁ᵗ) and v̂ = v/(1−β₂ᵗ)
                let [m_unbias, v_unbias] = self.unbias(beta1, beta2);
                let root = exp_avg_sq.f_sqrt_out(&part)?.f_div_scalar_(v_unbias)?;
                let root = root.shallow_clone().f_add_scalar_(epsilon)?;
                let change = exp_avg.f_mul_scalar_out(&gradient, -lr / m_unbias)?;
                values.f_addcdiv_(&change, &root).map(drop)
            }
            (_, moments) => Err(self.wrong(moments)),
        }
    }

    /// The same by a kernel, which reads and writes each number once; what `values` become goes
    /// to `rounded` besides, if anywhere.
    fn apply_at_once(
        &self,
        gradient: &Tensor,
        moments: &[Tensor],
        values: &Tensor,
        rounded: Option<&Tensor>,
    ) -> Result<(), TchError> {
        let (lr, clip) = (self.learning_rate, self.clip);
        match (self.algorithm, moments) {
            (Algorithm::RmsProp { alpha, epsilon }, [square_avg]) => {
                let numbers = [alpha, (1.0 - alpha) * clip * clip, lr * clip, epsilon];
                kernels::rmsprop(gradient, square_avg, values, rounded, numbers)
            }
            (Algorithm::AdamW { beta1, beta2, epsilon, weight_decay }, [exp_avg, exp_avg_sq]) => {
                let keep = if self.decays { 1.0 - lr * weight_decay } else { 1.0 };
                let [m_unbias, v_unbias] = self.unbias(beta1, beta2);
                let numbers = [clip, beta1, beta2, keep, lr / m_unbias, v_unbias, epsilon];
                kernels::adamw(gradient, [exp_avg, exp_avg_sq], values, rounded, numbers)
            }
            (_, moments) => Err(self.wrong(moments)),
        }
    }

    /// By what AdamW's m and √v are divided: they begin at 0.
    fn unbias(&self, beta1: f64, beta2: f64) -> [f64; 2] {
        [1.0 - beta1.powf(self.step), (1.0 - beta2.powf(self.step)).sqrt()]
    }

    fn wrong(&self, moments: &[Tensor]) -> TchError {
        TchError::Kind(format!("{} moments for {:?}", moments.len(), self.algorithm))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::Device;

    use super::*;

    const GRADIENTS: [[f64; 3]; 4] =
        [[3.0, -0.5, 1e-4], [-1.0, -0.25, 2e-4], [0.5, 8.0, 0.0], [2.0, 0.125, -1e-4]];
    const CLIP: f64 = 0.5;
    const RATE: f64 = 0.1;

    /// The weights after each of the steps, by operations and by the kernel.
    fn runs(algorithm: Algorithm, decays: bool) -> [Vec<Vec<f64>>; 2] {
        let run = |at_once: bool| {
            let zeros = || Tensor::zeros([3], (Kind::Float, Device::Cpu));
            let mut moments: Vec<Tensor> = algorithm.moments().iter().map(|_| zeros()).collect();
            let mut values = Tensor::from_slice(&[1.0f32, 2.0, -3.0]);
            let rounded = values.to_kind(Kind::BFloat16);
            let steps = (1..).zip(GRADIENTS).map(|(step, gradient)| {
                let gradient = Tensor::from_slice(&gradient.map(|g| g as f32));
                let rule = algorithm.rule(step, CLIP, RATE, decays);
                if at_once {
                    rule.apply_at_once(&gradient, &moments, &values, Some(&rounded)).unwrap();
                    assert_eq!(rounded, values.to_kind(Kind::BFloat16));
                } else {
                    rule.apply(&gradient, &mut moments, &mut values).unwrap();
                }
                (0..3).map(|at| values.double_value(&[at])).collect()
            });
            steps.collect()
        };
        [run(false), run(true)]
    }

    /// Whole vectors, and what is behind them, on several threads: as by operations.
    #[test]
    fn the_kernel_reaches_every_weight() {
        tch::manual_seed(3);
        let random = || Tensor::randn([100_003], (Kind::Float, Device::Cpu));
        let rmsprop = Algorithm::RmsProp { alpha: 0.9, epsilon: 1e-4 };
        let adamw = Algorithm::AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-4, weight_decay: 0.1 };
        for algorithm in [rmsprop, adamw] {
            let rule = algorithm.rule(2, CLIP, RATE, true);
            let (gradient, mut values) = (random(), random());
            let mut moments: Vec<Tensor> =
                algorithm.moments().iter().map(|_| random().square()).collect();
            let by_kernel: Vec<Tensor> =
                moments.iter().chain([&values]).map(|x| x.copy()).collect();
            let (of_kernel, ours) = by_kernel.split_at(moments.len());
            rule.apply_at_once(&gradient, of_kernel, &ours[0], None).unwrap();
            rule.apply(&gradient, &mut moments, &mut values).unwrap();
            for (ours, theirs) in by_kernel.iter().zip(moments.iter().chain([&values])) {
                assert!(ours.allclose(theirs, 1e-5, 1e-6, false), "{algorithm:?}");
            }
        }
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
        for ours in runs(Algorithm::RmsProp { alpha, epsilon }, true) {
            assert_close(&ours, &expected);
        }
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
            for ours in runs(algorithm, decays) {
                assert_close(&ours, &expected);
            }
        }
    }
}
