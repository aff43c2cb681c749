//! Updated weights, from the ranks that own them to all others.

use std::collections::VecDeque;

use tch::{TchError, Tensor};

use super::error::TrainError;
use super::memory::{Buffer, Pool};
use super::parameters::{Bucket, Buckets};
use super::sharding::{Partition, Piece, segments};
use super::trace::{Exchanges, Tracer};
use super::types::ReductionTimes;
use crate::collective::{ProcessGroup, Work};

/// Gathers under way at once: one beside the update of the next bucket, and one
/// that follows it. Each holds a buffer of its piece's size.
const MAX_UNDER_WAY: usize = 2;

/// Gathers of updated weights, a piece of a bucket at a time.
///
/// They go through buffers and are copied into the policy's tensors, which so
/// stay where the decoder put them: 4 bytes per bf16 weight, once a step.
#[derive(Debug)]
pub(super) struct WeightGather {
    partition: Partition,
    under_way: VecDeque<Gather>,
    pool: Pool,
    exchanges: Exchanges,
}

#[derive(Debug)]
struct Gather {
    bucket: usize,
    piece: Piece,
    work: Work,
    /// This rank's elements of the piece.
    share: Buffer,
    /// Everybody's.
    whole: Buffer,
}

impl WeightGather {
    pub(super) fn new(partition: Partition, tracer: &Tracer) -> Self {
        Self {
            partition,
            under_way: VecDeque::new(),
            pool: Pool::default(),
            exchanges: Exchanges::new(tracer),
        }
    }

    /// Starts sending this rank's part of `bucket`'s weights to the others, and
    /// receiving theirs. Nothing to do where no others own any.
    pub(super) fn start(
        &mut self,
        buckets: &Buckets,
        bucket: usize,
        group: Option<&ProcessGroup>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainError> {
        let Some(group) = group.filter(|_| self.partition.is_sharded()) else { return Ok(()) };
        let weights = &buckets.list[bucket];
        let (kind, device) = (buckets.kind(), buckets.device());
        for piece in self.partition.pieces(weights) {
            let share = self.pool.take(piece.share.end - piece.share.start, kind, device)?;
            pack(weights, &piece, &share.values)?;
            let whole = self.pool.take(piece.flat.end - piece.flat.start, kind, device)?;
            let work = group.all_gather(&whole.values, &share.values)?;
            self.under_way.push_back(Gather { bucket, piece, work, share, whole });
            while self.under_way.len() > MAX_UNDER_WAY {
                self.finish_oldest(buckets, stop)?;
            }
        }
        Ok(())
    }

    /// Waits until the policy holds everybody's weights.
    pub(super) fn wait(
        &mut self,
        buckets: &Buckets,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainError> {
        while !self.under_way.is_empty() {
            self.finish_oldest(buckets, stop)?;
        }
        Ok(())
    }

    /// What the step's gathers took.
    pub(super) fn times(&mut self) -> ReductionTimes {
        self.exchanges.take()
    }

    /// Bytes of whole buffers that come and go.
    pub(super) fn bytes(&self) -> u64 {
        self.pool.bytes()
    }

    fn finish_oldest(
        &mut self,
        buckets: &Buckets,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainError> {
        let Some(gather) = self.under_way.pop_front() else { return Ok(()) };
        let Gather { bucket, piece, work, share, whole } = gather;
        self.exchanges.wait(|| format!("gather bucket {bucket}"), work, stop)?;
        for others in piece.others() {
            let start = others.start - piece.flat.start;
            let received = whole.values.f_narrow(0, start, others.end - others.start)?;
            for segment in segments(&buckets.list[bucket], others) {
                segment.weight()?.f_copy_(&segment.of(&received)?)?;
            }
        }
        self.pool.give(share);
        self.pool.give(whole);
        Ok(())
    }
}

/// Copies this rank's weights of `piece` to `share`, with zeros for padding.
fn pack(bucket: &Bucket, piece: &Piece, share: &Tensor) -> Result<(), TchError> {
    let mut end = 0;
    for segment in segments(bucket, piece.own.clone()) {
        segment.of(share)?.f_copy_(&segment.weight()?)?;
        end = segment.offset + segment.length();
    }
    share.f_narrow(0, end, share.size1()? - end)?.f_zero_().map(drop)
}
