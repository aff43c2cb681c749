//! Inputs that are nearly right: valid ones, changed in a few places.

/// Numbers that break arithmetic, as text.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "1e308",
    "-0.0",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999999",
    "0.1",
    "NaN",
];

/// Pieces of text that change what is around them.
const WORDS: [&str; 16] = [
    "null", "[]", "{}", "true", "\"\"", "\"", "\\", "\\ud800", "\n", ",", "[", "{", "}", "]",
    "\u{feff}", "\0",
];

/// Numbers that break arithmetic, as eight bytes.
const WORDS_64: [u64; 8] =
    [0, 1, 1 << 31, 1 << 32, 1 << 40, i64::MAX as u64, i64::MAX as u64 + 1, u64::MAX];

/// An input grows no longer than this.
const MAX_BYTES: usize = 256 << 10;

/// A stream of numbers, the same for a seed and an input's number.
pub(crate) struct Draw(fastrand::Rng);

impl Draw {
    pub(crate) fn new(seed: u64, input: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed.rotate_left(32) ^ input))
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0.usize(..bound.max(1))
    }

    /// An input made from one of `seeds`, or now and then from nothing.
    pub(crate) fn input(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        if self.below(50) == 0 {
            let length = self.below(2048);
            return (0..length).map(|_| self.0.u8(..)).collect();
        }
        let mut bytes = seeds[self.below(seeds.len())].clone();
        // Mostly one change or a few: what is changed everywhere is refused at its first byte.
        for _ in 0..=self.below(8).saturating_sub(3) {
            self.change(&mut bytes, seeds);
        }
        bytes.truncate(MAX_BYTES);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(bytes.len());
        let rest = bytes.len() - at.min(bytes.len());
        let few = self.below(64).min(rest);
        let put = |bytes: &mut Vec<u8>, range: std::ops::Range<usize>, with: &[u8]| {
            drop(bytes.splice(range, with.iter().copied()));
        };
        match self.below(12) {
            0 if rest > 0 => bytes[at] ^= 1 << self.below(8),
            1 if rest > 0 => bytes[at] = self.0.u8(..),
            2 => bytes.truncate(at),
            3 => put(bytes, at..at + few, &[]),
            4 => {
                let copy = bytes[at..at + few].to_vec();
                let times = 1 + self.below(16);
                put(bytes, at..at, &copy.repeat(times));
            }
            5 => {
                let noise: Vec<u8> = (0..few).map(|_| self.0.u8(..)).collect();
                put(bytes, at..at + few, &noise);
            }
            6 => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.below(other.len());
                let piece = &other[from..(from + self.below(512)).min(other.len())];
                put(bytes, at..at, piece);
            }
            7 | 8 => {
                // A number becomes another.
                let digit = |byte: &u8| byte.is_ascii_digit();
                let Some(start) = bytes[at..].iter().position(digit).map(|p| p + at) else {
                    return;
                };
                let length = bytes[start..].iter().take_while(|byte| digit(byte)).count();
                let number = NUMBERS[self.below(NUMBERS.len())];
                put(bytes, start..start + length, number.as_bytes());
            }
            9 => {
                let word = WORDS[self.below(WORDS.len())];
                put(bytes, at..at + few.min(self.below(6)), word.as_bytes());
            }
            10 if rest >= 8 => {
                let word = WORDS_64[self.below(WORDS_64.len())].to_le_bytes();
                bytes[at..at + 8].copy_from_slice(&word);
            }
            _ => {
                // Deep nesting.
                let opening = ["[", "{\"a\":", "{\"conversation\":["][self.below(3)];
                let times = 1 + self.below(20_000 / opening.len());
                put(bytes, at..at, opening.repeat(times).as_bytes());
            }
        }
    }
}
