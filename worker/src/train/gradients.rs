//! The step's gradients: accumulated in fp32, one flat buffer per bucket, and
//! summed over ranks while backward goes on.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use tch::{Device, Kind, TchError, Tensor};

use super::error::TrainError;
use super::memory::{Buffer, Pool, bytes};
use super::parameters::{Bucket, Buckets, Place};
use super::sharding::Partition;
use super::trace::{Exchanges, Tracer};
use super::types::{EngineSettings, ReduceKind, ReductionTimes};
use crate::collective::{ProcessGroup, Work};
use crate::host;

/// Elements whose squares are summed in fp32 before fp64 takes over. libtorch adds
/// them up in a few running sums, so a longer run costs the norm its digits: that
/// of SmolLM2's embedding comes out 4.5e-5 short in one run, 1.6e-5 in runs of
/// 2^20, 3e-7 in runs of 2^14, at the same cost.
const NORM_ELEMENTS: i64 = 1 << 14;

/// Gradient buffers, one per bucket, and the reductions under way.
///
/// A bucket goes from open (gradients are added) through started (its sum over
/// ranks is under way) to reduced; no bucket is touched while started.
///
/// Without sharding each bucket has a whole buffer of its own, summed in place.
/// Under sharding a bucket takes a whole buffer from the pool when its first
/// gradient comes, and gives it back when its share has been summed: with one
/// micro-batch in a step, shares and a few buffers are all there is. Several
/// micro-batches add up in whole buffers until the last. To reduce after each of
/// them would save that memory, at the cost of as many exchanges, in which ranks
/// with fewer micro-batches would have to join.
///
/// Results do not depend on when a reduction is found to have ended: sums are in
/// the order of ranks, and the norm's in the order of buckets.
#[derive(Debug)]
pub(super) struct Gradients {
    partition: Partition,
    kind: ReduceKind,
    device: Device,
    buckets: Vec<Accumulator>,
    under_way: VecDeque<Reduction>,
    pool: Pool,
    exchanges: Exchanges,
}

/// One bucket's gradient.
#[derive(Debug)]
struct Accumulator {
    /// `[padded]`, fp32: what this rank has added. Under sharding, only while open.
    whole: Option<Buffer>,
    /// `[share]`, fp32: the sum over ranks. Without sharding it is `whole`.
    share: Option<Tensor>,
    /// Whether `whole` holds this step's numbers yet, per slot.
    written: Vec<bool>,
    /// Sum of the share's squares, `[1]`, fp64, once it is there.
    squares: Option<Tensor>,
}

/// A piece's sum over ranks, under way.
#[derive(Debug)]
struct Reduction {
    bucket: usize,
    /// Whether it is its bucket's last.
    last: bool,
    work: Work,
    /// Where the sum is, if not where it is needed: rounded.
    rounded: Option<Tensor>,
    /// Buffers that are free when it has ended.
    pooled: Vec<Buffer>,
    /// Elements on their way.
    elements: i64,
}

impl Gradients {
    /// Buffers for `buckets`, of which this rank keeps what `partition` says.
    pub(super) fn new(
        buckets: &Buckets,
        partition: Partition,
        settings: &EngineSettings,
        tracer: &Tracer,
    ) -> Result<Self, TchError> {
        let device = buckets.device();
        let accumulator = |bucket: &Bucket| {
            let empty = |length| Tensor::f_empty([length], (Kind::Float, device));
            let (whole, share) = if partition.is_sharded() {
                (None, Some(empty(partition.share_length(bucket))?))
            } else {
                (Some(Buffer::of(empty(partition.padded(bucket))?)), None)
            };
            let written = vec![false; bucket.slots.len()];
            Ok(Accumulator { whole, share, written, squares: None })
        };
        Ok(Self {
            partition,
            kind: settings.reduce,
            device,
            buckets: buckets.list.iter().map(accumulator).collect::<Result<_, TchError>>()?,
            under_way: VecDeque::new(),
            pool: Pool::default(),
            exchanges: Exchanges::new(tracer),
        })
    }

    /// This rank's share of the sum over ranks, `[share]`, fp32.
    pub(super) fn share(&self, bucket: usize) -> Result<&Tensor, TrainError> {
        self.buckets[bucket].sum().ok_or(TrainError::NoGradients)
    }

