//! The policy's weights, grouped into buckets by when their gradients are complete.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use crate::model::{Decoder, Parameter, Part};

/// One weight and its place in its bucket's flat buffers.
#[derive(Debug)]
pub(super) struct Slot {
    /// The weight, sharing storage with the policy's.
    pub(super) tensor: Tensor,
    /// The tensors it is made of, as a checkpoint names them.
    pub(super) parts: Vec<Part>,
    /// First element in the flat buffers.
    pub(super) offset: i64,
    /// Elements.
    pub(super) length: i64,
}

/// Weights that are reduced and updated together.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    /// The weights, in the policy's order.
    pub(super) slots: Vec<Slot>,
    /// Elements of all of them.
    pub(super) length: i64,
}

/// All weights, in buckets. The order of buckets is the order in which backward
/// completes them, and so the order of reductions, the same on every rank:
/// final norm and head; the blocks from last to first; the embedding, which a
/// tied head adds to at the start of backward and the input at its end.
#[derive(Debug)]
pub(super) struct Buckets {
    /// The buckets.
    pub(super) list: Vec<Bucket>,
    blocks: usize,
}

/// Where a gradient goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) bucket: usize,
    pub(super) slot: usize,
}

impl Slot {
    /// This weight's part of its bucket's flat buffer.
    pub(super) fn of(&self, flat: &Tensor) -> Result<Tensor, TchError> {
        flat.f_narrow(0, self.offset, self.length)
    }

    /// The weight's elements in a row, apart from autograd.
    pub(super) fn flat_weight(&self) -> Result<Tensor, TchError> {
        self.tensor.f_detach()?.f_view_([self.length])
    }

    /// The tensors that a checkpoint names, and their elements among this weight's.
    pub(super) fn flat_parts(&self) -> impl Iterator<Item = (&str, Range<i64>)> {
        let row = self.length / self.tensor.size().first().copied().unwrap_or(1).max(1);
        let mut start = 0;
        self.parts.iter().map(move |part| {
            let end = start + part.rows * row;
            (part.name.as_str(), std::mem::replace(&mut start, end)..end)
        })
    }

    /// `values` (`[length]`) as the tensors that a checkpoint names: views.
    pub(super) fn named(&self, values: &Tensor) -> Result<Vec<(String, Tensor)>, TchError> {
        let whole = values.f_view_(self.tensor.size())?;
        let mut start = 0;
        let mut named = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            named.push((part.name.clone(), whole.f_narrow(0, start, part.rows)?));
            start += part.rows;
        }
        Ok(named)
    }
}

impl Bucket {
    fn new(parameters: impl IntoIterator<Item = Parameter>) -> Self {
        let mut bucket = Self::default();
        for Parameter { tensor, parts } in parameters {
            let length = tensor.numel() as i64;
            bucket.slots.push(Slot { tensor, parts, offset: bucket.length, length });
            bucket.length += length;
        }
        bucket
    }
}

impl Buckets {
    pub(super) fn new(policy: &Decoder) -> Self {
        let mut outer = policy.outer_parameters();
        // The embedding comes first in the policy's list, and last here.
        let norm_and_head = outer.split_off(1);
        let blocks = policy.blocks.iter().rev().map(|block| Bucket::new(block.parameters()));
        let list: Vec<Bucket> = std::iter::once(Bucket::new(norm_and_head))
            .chain(blocks)
            .chain(std::iter::once(Bucket::new(outer)))
            .collect();
        Self { list, blocks: policy.blocks.len() }
    }

    /// Elements of the largest bucket; of `blocks` only, if there are any.
    pub(super) fn largest(&self, blocks: bool) -> i64 {
        let list = if blocks && self.blocks > 0 {
            &self.list[self.block(self.blocks - 1)..=self.block(0)]
        } else {
            &self.list
        };
        list.iter().map(|bucket| bucket.length).max().unwrap_or(0)
    }

    /// Where the weights are.
    pub(super) fn device(&self) -> Device {
        self.slot(Self::NORM).tensor.device()
    }

    /// Kind of the weights.
    pub(super) fn kind(&self) -> Kind {
        self.slot(Self::NORM).tensor.kind()
    }

    /// The bucket of final norm and head: complete when the head's backward is.
    pub(super) const HEAD: usize = 0;

    /// The final norm's weight.
    pub(super) const NORM: Place = Place { bucket: Self::HEAD, slot: 0 };

    /// The bucket of block `index`.
    pub(super) fn block(&self, index: usize) -> usize {
        self.blocks - index
    }

    /// The embedding's bucket: complete when all of backward is.
    pub(super) fn embedding_bucket(&self) -> usize {
        self.blocks + 1
    }

    /// The input embedding.
    pub(super) fn embedding(&self) -> Place {
        Place { bucket: self.embedding_bucket(), slot: 0 }
    }

    /// The head's weight: the embedding, where they are tied.
    pub(super) fn head(&self) -> Place {
        match self.list[Self::HEAD].slots.len() {
            1 => self.embedding(),
            _ => Place { bucket: Self::HEAD, slot: 1 },
        }
    }

    /// The weight at `place`.
    pub(super) fn slot(&self, place: Place) -> &Slot {
        &self.list[place.bucket].slots[place.slot]
    }

    /// All weights with their places' flat buffers' index.
    pub(super) fn slots(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.list
            .iter()
            .enumerate()
            .flat_map(|(at, bucket)| bucket.slots.iter().map(move |s| (at, s)))
    }
}
