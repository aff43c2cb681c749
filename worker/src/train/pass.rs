//! Forward and backward of one micro-batch, block by block.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Kind, TchError, Tensor};

use super::block::{BlockPass, Kept};
use super::error::TrainError;
use super::gradients::Gradients;
use super::head::{Head, RowScores};
use super::packing::Packed;
use super::parameters::{Buckets, Place};
use super::trace::Tracer;
use super::types::Recompute;
use crate::collective::ProcessGroup;
use crate::host;
use crate::model::{Block, Decoder, Rotations};

/// The policy on one micro-batch: what scoring and training have in common.
pub(super) struct Pass<'a> {
    pub(super) policy: &'a Decoder,
    pub(super) packed: &'a Packed,
    pub(super) recompute: Recompute,
    pub(super) tracer: &'a Tracer,
    pub(super) stop: &'a dyn Fn() -> bool,
}

/// Where a micro-batch's gradients go.
pub(super) struct Sink<'a> {
    pub(super) buckets: &'a Buckets,
    pub(super) gradients: &'a mut Gradients,
    /// Whether this is the step's last micro-batch on this rank, so that each
    /// bucket is complete once its gradients are in.
    pub(super) last: bool,
    /// Who sums them, when complete.
    pub(super) group: Option<&'a ProcessGroup>,
    /// Whether to give up waiting for the others.
    pub(super) stop: &'a dyn Fn() -> bool,
}

/// A forward pass up to the head, recorded.
#[derive(Debug)]
struct Recording {
    blocks: Vec<Recorded>,
    /// Hidden states that predict rows, ahead of the final norm: `[rows, hidden]`.
    selected: Tensor,
    /// The same behind it.
    normed: Tensor,
    rotations: Rotations,
}

/// What is there of a block when backward comes to it.
#[derive(Debug)]
enum Recorded {
    /// All that it needs.
    Whole(Box<Kept>),
    /// Its input, `[tokens, hidden]`; the rest is computed again.
    Input(Tensor),
}

