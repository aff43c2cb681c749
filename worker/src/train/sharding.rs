//! Which part of each bucket is this rank's own.

use std::ops::Range;

use tch::{TchError, Tensor};

use super::parameters::{Bucket, Buckets, Slot};
use super::types::{EngineSettings, Sharding};
use crate::collective::ProcessGroup;

/// How flat buckets are divided among ranks.
///
/// Under [`Sharding::Zero2`] a bucket is padded to a multiple of the ranks and
/// cut into equal shares. One that is larger than a block, such as an embedding, or
/// than the settings' `largest_piece`, is first cut into pieces of that size, each
/// divided among the ranks, so that what passes between them is never larger. Without
/// sharding there is one piece and one share, which is everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Partition {
    rank: i64,
    ranks: i64,
    /// Elements of a piece: a multiple of the ranks.
    piece: i64,
    /// Elements of all pieces that pass between ranks at once: a block's. Buffers hold
    /// them, so this bounds memory; more would not hide more, as they run one after
    /// another, and backward needs a block's time to make a block's.
    most_under_way: i64,
}

/// A part of a bucket's flat buffer that passes between ranks at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which of the bucket's elements, padding included.
    pub(super) flat: Range<i64>,
    /// Which of them are this rank's.
    pub(super) own: Range<i64>,
    /// Where those are in this rank's share of the bucket.
    pub(super) share: Range<i64>,
}

/// A run of one weight's elements within a range of flat ones.
#[derive(Debug)]
pub(super) struct Segment<'a> {
    /// The weight.
    pub(super) slot: &'a Slot,
    /// Which of the weight's elements.
    pub(super) elements: Range<i64>,
    /// Where they begin in a buffer of that range.
    pub(super) offset: i64,
}

impl Partition {
    /// The division of `buckets` over `group`'s ranks.
    pub(super) fn new(
        engine: &EngineSettings,
        group: Option<&ProcessGroup>,
        buckets: &Buckets,
    ) -> Self {
        let (rank, ranks) = match (engine.sharding, group) {
            (Sharding::Zero2, Some(group)) => (group.rank().into(), group.world_size().into()),
            _ => (0, 1),
        };
        let block = buckets.largest(ranks > 1);
        let piece = if ranks > 1 { block.min(engine.largest_piece) } else { block };
        let (piece, most_under_way) = (round_up(piece, ranks), round_up(block, ranks));
        Self { rank, ranks, piece, most_under_way }
    }

    /// Elements that may pass between ranks at once: at least a piece's.
    pub(super) fn most_under_way(&self) -> i64 {
        self.most_under_way
    }

    /// This rank's number among the owners of shares.
    pub(super) fn rank(&self) -> i64 {
        self.rank
    }

    /// Into how many shares a bucket is cut.
    pub(super) fn ranks(&self) -> i64 {
        self.ranks
    }

    /// Whether others own a part.
    pub(super) fn is_sharded(&self) -> bool {
        self.ranks > 1
    }

    /// Elements of a flat buffer of `bucket`: its weights', and zeros up to a
    /// multiple of the ranks.
    pub(super) fn padded(&self, bucket: &Bucket) -> i64 {
        round_up(bucket.length, self.ranks)
    }

    /// Elements of each rank's share of `bucket`.
    pub(super) fn share_length(&self, bucket: &Bucket) -> i64 {
        self.padded(bucket) / self.ranks
    }

    /// `bucket` as it passes between ranks.
    pub(super) fn pieces(&self, bucket: &Bucket) -> impl Iterator<Item = Piece> + use<> {
        let Self { rank, ranks, piece, .. } = *self;
        let padded = self.padded(bucket);
        (0..padded).step_by(piece.max(1) as usize).map(move |start| {
            let end = padded.min(start + piece);
            // Both are multiples of the ranks.
            let share = start / ranks..end / ranks;
            let own = start + rank * (share.end - share.start);
            Piece { flat: start..end, own: own..own + (share.end - share.start), share }
        })
    }

    /// The weights' elements that this rank owns, in the order of its share.
    pub(super) fn own<'a>(
        &self,
        bucket: &'a Bucket,
    ) -> impl Iterator<Item = Segment<'a>> + use<'a> {
        self.pieces(bucket).flat_map(move |piece| {
            segments(bucket, piece.own).map(move |mut segment| {
                segment.offset += piece.share.start;
                segment
            })
        })
    }
}

impl Piece {
    /// The elements of the ranks before this one, and those of the ranks after it.
    pub(super) fn others(&self) -> [Range<i64>; 2] {
        [self.flat.start..self.own.start, self.own.end..self.flat.end]
    }
}

fn round_up(length: i64, multiple: i64) -> i64 {
    (length + multiple - 1) / multiple * multiple
}

/// The weights' elements within `range` of `bucket`'s flat buffer; padding is
/// nobody's.
pub(super) fn segments(
    bucket: &Bucket,
    range: Range<i64>,
) -> impl Iterator<Item = Segment<'_>> + use<'_> {
    bucket.slots.iter().filter_map(move |slot| {
        let start = range.start.max(slot.offset);
        let end = range.end.min(slot.offset + slot.length);
        (start < end).then(|| Segment {
            slot,
            elements: start - slot.offset..end - slot.offset,
            offset: start - range.start,
        })
    })
}

impl Segment<'_> {
    /// How many elements.
    pub(super) fn length(&self) -> i64 {
        self.elements.end - self.elements.start
    }

    /// These elements in a flat buffer of the range that was asked for.
    pub(super) fn of(&self, buffer: &Tensor) -> Result<Tensor, TchError> {
        buffer.f_narrow(0, self.offset, self.length())
    }

    /// These elements of the policy's weight, flat, apart from autograd.
    pub(super) fn weight(&self) -> Result<Tensor, TchError> {
        self.slot.flat_weight()?.f_narrow(0, self.elements.start, self.length())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_bucket_and_shares_each_piece() {
        for ranks in [1, 2, 3, 7] {
            for length in [1, 6, 7, 20, 21, 22, 100] {
                let bucket = Bucket { slots: Vec::new(), length };
                let mut owned = 0;
                for rank in 0..ranks {
                    let piece = round_up(20, ranks);
                    let partition = Partition { rank, ranks, piece, most_under_way: piece };
                    let (mut flat, mut share) = (0, 0);
                    for piece in partition.pieces(&bucket) {
                        assert_eq!((piece.flat.start, piece.share.start), (flat, share));
                        (flat, share) = (piece.flat.end, piece.share.end);
                        let [before, after] = piece.others();
                        assert_eq!((before.end, after.start), (piece.own.start, piece.own.end));
                        assert!(piece.own.end <= piece.flat.end);
                        assert_eq!(
                            piece.own.end - piece.own.start,
                            (piece.share.end - piece.share.start)
                        );
                        owned += piece.own.end - piece.own.start;
                    }
                    assert_eq!(flat, partition.padded(&bucket));
                    assert_eq!(share, partition.share_length(&bucket));
                    assert!((length..length + ranks).contains(&flat));
                }
                assert_eq!(owned, round_up(length, ranks));
            }
        }
    }
}
