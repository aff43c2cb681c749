//! Which prompts are sampled together.

use crate::domain::{PromptId, ShardId};

/// A group of prompts that one worker samples in one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its number within the iteration; lower numbers cost more.
    pub id: ShardId,
    /// Its prompts, longest first.
    pub prompts: Vec<PromptId>,
}

/// Groups prompts of like length, at most `per_shard` together, longest first:
/// rows of a batch then cost alike, and the dearest shards are handed out first,
/// so that no worker ends the phase alone with one of them.
pub fn plan_shards(lengths: &[(PromptId, usize)], per_shard: usize) -> Vec<Shard> {
    let mut order: Vec<_> = lengths.to_vec();
    order.sort_unstable_by_key(|&(id, length)| (std::cmp::Reverse(length), id));
    order
        .chunks(per_shard.max(1))
        .enumerate()
        .map(|(n, chunk)| Shard {
            id: ShardId(n as u64),
            prompts: chunk.iter().map(|&(id, _)| id).collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prompt_is_in_one_shard_whatever_order_they_came_in() {
        let mut lengths: Vec<_> = (0..37).map(|i| (PromptId(i), (i * 7 % 11) as usize)).collect();
        let shards = plan_shards(&lengths, 8);
        assert_eq!(shards.len(), 5);
        let mut seen: Vec<_> = shards.iter().flat_map(|s| s.prompts.clone()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..37).map(PromptId).collect::<Vec<_>>());
        lengths.reverse();
        assert_eq!(plan_shards(&lengths, 8), shards);
    }
}