impl Pass<'_> {
    /// Scores of all rows, recording nothing.
    pub(super) fn score(&self) -> Result<RowScores, TrainError> {
        tch::no_grad(|| {
            let rotations = self.policy.rotations(&self.packed.positions)?;
            let mut hidden = self.policy.embed(&self.packed.ids)?;
            for block in &self.policy.blocks {
                self.check_stop()?;
                hidden = self.block(block, &rotations).forward(&hidden)?;
            }
            let head = self.head();
            head.scores(&self.policy.final_norm(&head.select(&hidden)?)?)
        })
    }

    /// Forward and backward of a step's `index`-th micro-batch: gradients of the loss by all
    /// weights, into `sink`. `evaluate` is told some of the pairs and the scores of their rows,
    /// and answers with the derivatives of the loss by each row's log-probability.
    pub(super) fn train(
        &self,
        index: usize,
        evaluate: impl FnMut(Range<usize>, &RowScores) -> Result<Vec<f32>, TrainError>,
        sink: &mut Sink<'_>,
    ) -> Result<(), TrainError> {
        let forward = self.tracer.span(|| format!("forward {index}"));
        let recording = self.record()?;
        drop(forward);
        let _backward = self.tracer.span(|| format!("backward {index}"));
        self.backward(recording, evaluate, sink)
    }

    /// As [`Self::score`] up to the head, recorded for [`Self::backward`].
    fn record(&self) -> Result<Recording, TrainError> {
        tch::no_grad(|| {
            let rotations = self.policy.rotations(&self.packed.positions)?;
            let mut hidden = self.policy.embed(&self.packed.ids)?;
            let mut blocks = Vec::with_capacity(self.policy.blocks.len());
            let recomputed = self.recomputed_blocks();
            for (index, block) in self.policy.blocks.iter().enumerate() {
                self.check_stop()?;
                let pass = self.block(block, &rotations);
                let _forward = self.tracer.span(|| format!("block {index} forward"));
                if index < recomputed {
                    let output = pass.forward(&hidden)?;
                    blocks.push(Recorded::Input(std::mem::replace(&mut hidden, output)));
                } else {
                    let (output, kept) = pass.record(&hidden)?;
                    blocks.push(Recorded::Whole(Box::new(kept)));
                    hidden = output;
                }
            }
            let head = self.head();
            let selected = head.select(&hidden)?;
            let normed = self.policy.final_norm(&selected)?;
            Ok(Recording { blocks, selected, normed, rotations })
        })
    }

    /// The head, and from there all that comes before it.
    fn backward(
        &self,
        recording: Recording,
        evaluate: impl FnMut(Range<usize>, &RowScores) -> Result<Vec<f32>, TrainError>,
        sink: &mut Sink<'_>,
    ) -> Result<(), TrainError> {
        let Recording { mut blocks, selected, normed, rotations } = recording;
        tch::no_grad(|| {
            let mut gradient = self.head_backward(&selected, &normed, evaluate, sink)?;
            sink.complete(Buckets::HEAD)?;
            for (index, block) in self.policy.blocks.iter().enumerate().rev() {
                self.check_stop()?;
                let Some(recorded) = blocks.pop() else { break };
                let pass = self.block(block, &rotations);
                let backward = self.tracer.span(|| format!("block {index} backward"));
                let kept = match recorded {
                    Recorded::Whole(kept) => *kept,
                    Recorded::Input(input) => pass.record(&input)?.1,
                };
                let bucket = sink.buckets.block(index);
                gradient = pass.backward(kept, &gradient, &mut |slot, by_weight| {
                    sink.gradients.add(sink.buckets, Place { bucket, slot }, by_weight)
                })?;
                drop(backward);
                sink.complete(bucket)?;
            }
            self.embedding_backward(&gradient, sink)?;
            sink.complete(sink.buckets.embedding_bucket())
        })
    }

    /// Gradient by the last block's output, `[tokens, hidden]`.
    fn head_backward(
        &self,
        selected: &Tensor,
        normed: &Tensor,
        evaluate: impl FnMut(Range<usize>, &RowScores) -> Result<Vec<f32>, TrainError>,
        sink: &mut Sink<'_>,
    ) -> Result<Tensor, TrainError> {
        let head = self.head();
        let place = sink.buckets.head();
        let by_normed = head.backward(normed, evaluate, |words, left, right| {
            sink.gradients.add_in_place(sink.buckets, place, |sum| {
                let mut sum = words.of(sum)?;
                match right.kind() {
                    Kind::Float => sum.f_addmm_(left, right).map(drop),
                    _ => sum.f_add_(&left.f_mm(right)?).map(drop),
                }
            })
        })?;
        let by_normed = by_normed.f_to_kind(selected.kind())?;
        let by_selected = selected.f_empty_like()?;
        let norm = self.policy.last_norm();
        let by_weight = norm.backward(selected, &by_normed, [None, None], &by_selected)?;
        sink.gradients.add(sink.buckets, Buckets::NORM, &by_weight)?;
        Ok(head.spread(&by_selected)?)
    }

    /// Adds `gradient`, that by the embedded tokens, to the rows of the
    /// embedding, in fp32. The padding token's row gets none, as in
    /// `torch.nn.Embedding` with the `padding_idx` that transformers gives it.
    fn embedding_backward(&self, gradient: &Tensor, sink: &mut Sink<'_>) -> Result<(), TchError> {
        let device = self.policy.device();
        let padding = self.policy.config.pad_token_id;
        let mut uses: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        for (at, &id) in self.packed.host_ids.iter().enumerate() {
            if Some(id) != padding {
                uses.entry(id).or_default().push(at as i64);
            }
        }
        // Summed per id first and added once: the order of additions is then fixed on every device.
        let tokens: Vec<i64> = uses.values().flatten().copied().collect();
        let segments: Vec<i64> = uses
            .values()
            .enumerate()
            .flat_map(|(segment, uses)| uses.iter().map(move |_| segment as i64))
            .collect();
        let ids: Vec<i64> = uses.keys().copied().collect();
        if ids.is_empty() {
            return Ok(());
        }
        let index = |values: &[i64]| host::upload(values, device);
        let by_token = gradient.f_index_select(0, &index(&tokens)?)?.f_to_kind(Kind::Float)?;
        let mut by_id = Tensor::f_embedding_dense_backward(
            &by_token,
            &index(&segments)?,
            ids.len() as i64,
            -1,
            false,
        )?;
        if let Some(scale) = self.policy.embedding_scale() {
            by_id = by_id.f_mul_scalar_(scale)?;
        }
        sink.gradients.add_in_place(sink.buckets, sink.buckets.embedding(), |sum| {
            sum.f_index_add_(0, &index(&ids)?, &by_id).map(drop)
        })
    }

    fn block<'a>(&'a self, block: &'a Block, rotations: &'a Rotations) -> BlockPass<'a> {
        BlockPass { block, packed: self.packed, rotary: block.rotary(rotations) }
    }

    /// How many blocks, from the first, keep their input alone. The last ones
    /// keep all: their backward comes first.
    fn recomputed_blocks(&self) -> usize {
        let blocks = &self.policy.blocks;
        match self.recompute {
            Recompute::None => 0,
            Recompute::All => blocks.len(),
            Recompute::Auto { budget_bytes } => {
                let (tokens, kind) = (self.packed.tokens, self.policy.kind());
                let bytes = |block| BlockPass::kept_bytes(block, tokens, kind);
                let inputs =
                    blocks.len() as u64 * BlockPass::input_bytes(&self.policy.config, tokens, kind);
                let mut left = budget_bytes.saturating_sub(inputs);
                let fit = blocks.iter().rev().take_while(|block| {
                    let fits = bytes(block) <= left;
                    left = left.saturating_sub(bytes(block));
                    fits
                });
                blocks.len() - fit.count()
            }
        }
    }

    fn head(&self) -> Head<'_> {
        Head::new(self.policy, self.packed, self.stop)
    }

    fn check_stop(&self) -> Result<(), TrainError> {
        if (self.stop)() { Err(TrainError::Stopped) } else { Ok(()) }
    }
}

impl Sink<'_> {
    fn complete(&mut self, bucket: usize) -> Result<(), TrainError> {
        if !self.last {
            return Ok(());
        }
        self.gradients.complete(self.buckets, bucket, self.group, self.stop)
    }

    /// What a rank without pairs gives to the step: zeros, bucket by bucket in
    /// the order in which the others reduce theirs.
    pub(super) fn complete_without_pairs(&mut self) -> Result<(), TrainError> {
        (0..self.buckets.list.len()).try_for_each(|bucket| self.complete(bucket))
    }
}
