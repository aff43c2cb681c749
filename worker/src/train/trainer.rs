//! The engine: scoring, and the training step.

use std::ops::Range;

use tch::Tensor;

use super::error::TrainError;
use super::gradients::Gradients;
use super::head::RowScores;
use super::memory::{MemoryReport, bytes};
use super::objective::Share;
use super::optimizer::Optimizer;
use super::outcomes::{evaluate, pair_logps};
use super::packing::{Packed, Purpose, check};
use super::parameters::Buckets;
use super::pass::{Pass, Sink};
use super::sharding::Partition;
use super::trace::{Trace, Tracer};
use super::types::{
    MicroBatch, PairLogps, Recompute, ReductionTimes, StepReport, TrainStep, TrainingSettings,
};
use super::weights::WeightGather;
use crate::collective::ProcessGroup;
use crate::model::Decoder;

/// A policy, and what it takes to train it.
#[derive(Debug)]
pub struct Trainer {
    policy: Decoder,
    training: Option<Training>,
    tracer: Tracer,
}

/// What exists from the beginning of an iteration to its end.
#[derive(Debug)]
pub(super) struct Training {
    settings: TrainingSettings,
    /// This process's rank, whether or not it owns a share.
    pub(super) rank: u32,
    /// How many there are.
    pub(super) ranks: u32,
    pub(super) partition: Partition,
    pub(super) buckets: Buckets,
    pub(super) optimizer: Optimizer,
    /// The last step's buffers, for the next. Absent after a step that ended
    /// early: a reduction of the old group may still be writing to them.
    gradients: Option<Gradients>,
    /// How much of the last step's gradient counted.
    clip: Option<f64>,
    weights: WeightGather,
    tracer: Tracer,
}

impl Trainer {
    /// An engine around `policy`.
    pub fn new(policy: Decoder) -> Self {
        Self { policy, training: None, tracer: Tracer::default() }
    }

    /// The policy with its current weights.
    pub fn policy(&self) -> &Decoder {
        &self.policy
    }

    /// Starts an iteration: fp32 masters from the weights, optimiser state zero,
    /// and step 0 next. `group` is the one that [`Self::step`] will be given;
    /// under [`Sharding::Zero2`](super::Sharding::Zero2) it says which share is
    /// this rank's, and without sharding who saves the state.
    ///
    /// # Errors
    /// [`TrainError::Torch`], as a rule for want of memory.
    pub fn begin(
        &mut self,
        settings: TrainingSettings,
        group: Option<&ProcessGroup>,
    ) -> Result<(), TrainError> {
        // The old buffers go before the new ones come.
        self.training = None;
        let buckets = Buckets::new(&self.policy);
        let partition = Partition::new(&settings.engine, group, &buckets);
        self.training = Some(Training {
            settings,
            rank: group.map_or(0, ProcessGroup::rank),
            ranks: group.map_or(1, ProcessGroup::world_size),
            partition,
            optimizer: Optimizer::new(&buckets, settings.optimizer, partition)?,
            gradients: Some(Gradients::new(&buckets, partition, &settings.engine, &self.tracer)?),
            clip: None,
            weights: WeightGather::new(partition, &self.tracer),
            tracer: self.tracer.clone(),
            buckets,
        });
        let MemoryReport { weights, gradients, masters, optimizer_state, .. } = self.memory()?;
        tracing::info!(
            sharding = ?settings.engine.sharding,
            shares = partition.ranks(),
            weights,
            gradients,
            masters,
            optimizer_state,
            "bytes held for training"
        );
        Ok(())
    }

    /// Drops all that training holds but the weights: whoever trains again begins anew.
    pub fn end(&mut self) {
        self.training = None;
    }

    /// What training holds on this rank.
    ///
    /// # Errors
    /// [`TrainError::NotBegun`].
    pub fn memory(&self) -> Result<MemoryReport, TrainError> {
        let Training { buckets, optimizer, gradients, weights, .. } = self.training()?;
        let (masters, optimizer_state) = optimizer.bytes();
        let (gradients, reducing) = gradients.as_ref().map_or((0, 0), Gradients::bytes);
        Ok(MemoryReport {
            weights: buckets.slots().map(|(_, slot)| bytes(&slot.tensor)).sum(),
            gradients,
            masters,
            optimizer_state,
            buffers: reducing + weights.bytes(),
        })
    }

