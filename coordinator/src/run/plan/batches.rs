//! Which pairs make an optimiser step, on which rank, in which pass.
//!
//! The pairs of a step are settled by the seed and the batch's size alone, so
//! they stay the same when a run goes on with another number of workers. Within
//! a step pairs are dealt out by what they cost ([`CostModel`]): all ranks wait
//! for the slowest in every step. None of it changes the step's gradient.

use std::collections::BTreeMap;

use super::cost::{CostModel, PairSize};
use super::order::keyed_order;
use crate::domain::{Epoch, Iteration, PairId, Step};

/// How batches are cut and dealt out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dealing {
    /// Pairs of an optimiser step over all ranks.
    pub global_batch: usize,
    /// Ranks that share it.
    pub world_size: usize,
    /// Packed tokens of one pass at most.
    pub max_tokens: usize,
    /// What a pair costs.
    pub cost: CostModel,
}

/// One optimiser step over all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// Which, within the iteration.
    pub step: Step,
    /// Pairs over all ranks: what sums of gradients are divided by.
    pub global_pairs: u32,
    /// By rank: its passes, each a list of pairs computed together.
    pub ranks: Vec<Vec<Vec<PairId>>>,
}

impl Dealing {
    /// Optimiser steps of one epoch over so many pairs.
    pub fn steps_per_epoch(&self, pairs: usize) -> u64 {
        pairs.div_ceil(self.global_batch) as u64
    }

    /// The steps of one epoch: pairs shuffled by (seed, iteration, epoch), cut
    /// into global batches, of which the last may be short, and dealt to the ranks.
    pub fn epoch_steps(
        &self,
        pairs: &[PairSize],
        seed: u64,
        iteration: Iteration,
        epoch: Epoch,
    ) -> Vec<StepPlan> {
        let ids: Vec<u64> = pairs.iter().map(|p| p.id.0).collect();
        let sizes: BTreeMap<u64, PairSize> = pairs.iter().map(|p| (p.id.0, *p)).collect();
        let order = keyed_order(seed, "epoch", &[u64::from(iteration.0), u64::from(epoch.0)], &ids);
        let first = u64::from(epoch.0) * self.steps_per_epoch(pairs.len());
        order
            .chunks(self.global_batch)
            .enumerate()
            .map(|(n, batch)| {
                let batch: Vec<PairSize> = batch.iter().map(|id| sizes[id]).collect();
                StepPlan {
                    step: Step(first + n as u64),
                    global_pairs: batch.len() as u32,
                    ranks: self.shares(&batch).iter().map(|share| self.passes(share)).collect(),
                }
            })
            .collect()
    }

    /// Batches that only score, each for one rank: the ranks in turn, the pairs
    /// in the order given. Returns (rank, passes).
    pub fn evaluation_batches(&self, pairs: &[PairSize]) -> Vec<(usize, Vec<Vec<PairId>>)> {
        pairs
            .chunks(self.global_batch.div_ceil(self.world_size))
            .enumerate()
            .map(|(n, chunk)| (n % self.world_size, self.passes(chunk)))
            .collect()
    }

    /// Deals a batch to the ranks: the dearest pair first, each to the rank that
    /// has the least to do so far. No rank ends with more than another by more
    /// than its cheapest pair.
    fn shares(&self, batch: &[PairSize]) -> Vec<Vec<PairSize>> {
        let mut dearest_first = batch.to_vec();
        dearest_first.sort_by_key(|pair| (std::cmp::Reverse(self.cost.of(pair)), pair.id));
        let mut shares: Vec<Vec<PairSize>> = vec![Vec::new(); self.world_size];
        let mut load = vec![0; self.world_size];
        for pair in dearest_first {
            let least = (0..self.world_size).min_by_key(|&rank| (load[rank], shares[rank].len()));
            if let Some(rank) = least {
                load[rank] += self.cost.of(&pair);
                shares[rank].push(pair);
            }
        }
        shares
    }

    /// Cuts a rank's pairs into about as few passes as `max_tokens` allows, of
    /// like cost: a step's peak of memory is that of its largest pass. A pair
    /// that is longer by itself gets a pass of its own.
    fn passes(&self, pairs: &[PairSize]) -> Vec<Vec<PairId>> {
        let (long, mut rest): (Vec<_>, Vec<_>) =
            pairs.iter().copied().partition(|pair| pair.tokens > self.max_tokens);
        rest.sort_by_key(|pair| (std::cmp::Reverse(pair.tokens), pair.id));
        let tokens: usize = rest.iter().map(|pair| pair.tokens).sum();
        let fewest = tokens.div_ceil(self.max_tokens);
        // Each pair alone always fits, so one of the counts does.
        let packed = (fewest..=rest.len()).find_map(|passes| self.packed(&rest, passes));
        let alone = long.iter().map(|pair| vec![pair.id]);
        packed.into_iter().flatten().chain(alone).collect()
    }

    /// The pairs in so many passes, each in turn put where it costs least among
    /// those with room for it; none if one finds no room.
    fn packed(&self, longest_first: &[PairSize], passes: usize) -> Option<Vec<Vec<PairId>>> {
        let mut packed = vec![Vec::new(); passes];
        let mut load = vec![(0, 0); passes];
        for pair in longest_first {
            let pass = (0..passes)
                .filter(|&pass| load[pass].1 + pair.tokens <= self.max_tokens)
                .min_by_key(|&pass| load[pass])?;
            load[pass].0 += self.cost.of(pair);
            load[pass].1 += pair.tokens;
            packed[pass].push(pair.id);
        }
        Some(packed)
    }
}

#[cfg(test)]
mod tests;
