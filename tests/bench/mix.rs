//! The pairs that both sides train on: token ids of given lengths.

use clap::ValueEnum;
use drift_worker::train::TokenPair;

/// How long prompts and replies are.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Mix {
    /// About 900 tokens of prompt, 120 of each reply.
    PromptHeavy,
    /// About 300 tokens of prompt, 120 of each reply.
    Even,
    /// About 150 tokens of prompt, 400 of each reply.
    ResponseHeavy,
}

/// Lengths are spread evenly over ± this share of a mix's own.
const RAGGEDNESS: f64 = 0.2;

/// The same pairs every time.
const SEED: u64 = 42;

impl Mix {
    /// As it is typed, and named in the figures.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PromptHeavy => "prompt-heavy",
            Self::Even => "even",
            Self::ResponseHeavy => "response-heavy",
        }
    }

    /// Tokens of prompt, chosen and rejected, on average.
    pub(crate) fn lengths(self) -> [usize; 3] {
        match self {
            Self::PromptHeavy => [900, 120, 120],
            Self::Even => [300, 120, 120],
            Self::ResponseHeavy => [150, 400, 400],
        }
    }

    /// `count` pairs of random ids of a `vocabulary`. What a token says makes no
    /// difference to what it costs.
    pub(crate) fn pairs(self, count: usize, vocabulary: i64) -> Vec<TokenPair> {
        // Vocabularies have their special tokens at either end.
        let (first, last) = (vocabulary as u64 / 16, vocabulary as u64 * 15 / 16);
        let mut draws = Draws(SEED);
        let mut ids = |mean: usize| -> Vec<u32> {
            let spread = 1.0 + RAGGEDNESS * (2.0 * draws.fraction() - 1.0);
            let length = (mean as f64 * spread).round() as usize;
            (0..length.max(1)).map(|_| (first + draws.next() % (last - first)) as u32).collect()
        };
        let pair = |pair: usize| {
            let [prompt, chosen, rejected] = self.lengths().map(&mut ids);
            TokenPair { pair: pair as u64, prompt, chosen, rejected, reference: None }
        };
        (0..count).map(pair).collect()
    }
}

/// SplitMix64 (Steele et al. 2014).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Tokens of x, y⁺ and y⁻, each once.
pub(crate) fn tokens(pair: &TokenPair) -> usize {
    pair.prompt.len() + responses(pair)
}

/// Tokens of y⁺ and y⁻.
pub(crate) fn responses(pair: &TokenPair) -> usize {
    pair.chosen.len() + pair.rejected.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_the_same_every_time_and_ragged_around_their_mix() {
        for mix in Mix::value_variants() {
            let pairs = mix.pairs(32, 49_152);
            assert_eq!(pairs, mix.pairs(32, 49_152));
            let sides: [fn(&TokenPair) -> &Vec<u32>; 3] =
                [|pair| &pair.prompt, |pair| &pair.chosen, |pair| &pair.rejected];
            for (mean, side) in mix.lengths().into_iter().zip(sides) {
                let lengths: Vec<usize> = pairs.iter().map(|pair| side(pair).len()).collect();
                let (shortest, longest) = (lengths.iter().min(), lengths.iter().max());
                assert!(shortest >= Some(&(mean * 8 / 10)), "{mix:?}: {lengths:?}");
                assert!(longest <= Some(&(mean * 12 / 10)), "{mix:?}: {lengths:?}");
                assert!(longest > shortest, "{mix:?}: {lengths:?}");
            }
        }
    }

    #[test]
    fn special_tokens_are_not_drawn() {
        let ids = |pair: TokenPair| [pair.prompt, pair.chosen, pair.rejected].concat();
        let ids: Vec<u32> = Mix::Even.pairs(8, 1600).into_iter().flat_map(ids).collect();
        assert!(ids.iter().all(|id| (100..1500).contains(id)));
    }
}
