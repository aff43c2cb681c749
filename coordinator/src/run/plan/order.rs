//! Shuffles that no library's next version can change.

use sha2::{Digest, Sha256};

/// The ids in a pseudo-random order that is a pure function of the key: sorted
/// by SHA-256 of (seed, purpose, round, id). The order of any subset is that of
/// the whole with the others left out.
pub fn keyed_order(seed: u64, purpose: &str, round: &[u64], ids: &[u64]) -> Vec<u64> {
    let mut prefix = Sha256::new();
    prefix.update(seed.to_le_bytes());
    prefix.update((purpose.len() as u64).to_le_bytes());
    prefix.update(purpose.as_bytes());
    for part in round {
        prefix.update(part.to_le_bytes());
    }
    let mut keyed: Vec<([u8; 32], u64)> = ids
        .iter()
        .map(|&id| (prefix.clone().chain_update(id.to_le_bytes()).finalize().into(), id))
        .collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_holds_every_id_once_and_depends_on_each_part_of_its_key() {
        let ids: Vec<u64> = (0..50).collect();
        let order = keyed_order(1, "epoch", &[0, 0], &ids);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, ids);
        assert_eq!(order, keyed_order(1, "epoch", &[0, 0], &ids));
        assert_ne!(order, keyed_order(2, "epoch", &[0, 0], &ids));
        assert_ne!(order, keyed_order(1, "other", &[0, 0], &ids));
        assert_ne!(order, keyed_order(1, "epoch", &[0, 1], &ids));
    }

    #[test]
    fn a_subset_keeps_the_order_of_the_whole() {
        let ids: Vec<u64> = (0..40).collect();
        let even: Vec<u64> = ids.iter().copied().filter(|i| i % 2 == 0).collect();
        let mut whole = keyed_order(7, "p", &[], &ids);
        whole.retain(|i| i % 2 == 0);
        assert_eq!(whole, keyed_order(7, "p", &[], &even));
    }
}