    /// Begins or ends recording what steps do and when.
    pub fn record_trace(&mut self, on: bool) {
        self.tracer.record(on);
    }

    /// Takes what was recorded since it was last taken.
    pub fn take_trace(&mut self) -> Trace {
        self.tracer.take()
    }

    /// Log-probabilities of both replies of each pair, in the order given. A pair whose
    /// `rejected` is empty is one reply, and what there is none of has the sum 0.
    ///
    /// The computation is training's own forward: in the same micro-batches as
    /// [`Self::step`], the same weights give the same bits.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] when `stop` says so; errors of the pairs.
    pub fn score(
        &self,
        batches: &[MicroBatch],
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<PairLogps>, TrainError> {
        check(batches, self.policy.config.vocab_size, Purpose::Scoring)?;
        let mut logps = Vec::new();
        for batch in batches {
            let packed = pack(&self.policy, batch)?;
            let scores = Pass {
                policy: &self.policy,
                packed: &packed,
                recompute: Recompute::None,
                tracer: &self.tracer,
                stop,
            }
            .score()?;
            logps.extend(pair_logps(&batch.pairs, &scores));
        }
        Ok(logps)
    }

    /// One optimiser step over `group`'s ranks, each with its share of the pairs;
    /// without a group, over this process alone.
    ///
    /// All ranks of a group call this together, those without pairs too. After
    /// an error the group is out of step and must be dropped. After one in the
    /// update itself weights may have changed, and training is no longer begun.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] when `stop` says so; errors of the pairs, of the
    /// order of steps, of the group.
    pub fn step(
        &mut self,
        step: &TrainStep,
        group: Option<&ProcessGroup>,
        stop: &dyn Fn() -> bool,
    ) -> Result<StepReport, TrainError> {
        let training = self.training.as_mut().ok_or(TrainError::NotBegun)?;
        training.check(step, group, self.policy.config.vocab_size)?;

        let TrainingSettings { objective, engine, .. } = training.settings;
        let share = Share::of(step);
        let mut gradients = training.take_gradients()?;
        let (mut pairs, mut tokens) = (Vec::new(), 0);
        let buckets = &training.buckets;
        let mut sink = Sink { buckets, gradients: &mut gradients, last: false, group, stop };
        for (index, batch) in step.micro_batches.iter().enumerate() {
            // In its backward each bucket is complete, and its reduction starts.
            sink.last = index + 1 == step.micro_batches.len();
            let packed = pack(&self.policy, batch)?;
            let pass = Pass {
                policy: &self.policy,
                packed: &packed,
                recompute: engine.recompute,
                tracer: &self.tracer,
                stop,
            };
            let evaluate = |some: Range<usize>, scores: &RowScores| {
                let (outcomes, coefficients) =
                    evaluate(&objective, &share, &batch.pairs[some], scores)?;
                pairs.extend(outcomes);
                Ok(coefficients)
            };
            pass.train(index, evaluate, &mut sink)?;
            tokens += packed.tokens as u64;
        }
        if step.micro_batches.is_empty() {
            sink.last = true;
            sink.complete_without_pairs()?;
        }
        gradients.wait(stop)?;

        let grad_norm = gradients.norm(group, stop)?;
        if !grad_norm.is_finite() {
            return Err(TrainError::NotFinite { step: step.step, norm: grad_norm });
        }
        let update = training.update(&gradients, grad_norm, step.learning_rate, group, stop);
        if let Err(error) = update {
            // Some weights are of this step and some of the last.
            self.training = None;
            return Err(error);
        }
        let reduction = add(gradients.times(), training.weights.times());
        training.gradients = Some(gradients);
        Ok(StepReport { grad_norm, pairs, tokens, reduction })
    }

    /// The last step's mean gradient over all ranks, as the optimiser saw it:
    /// clipped, in fp32, under the names that checkpoints give the weights.
    /// Where nothing was clipped they are views, which the next step overwrites.
    ///
    /// # Errors
    /// [`TrainError::NotBegun`]; [`TrainError::NoGradients`] without a step
    /// before; [`TrainError::Sharded`] where other ranks hold parts of it.
    pub fn gradients(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let Training { buckets, partition, gradients, clip, .. } = self.training()?;
        if partition.is_sharded() {
            return Err(TrainError::Sharded);
        }
        let (Some(gradients), Some(clip)) = (gradients, *clip) else {
            return Err(TrainError::NoGradients);
        };
        let mut named = Vec::new();
        for (bucket, slot) in buckets.slots() {
            let gradient = slot.of(gradients.share(bucket)?)?;
            let counted = if clip < 1.0 { gradient.f_mul_scalar(clip)? } else { gradient };
            named.extend(slot.named(&counted)?);
        }
        Ok(named)
    }

    pub(super) fn training(&self) -> Result<&Training, TrainError> {
        self.training.as_ref().ok_or(TrainError::NotBegun)
    }

    pub(super) fn training_mut(&mut self) -> Result<&mut Training, TrainError> {
        self.training.as_mut().ok_or(TrainError::NotBegun)
    }
}

impl Training {
    /// What must hold before anything is computed.
    fn check(
        &self,
        step: &TrainStep,
        group: Option<&ProcessGroup>,
        vocabulary: i64,
    ) -> Result<(), TrainError> {
        let expected = self.optimizer.steps();
        if step.step != expected {
            return Err(TrainError::OutOfOrder { given: step.step, expected });
        }
        if Partition::new(&self.settings.engine, group, &self.buckets) != self.partition {
            let given = group.map_or((0, 1), |group| (group.rank(), group.world_size()));
            let begun = (self.partition.rank(), self.partition.ranks());
            return Err(TrainError::OtherGroup { given, begun });
        }
        check_share(step, vocabulary)
    }