    /// Bytes of what lasts until the update, and of whole buffers that come and go.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let lasting = self.buckets.iter().filter_map(Accumulator::sum).map(bytes).sum();
        (lasting, self.pool.bytes())
    }

    /// Adds `gradient`, of any kind, to that of the weight at `place`.
    pub(super) fn add(
        &mut self,
        buckets: &Buckets,
        place: Place,
        gradient: &Tensor,
    ) -> Result<(), TchError> {
        let (mut sum, first) = self.open(buckets, place)?;
        if first { sum.f_copy_(gradient) } else { sum.f_add_(gradient).map(drop) }
    }

    /// Has `add` add to the gradient of the matrix at `place` in place; it
    /// holds zeros where nothing was added before.
    pub(super) fn add_in_place(
        &mut self,
        buckets: &Buckets,
        place: Place,
        add: impl FnOnce(&mut Tensor) -> Result<(), TchError>,
    ) -> Result<(), TchError> {
        let (mut sum, first) = self.open(buckets, place)?;
        if first {
            let _ = sum.f_zero_()?;
        }
        add(&mut sum)
    }

    /// Declares a bucket complete: what was not written is zero, and the sum
    /// over ranks starts.
    pub(super) fn complete(
        &mut self,
        buckets: &Buckets,
        bucket: usize,
        group: Option<&ProcessGroup>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainError> {
        self.fill(&buckets.list[bucket], bucket)?;
        match group {
            None => self.square(bucket)?,
            Some(group) if self.partition.is_sharded() => {
                self.reduce_scatter(&buckets.list[bucket], bucket, group, stop)?;
            }
            Some(group) => self.all_reduce(bucket, group)?,
        }
        // What has ended already, while others run.
        while self.under_way.front().is_some_and(|oldest| oldest.work.ended_within(Duration::ZERO))
        {
            self.finish_oldest(stop)?;
        }
        Ok(())
    }

    /// Waits until every bucket holds the sum over ranks. A bucket's part of the
    /// norm is computed while those after it are still under way.
    pub(super) fn wait(&mut self, stop: &dyn Fn() -> bool) -> Result<(), TrainError> {
        while !self.under_way.is_empty() {
            self.finish_oldest(stop)?;
        }
        Ok(())
    }

    /// The norm of all gradients together, the same bits on every rank.
    pub(super) fn norm(
        &mut self,
        group: Option<&ProcessGroup>,
        stop: &dyn Fn() -> bool,
    ) -> Result<f64, TrainError> {
        let squares: Vec<_> = self.buckets.iter_mut().filter_map(|b| b.squares.take()).collect();
        let total = Tensor::f_cat(&squares, 0)?.f_sum(Kind::Double)?.f_view(1)?;
        if let Some(group) = group.filter(|_| self.partition.is_sharded()) {
            let work = group.all_reduce(&total)?;
            self.exchanges.wait(|| "norm".to_owned(), work, stop)?;
        }
        Ok(host::read_one(&total)?.sqrt())
    }

    /// What the step's reductions took.
    pub(super) fn times(&mut self) -> ReductionTimes {
        self.exchanges.take()
    }

    /// The buffer of the weight at `place`, and whether it still holds the last step's.
    fn open(&mut self, buckets: &Buckets, place: Place) -> Result<(Tensor, bool), TchError> {
        let slot = buckets.slot(place);
        let whole = self.whole(&buckets.list[place.bucket], place.bucket)?;
        let sum = slot.of(&whole)?.f_view_(slot.tensor.size())?;
        let written = &mut self.buckets[place.bucket].written[place.slot];
        Ok((sum, !std::mem::replace(written, true)))
    }

    /// The whole buffer of an open bucket.
    fn whole(&mut self, bucket: &Bucket, at: usize) -> Result<Tensor, TchError> {
        let accumulator = &mut self.buckets[at];
        if let Some(whole) = &accumulator.whole {
            return Ok(whole.values.shallow_clone());
        }
        let whole = self.pool.take(self.partition.padded(bucket), Kind::Float, self.device)?;
        let values = whole.values.shallow_clone();
        accumulator.whole = Some(whole);
        Ok(values)
    }

    /// Zeros where nothing was added, padding included.
    fn fill(&mut self, bucket: &Bucket, at: usize) -> Result<(), TchError> {
        let whole = self.whole(bucket, at)?;
        for (slot, written) in bucket.slots.iter().zip(&mut self.buckets[at].written) {
            if !std::mem::take(written) {
                let _ = slot.of(&whole)?.f_zero_()?;
            }
        }
        let padding = whole.size1()? - bucket.length;
        whole.f_narrow(0, bucket.length, padding)?.f_zero_().map(drop)
    }

    /// Starts summing a bucket over ranks, in place.
    fn all_reduce(&mut self, bucket: usize, group: &ProcessGroup) -> Result<(), TrainError> {
        let whole = self.share(bucket)?.shallow_clone();
        let elements = whole.size1()?;
        let (work, rounded, pooled) = match self.kind {
            ReduceKind::Float => (group.all_reduce(&whole)?, None, Vec::new()),
            ReduceKind::BFloat16 => {
                let rounded = self.rounded(&whole)?;
                let work = group.all_reduce(&rounded.values)?;
                (work, Some(rounded.values.shallow_clone()), vec![rounded])
            }
        };
        self.under_way.push_back(Reduction { bucket, last: true, work, rounded, pooled, elements });
        Ok(())
    }

    /// Starts summing a bucket over ranks into their shares, piece by piece; its
    /// whole buffer is free when the last has been sent.
    fn reduce_scatter(
        &mut self,
        weights: &Bucket,
        bucket: usize,
        group: &ProcessGroup,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainError> {
        let whole = self.buckets[bucket].whole.take().ok_or(TrainError::NoGradients)?;
        let share = self.share(bucket)?.shallow_clone();
        let narrow =
            |of: &Tensor, range: Range<i64>| of.f_narrow(0, range.start, range.end - range.start);
        for piece in self.partition.pieces(weights) {
            let last = piece.flat.end == self.partition.padded(weights);
            let elements = piece.flat.end - piece.flat.start;
            while self.elements_under_way() + elements > self.partition.most_under_way() {
                self.finish_oldest(stop)?;
            }
            let mut sent = narrow(&whole.values, piece.flat)?;
            let mut pooled = Vec::new();
            if last {
                pooled.push(whole.share());
            }
            if self.kind == ReduceKind::BFloat16 {
                let rounded = self.rounded(&sent)?;
                sent = rounded.values.shallow_clone();
                pooled.push(rounded);
            }
            let received = self.pool.take(elements, sent.kind(), self.device)?;
            let share = narrow(&share, piece.share)?;
            let work = group.reduce_scatter(&sent, &received.values, &share)?;
            pooled.push(received);
            let reduction = Reduction { bucket, last, work, rounded: None, pooled, elements };
            self.under_way.push_back(reduction);
        }
        Ok(())
    }

    fn elements_under_way(&self) -> i64 {
        self.under_way.iter().map(|reduction| reduction.elements).sum()
    }

    fn rounded(&mut self, values: &Tensor) -> Result<Buffer, TchError> {
        let mut rounded = self.pool.take(values.size1()?, Kind::BFloat16, self.device)?;
        rounded.values.f_copy_(values)?;
        Ok(rounded)
    }

    fn finish_oldest(&mut self, stop: &dyn Fn() -> bool) -> Result<(), TrainError> {
        let Some(reduction) = self.under_way.pop_front() else { return Ok(()) };
        let Reduction { bucket, last, work, rounded, pooled, .. } = reduction;
        self.exchanges.wait(|| format!("reduce bucket {bucket}"), work, stop)?;
        if let Some(rounded) = rounded {
            self.share(bucket)?.shallow_clone().f_copy_(&rounded)?;
        }
        pooled.into_iter().for_each(|buffer| self.pool.give(buffer));
        if last { self.square(bucket) } else { Ok(()) }
    }

    fn square(&mut self, bucket: usize) -> Result<(), TrainError> {
        let squares = square_sum(self.share(bucket)?)?;
        self.buckets[bucket].squares = Some(squares);
        Ok(())
    }
}

impl Accumulator {
    /// Where the sum over ranks is, once it is there.
    fn sum(&self) -> Option<&Tensor> {
        self.share.as_ref().or(self.whole.as_ref().map(|whole| &whole.values))
    }
}

/// Sum of the squares of `flat`'s elements, `[1]`, fp64.
fn square_sum(flat: &Tensor) -> Result<Tensor, TchError> {
    let rest = flat.size1()? % NORM_ELEMENTS;
    let parts = flat.f_split_with_sizes([flat.size1()? - rest, rest], 0)?;
    let rows = parts[0].f_view([-1, NORM_ELEMENTS])?.f_norm_scalaropt_dim(2, 1, false)?;
    let norms = Tensor::f_cat(&[rows, parts[1].f_norm()?.f_view(1)?], 0)?;
    norms.f_to_kind(Kind::Double)?.f_square()?.f_sum(Kind::Double)?.f_view(1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_long_gradients_norm_keeps_its_digits() {
        let noise = |length: i64| {
            // Mostly small and now and then large, as gradients are.
            let value = |at: i64| (at as f64 * 7919.0).sin().powi(5) as f32;
            Tensor::from_slice(&(0..length).map(value).collect::<Vec<_>>())
        };
        // Long, with a rest and without one, and shorter than a run.
        for length in [5_000_001, 2 * NORM_ELEMENTS, 7] {
            let flat = noise(length);
            let expected =
                flat.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]).sqrt();
            let norm = square_sum(&flat).unwrap().double_value(&[0]).sqrt();
            assert!((norm / expected - 1.0).abs() < 1e-6, "{norm} {expected}");
        }
    }
}
