//! Which prompts never train.
//!
//! A prompt is held out by a keyed hash of what it says. Not by its place, nor
//! by the iteration, nor by which replies were sampled: so it stays out of the
//! warm start and of every iteration alike, and a conversation that the corpus
//! holds twice is not trained on under its other number.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::domain::{Message, Role};

/// A set holds back at most one prompt in this many.
const LEAST_TRAINING_SHARE: usize = 5;

/// How many prompts to hold out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldOut {
    /// This many.
    Pairs(usize),
    /// This share of the set, from 0 to 1.
    Share(f64),
}

impl HeldOut {
    /// How many of `set` prompts: what is asked for, at most a fifth of the
    /// set, and at least one where that leaves four to train on. None only
    /// where none is asked for, or the set has fewer than five.
    pub fn count(self, set: usize) -> usize {
        let asked = match self {
            Self::Pairs(0) => return 0,
            Self::Share(share) if share.is_nan() || share <= 0.0 => return 0,
            Self::Pairs(pairs) => pairs,
            // In f64 exact for any set that fits a disk; saturates above.
            Self::Share(share) => (share * set as f64).round() as usize,
        };
        asked.max(1).min(set / LEAST_TRAINING_SHARE)
    }
}

/// What a prompt says, as SHA-256 over the roles and lengths and contents of
/// its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PromptKey([u8; 32]);

impl PromptKey {
    /// The key of a conversation before its reply.
    pub fn of(context: &[Message]) -> Self {
        let mut hash = Sha256::new_with_prefix(b"drift prompt\0");
        for message in context {
            let role = match message.role {
                Role::System => b's',
                Role::User => b'u',
                Role::Assistant => b'a',
                Role::Tool => b't',
            };
            hash.update([role]);
            hash.update((message.content.len() as u64).to_le_bytes());
            hash.update(message.content.as_bytes());
        }
        Self(hash.finalize().into())
    }

    /// Place in the order in which prompts are held out under `seed`.
    fn order(&self, seed: u64) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(b"drift held out\0");
        hash.update(seed.to_le_bytes());
        hash.update(self.0);
        hash.finalize().into()
    }
}

/// Prompts that are held out of training for the whole run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldOutSet(BTreeSet<PromptKey>);

impl HeldOutSet {
    /// Whether the prompt that says `context` is held out.
    pub fn contains(&self, context: &[Message]) -> bool {
        self.0.contains(&PromptKey::of(context))
    }

    /// How many prompts are held out.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Chooses the prompts that never train, from each of `sets` (the seed pairs'
/// prompts, and those of the DSAT samples): the first by keyed hash, as many as
/// [`HeldOut::count`] says. A prompt that one set holds out is out of all.
///
/// Give it the whole sets, before anything is sampled or dropped: the result
/// depends on nothing else, order and repetitions included.
pub fn hold_out(sets: &[&[PromptKey]], held_out: HeldOut, seed: u64) -> HeldOutSet {
    let mut chosen = BTreeSet::new();
    for set in sets {
        let mut ordered: Vec<_> = set.iter().map(|key| (key.order(seed), *key)).collect();
        ordered.sort_unstable();
        ordered.dedup();
        let count = held_out.count(ordered.len());
        chosen.extend(ordered.into_iter().take(count).map(|(_, key)| key));
    }
    HeldOutSet(chosen)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn context(text: &str) -> Vec<Message> {
        vec![Message::new(Role::User, text)]
    }

    fn keys(range: std::ops::Range<u64>) -> Vec<PromptKey> {
        range.map(|n| PromptKey::of(&context(&format!("prompt {n}")))).collect()
    }

    #[test]
    fn counts_stay_between_one_and_a_fifth() {
        assert_eq!(HeldOut::Pairs(100).count(11_000), 100);
        assert_eq!(HeldOut::Pairs(100).count(491), 98);
        assert_eq!(HeldOut::Pairs(100).count(5), 1);
        assert_eq!(HeldOut::Pairs(100).count(4), 0);
        assert_eq!(HeldOut::Pairs(0).count(1_000), 0);
        assert_eq!(HeldOut::Share(0.1).count(100), 10);
        assert_eq!(HeldOut::Share(0.9).count(100), 20);
        assert_eq!(HeldOut::Share(0.001).count(10), 1);
        assert_eq!(HeldOut::Share(0.0).count(10), 0);
        assert_eq!(HeldOut::Share(f64::NAN).count(10), 0);
        assert_eq!(HeldOut::Share(f64::INFINITY).count(10), 2);
    }

    #[test]
    fn a_key_tells_where_one_message_ends() {
        let one = [Message::new(Role::User, "ab"), Message::new(Role::User, "c")];
        let other = [Message::new(Role::User, "a"), Message::new(Role::User, "bc")];
        assert_ne!(PromptKey::of(&one), PromptKey::of(&other));
        let assistant = [Message::new(Role::Assistant, "ab")];
        assert_ne!(PromptKey::of(&one[..1]), PromptKey::of(&assistant));
    }

    #[test]
    fn another_seed_holds_out_others() {
        let keys = keys(0..1_000);
        let held = |seed| hold_out(&[&keys], HeldOut::Pairs(100), seed);
        assert_eq!(held(42).len(), 100);
        let common = held(42).0.intersection(&held(43).0).count();
        assert!(common < 30, "{common} of 100 in common; ten are to be expected");
    }

    #[test]
    fn what_the_warm_start_holds_out_the_iterations_hold_out() {
        // Seed pairs are DSAT turns too, so their prompts are in both sets.
        let (dsat, seeds) = (keys(0..1_000), keys(0..60));
        let held = hold_out(&[&seeds, &dsat], HeldOut::Pairs(100), 42);
        let of_seeds = hold_out(&[&seeds], HeldOut::Pairs(100), 42);
        assert_eq!(of_seeds.len(), 12);
        assert!(of_seeds.0.is_subset(&held.0));
        assert!((100..=112).contains(&held.len()), "{}", held.len());
    }

    proptest! {
        #[test]
        fn neither_order_nor_repetition_nor_iteration_moves_it(
            prompts in 5_u64..300,
            seed in any::<u64>(),
            pairs in 0_usize..80,
            iterations in prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 0..40), 1..6),
            rotation in any::<prop::sample::Index>(),
        ) {
            let all = keys(0..prompts);
            let held = hold_out(&[&all], HeldOut::Pairs(pairs), seed);
            prop_assert_eq!(held.len(), pairs.min(all.len() / 5));

            let mut shuffled = all.clone();
            shuffled.rotate_left(rotation.index(all.len()));
            shuffled.reverse();
            shuffled.extend_from_slice(&all[..all.len() / 2]);
            prop_assert_eq!(&hold_out(&[&shuffled], HeldOut::Pairs(pairs), seed), &held);

            // Whatever iterations sample, in whatever order, a prompt is on one side only.
            let mut trained = BTreeSet::new();
            let mut evaluated = BTreeSet::new();
            for sampled in &iterations {
                for index in sampled {
                    let n = index.index(all.len());
                    let side = if held.contains(&context(&format!("prompt {n}"))) {
                        &mut evaluated
                    } else {
                        &mut trained
                    };
                    side.insert(n);
                }
            }
            prop_assert!(trained.is_disjoint(&evaluated));
        }
    }
}