    /// Buffers for a step; they are given back only by one that ends well.
    fn take_gradients(&mut self) -> Result<Gradients, TrainError> {
        self.clip = None;
        match self.gradients.take() {
            Some(gradients) => Ok(gradients),
            None => {
                let engine = &self.settings.engine;
                Ok(Gradients::new(&self.buckets, self.partition, engine, &self.tracer)?)
            }
        }
    }

    /// Moves the weights by the gradients, whose norm is `norm`: each rank those
    /// that it owns, and they go to the others while it updates the next.
    fn update(
        &mut self,
        gradients: &Gradients,
        norm: f64,
        learning_rate: f64,
        group: Option<&ProcessGroup>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainError> {
        let Self { buckets, optimizer, weights, tracer, .. } = self;
        let clip = optimizer.clip_factor(norm);
        // The embedding first: the largest bucket's gather then has the most to hide behind.
        for bucket in (0..buckets.list.len()).rev() {
            let _update = tracer.span(|| format!("update bucket {bucket}"));
            optimizer.update(buckets, bucket, gradients.share(bucket)?, clip, learning_rate)?;
            weights.start(buckets, bucket, group, stop)?;
        }
        weights.wait(buckets, stop)?;
        optimizer.advance();
        self.clip = Some(clip);
        Ok(())
    }
}

/// Gradients are reduced before weights are gathered: their times do not overlap.
fn add(first: ReductionTimes, second: ReductionTimes) -> ReductionTimes {
    ReductionTimes { busy: first.busy + second.busy, exposed: first.exposed + second.exposed }
}

fn pack(policy: &Decoder, batch: &MicroBatch) -> Result<Packed, TrainError> {
    Ok(Packed::new(batch, policy.window(), policy.kind(), policy.device())?)
}

fn check_share(step: &TrainStep, vocabulary: i64) -> Result<(), TrainError> {
    let TrainStep { step: number, global_pairs, ref micro_batches, .. } = *step;
    let pairs = micro_batches.iter().map(|batch| batch.pairs.len()).sum();
    if global_pairs == 0 || pairs > global_pairs as usize {
        return Err(TrainError::GlobalPairs { step: number, pairs, global_pairs });
    }
    check(micro_batches, vocabulary, Purpose::Training)
}
