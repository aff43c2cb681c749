use proptest::prelude::*;

use super::*;

/// A decoder in which attention costs as much as the matrices from some 200 tokens on.
const COST: CostModel = CostModel { token: 100, attended: 1, response: 20 };

fn dealing(global_batch: usize, world_size: usize, max_tokens: usize) -> Dealing {
    Dealing { global_batch, world_size, max_tokens, cost: COST }
}

fn sizes(tokens: &[usize]) -> Vec<PairSize> {
    tokens
        .iter()
        .enumerate()
        .map(|(n, &tokens)| PairSize {
            id: PairId(n as u64),
            tokens,
            chosen: tokens / 4,
            rejected: tokens / 5,
        })
        .collect()
}

fn cost(pairs: &[PairSize], ids: &[PairId]) -> u64 {
    ids.iter().map(|id| COST.of(&pairs[id.0 as usize])).sum()
}

proptest! {
    #[test]
    fn an_epoch_trains_each_pair_once_within_every_bound(
        tokens in prop::collection::vec(1usize..900, 1..80),
        global_batch in 1usize..12,
        world_size in 1usize..5,
        epoch in 0u32..3,
    ) {
        let max_tokens = 700;
        let pairs = sizes(&tokens);
        let dealing = dealing(global_batch, world_size, max_tokens);
        let steps = dealing.epoch_steps(&pairs, 1, Iteration(1), Epoch(epoch));
        let mut seen = Vec::new();
        for (n, plan) in steps.iter().enumerate() {
            prop_assert_eq!(plan.ranks.len(), world_size);
            let in_step: usize = plan.ranks.iter().flatten().map(Vec::len).sum();
            prop_assert_eq!(in_step, plan.global_pairs as usize);
            prop_assert!(in_step == global_batch || n + 1 == steps.len() && in_step < global_batch);
            for pass in plan.ranks.iter().flatten() {
                prop_assert!(!pass.is_empty());
                let sum: usize = pass.iter().map(|p| tokens[p.0 as usize]).sum();
                prop_assert!(sum <= max_tokens || pass.len() == 1);
                seen.extend(pass.iter().map(|p| p.0));
            }
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..tokens.len() as u64).collect::<Vec<_>>());
        let per_epoch = dealing.steps_per_epoch(tokens.len());
        prop_assert_eq!(steps.len() as u64, per_epoch);
        prop_assert_eq!(steps[0].step, Step(u64::from(epoch) * per_epoch));
    }

    #[test]
    fn no_rank_has_more_to_do_than_another_by_more_than_its_cheapest_pair(
        tokens in prop::collection::vec(2usize..2000, 1..40),
        world_size in 1usize..9,
    ) {
        let pairs = sizes(&tokens);
        let shares = dealing(tokens.len(), world_size, 4096).shares(&pairs);
        let of = |share: &Vec<PairSize>| share.iter().map(|pair| COST.of(pair)).sum::<u64>();
        let least = shares.iter().map(of).min().unwrap_or(0);
        for share in shares.iter().filter(|share| !share.is_empty()) {
            let cheapest = share.iter().map(|pair| COST.of(pair)).min().unwrap_or(0);
            prop_assert!(of(share) - cheapest <= least);
        }
        prop_assert!(tokens.len() < world_size || shares.iter().all(|share| !share.is_empty()));
    }

    #[test]
    fn passes_are_few_and_do_not_depend_on_the_order_of_pairs(
        tokens in prop::collection::vec(1usize..700, 1..30),
    ) {
        let max_tokens = 700;
        let mut pairs = sizes(&tokens);
        let dealing = dealing(64, 1, max_tokens);
        let passes = dealing.passes(&pairs);
        // All but one of the passes that were too few were more than half full.
        let sum: usize = tokens.iter().sum();
        prop_assert!(passes.len() <= 1 + 2 * sum / max_tokens, "{passes:?}");
        pairs.reverse();
        prop_assert_eq!(dealing.passes(&pairs), passes);
    }

    #[test]
    fn the_pairs_of_a_step_are_the_same_for_any_number_of_ranks(
        tokens in prop::collection::vec(1usize..900, 1..60),
        global_batch in 1usize..12,
        world_size in 1usize..6,
    ) {
        let pairs = sizes(&tokens);
        let sets = |world_size| -> Vec<(Step, u32, Vec<PairId>)> {
            let steps = dealing(global_batch, world_size, 700)
                .epoch_steps(&pairs, 9, Iteration(2), Epoch(1));
            steps
                .into_iter()
                .map(|plan| {
                    let mut ids: Vec<_> = plan.ranks.into_iter().flatten().flatten().collect();
                    ids.sort_unstable();
                    (plan.step, plan.global_pairs, ids)
                })
                .collect()
        };
        prop_assert_eq!(sets(world_size), sets(1));
    }
}

#[test]
fn a_heavy_share_is_split_evenly() {
    let pairs = sizes(&[300; 5]);
    let passes = dealing(5, 1, 1200).passes(&pairs);
    let lengths: Vec<_> = passes.iter().map(Vec::len).collect();
    assert_eq!(lengths, [3, 2], "not four, and one that is left over");
    let pairs = sizes(&[600, 500, 400, 300, 200, 100]);
    let passes = dealing(6, 1, 1100).passes(&pairs);
    assert_eq!(passes.len(), 2);
    let costs: Vec<_> = passes.iter().map(|pass| cost(&pairs, pass)).collect();
    assert!(costs[0].abs_diff(costs[1]) < costs[0] / 8, "{costs:?}");
}

#[test]
fn attention_counts_where_shares_are_dealt_out() {
    // As many tokens in one long pair as in four short ones, which attend to far less.
    let pairs = sizes(&[1600, 400, 400, 400, 400, 400, 400]);
    let shares = dealing(7, 2, 4096).shares(&pairs);
    assert_eq!(shares[0].len(), 1, "the long pair is enough for one rank");
    assert_eq!(shares[1].len(), 6);
}

#[test]
fn a_pair_longer_than_the_bound_still_gets_its_pass() {
    let pairs = sizes(&[10, 900, 10]);
    let passes = dealing(3, 1, 100).passes(&pairs);
    assert_eq!(passes, [vec![PairId(0), PairId(2)], vec![PairId(1)]]);
}

#[test]
fn more_ranks_than_pairs_leave_some_without() {
    let steps = dealing(3, 4, 100).epoch_steps(&sizes(&[5; 3]), 0, Iteration(0), Epoch(0));
    let counts: Vec<_> = steps[0].ranks.iter().map(Vec::len).collect();
    assert_eq!(counts, [1, 1, 1, 0]);
    assert!(dealing(3, 4, 100).evaluation_batches(&[]).is_empty());
}
