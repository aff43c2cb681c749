//! One uniform number per token, by Philox4x32-10 of Salmon et al., "Parallel
//! Random Numbers: As Easy as 1, 2, 3" (SC 2011).
//!
//! The generator has no state: a number is a function of (seed, iteration,
//! prompt, sample, position), so neither the order of work, nor who does it,
//! nor a restart changes what is drawn.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The uniforms of one sample: one for each position of its reply.
#[derive(Debug, Clone, Copy)]
pub struct Uniforms {
    key: [u32; 2],
    stream: [u32; 2],
}

impl Uniforms {
    /// The stream of sample `sample` of prompt `prompt` in `iteration`.
    pub fn new(seed: u64, iteration: u32, prompt: u64, sample: u32) -> Self {
        // The words that name a stream fill a whole block already, so they are
        // hashed into a key and half a counter; the position is the other half.
        let [a, b, c, d] =
            philox4x32([low(prompt), high(prompt), iteration, sample], [low(seed), high(seed)]);
        Self { key: [a, b], stream: [c, d] }
    }

    /// The number for the reply's token at `position`, from 0: uniform in
    /// [0, 1), with 53 random bits.
    pub fn at(&self, position: u32) -> f64 {
        let [a, b, ..] = philox4x32([position, 0, self.stream[0], self.stream[1]], self.key);
        let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
        bits as f64 * (1.0 / (1_u64 << 53) as f64)
    }
}

fn low(word: u64) -> u32 {
    word as u32
}

fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            high(second) ^ counter[1] ^ key[0],
            low(second),
            high(first) ^ counter[3] ^ key[1],
            low(first),
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// `kat_vectors` of Random123 1.14: philox4x32, 10 rounds.
    #[test]
    fn philox_gives_the_known_answers() {
        let zeros = philox4x32([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox4x32(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn every_word_of_the_key_counts() {
        let draw = |seed, iteration, prompt, sample, position| {
            Uniforms::new(seed, iteration, prompt, sample).at(position).to_bits()
        };
        let wide = 1 << 32;
        let draws = HashSet::from([
            draw(0, 0, 0, 0, 0),
            draw(1, 0, 0, 0, 0),
            draw(wide, 0, 0, 0, 0),
            draw(0, 1, 0, 0, 0),
            draw(0, 0, 1, 0, 0),
            draw(0, 0, wide, 0, 0),
            draw(0, 0, 0, 1, 0),
            draw(0, 0, 0, 0, 1),
        ]);
        assert_eq!(draws.len(), 8);
        assert_eq!(draw(7, 6, 5, 4, 3), draw(7, 6, 5, 4, 3));
    }

    #[test]
    fn draws_fill_the_unit_interval_evenly() {
        let uniforms = Uniforms::new(42, 1, 7, 0);
        let n = 100_000;
        let mut tenths = [0_u32; 10];
        let mut sum = 0.0;
        for position in 0..n {
            let u = uniforms.at(position);
            assert!((0.0..1.0).contains(&u));
            tenths[(u * 10.0) as usize] += 1;
            sum += u;
        }
        // Five standard deviations of a mean of uniforms, and of a binomial count.
        let mean = sum / f64::from(n);
        assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12.0_f64 / f64::from(n)).sqrt(), "mean {mean}");
        for count in tenths {
            let deviation = (f64::from(count) - f64::from(n) / 10.0).abs();
            assert!(deviation < 5.0 * (f64::from(n) * 0.1 * 0.9).sqrt(), "{tenths:?}");
        }
    }
}
