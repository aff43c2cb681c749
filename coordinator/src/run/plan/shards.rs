//! Which prompts are sampled together.

use std::cmp::Reverse;

use crate::domain::{PromptId, ShardId};

/// A group of prompts that one worker samples together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its number within the iteration.
    pub id: ShardId,
    /// Its prompts, longest first.
    pub prompts: Vec<PromptId>,
}

/// How prompts are divided into shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardRule {
    /// Prompts of a shard at most.
    pub prompts: usize,
    /// Workers that the run began with: each gets as many shards.
    pub workers: usize,
    /// Tokens of a reply at most.
    pub new_tokens: usize,
}

/// Tokens of a prompt that cost as much as one of a reply: prompts are computed many
/// tokens at a time.
const REPLY_TOKEN_COST: usize = 3;

/// Groups prompts of like length, longest first: rows of a batch then cost alike, and
/// the longest are handed out first. There are as many shards for each worker, and they
/// cost alike, so that no worker ends the phase alone with one of them.
pub fn plan_shards(lengths: &[(PromptId, usize)], rule: ShardRule) -> Vec<Shard> {
    let mut order: Vec<_> = lengths.to_vec();
    order.sort_unstable_by_key(|&(id, length)| (Reverse(length), id));
    let most = rule.prompts.max(1);
    let count = order.len().div_ceil(most).next_multiple_of(rule.workers.max(1)).min(order.len());
    // How long a reply gets is not known; half of what it may is a guess.
    let cost = |length: usize| (length + REPLY_TOKEN_COST * rule.new_tokens / 2) as u64;
    let mut left: u64 = order.iter().map(|&(_, length)| cost(length)).sum();
    let mut rest = order.as_slice();
    let mut shards = Vec::with_capacity(count);
    for (n, shards_left) in (1..=count).rev().enumerate() {
        let fair = left / shards_left as u64;
        // The shards behind this one take what it leaves, and each at least one.
        let least = rest.len().saturating_sub((shards_left - 1) * most).max(1);
        let largest = most.min(rest.len() + 1 - shards_left);
        let (mut size, mut taken) = (0, 0);
        while size < largest {
            let next = cost(rest[size].1);
            if size >= least && taken + next / 2 > fair {
                break;
            }
            (size, taken) = (size + 1, taken + next);
        }
        let (prompts, behind) = rest.split_at(size);
        shards.push(Shard {
            id: ShardId(n as u64),
            prompts: prompts.iter().map(|&(id, _)| id).collect(),
        });
        (rest, left) = (behind, left - taken);
    }
    shards
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn prompts(lengths: impl IntoIterator<Item = usize>) -> Vec<(PromptId, usize)> {
        (0..).map(PromptId).zip(lengths).collect()
    }

    #[test]
    fn every_prompt_is_in_one_shard_whatever_order_they_came_in() {
        let mut lengths = prompts((0..37).map(|i| i * 7 % 11));
        let rule = ShardRule { prompts: 8, workers: 1, new_tokens: 10 };
        let shards = plan_shards(&lengths, rule);
        assert_eq!(shards.len(), 5);
        assert!(shards.iter().all(|shard| (1..=8).contains(&shard.prompts.len())), "{shards:?}");
        let mut seen: Vec<_> = shards.iter().flat_map(|s| s.prompts.clone()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..37).map(PromptId).collect::<Vec<_>>());
        lengths.reverse();
        assert_eq!(plan_shards(&lengths, rule), shards);
    }

    #[test]
    fn workers_get_as_many_shards_of_like_cost() {
        let lengths = prompts([2000, 1900, 900, 800, 700, 600, 500, 400, 300, 200, 100]);
        let rule = ShardRule { prompts: 64, workers: 2, new_tokens: 100 };
        let shards = plan_shards(&lengths, rule);
        let cost = |shard: &Shard| -> usize {
            shard.prompts.iter().map(|id| lengths[id.0 as usize].1 + 150).sum()
        };
        assert_eq!(shards.len(), 2);
        assert!(cost(&shards[0]).abs_diff(cost(&shards[1])) < 1000, "{shards:?}");
        assert!(shards[0].prompts.len() < shards[1].prompts.len());
        for (workers, most, expected) in
            [(2, 3, 4), (3, 3, 6), (4, 64, 4), (64, 64, 11), (1, 1, 11)]
        {
            let rule = ShardRule { prompts: most, workers, ..rule };
            let shards = plan_shards(&lengths, rule);
            assert_eq!(shards.len(), expected, "{workers} workers, at most {most}");
            assert!(shards.iter().all(|shard| (1..=most).contains(&shard.prompts.len())));
        }
        assert_eq!(plan_shards(&[], rule), []);
    }
}
