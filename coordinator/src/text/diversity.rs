//! How much replies differ from each other, on words.

use std::collections::{HashMap, HashSet};

/// Longest n-grams that BLEU counts.
const ORDER: usize = 4;
/// What a precision without a single match counts as, over the n-grams there are: BLEU is a
/// geometric mean, and would be 0 for all but near copies (smoothing 1 of Chen and Cherry).
const NO_MATCH: f64 = 0.1;
/// Replies that self-BLEU compares at most, spread over all: it compares each with each.
const COMPARED: usize = 100;

/// A reply in lower-case words.
pub(crate) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_lowercase).collect()
}

/// Share of all n-grams that occur for the first time; none without n-grams.
pub(crate) fn distinct(replies: &[Vec<String>], n: usize) -> Option<f64> {
    let grams = || replies.iter().flat_map(|reply| reply.windows(n));
    let total = grams().count();
    (total > 0).then(|| grams().collect::<HashSet<_>>().len() as f64 / total as f64)
}

/// Mean BLEU of replies, each with the others as references: 1 where all are the same.
/// None for fewer than two that say something.
pub(crate) fn self_bleu(replies: &[Vec<String>]) -> Option<f64> {
    let said: Vec<&Vec<String>> = replies.iter().filter(|reply| !reply.is_empty()).collect();
    let step = said.len().div_ceil(COMPARED).max(1);
    let compared: Vec<Counted<'_>> = said.iter().step_by(step).map(|r| Counted::of(r)).collect();
    if compared.len() < 2 {
        return None;
    }
    let bleu = |at: usize| {
        let others = compared.iter().enumerate().filter(|(other, _)| *other != at);
        compared[at].bleu(others.map(|(_, other)| other))
    };
    Some((0..compared.len()).map(bleu).sum::<f64>() / compared.len() as f64)
}

/// A reply with its n-grams counted, by their length.
struct Counted<'a> {
    words: usize,
    grams: [HashMap<&'a [String], usize>; ORDER],
}

impl<'a> Counted<'a> {
    fn of(reply: &'a [String]) -> Self {
        let mut grams: [HashMap<&[String], usize>; ORDER] = Default::default();
        for (n, grams) in (1..).zip(&mut grams) {
            for gram in reply.windows(n) {
                *grams.entry(gram).or_default() += 1;
            }
        }
        Self { words: reply.len(), grams }
    }

    fn bleu<'b>(&self, references: impl Iterator<Item = &'b Counted<'a>> + Clone) -> f64
    where
        'a: 'b,
    {
        let mut log_sum = 0.0;
        let mut orders = 0;
        for (n, grams) in self.grams.iter().enumerate() {
            let total: usize = grams.values().sum();
            if total == 0 {
                continue; // The reply is shorter than that.
            }
            let matched = |(gram, count): (&&[String], &usize)| {
                let most = references.clone().filter_map(|r| r.grams[n].get(*gram)).max();
                most.map_or(0, |most| (*most).min(*count))
            };
            let matches: usize = grams.iter().map(matched).sum();
            let matches = if matches == 0 { NO_MATCH } else { matches as f64 };
            log_sum += (matches / total as f64).ln();
            orders += 1;
        }
        let nearest = references.map(|r| r.words).min_by_key(|w| (w.abs_diff(self.words), *w));
        let shortfall = nearest.unwrap_or(0) as f64 / self.words as f64;
        let brevity = (1.0 - shortfall).min(0.0).exp();
        brevity * (log_sum / f64::from(orders.max(1))).exp()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn replies(texts: &[&str]) -> Vec<Vec<String>> {
        texts.iter().map(|text| words(text)).collect()
    }

    #[test]
    fn distinct_counts_first_occurrences() {
        let two = replies(&["the cat the cat", "The dog"]);
        assert_eq!(distinct(&two, 1), Some(3.0 / 6.0));
        // the cat, cat the, the cat; the dog.
        assert_eq!(distinct(&two, 2), Some(3.0 / 4.0));
        assert_eq!(distinct(&two, 5), None);
    }

    #[test]
    fn copies_have_a_self_bleu_of_one_and_strangers_near_none() {
        let copies = replies(&["a b c d e f"; 3]);
        assert!((self_bleu(&copies).unwrap() - 1.0).abs() < 1e-12);
        assert!((self_bleu(&replies(&["a b", "a b"])).unwrap() - 1.0).abs() < 1e-12);
        let strangers = replies(&["a b c d e f", "g h i j k l"]);
        assert!(self_bleu(&strangers).unwrap() < 0.05);
        assert_eq!(self_bleu(&replies(&["a b", " "])), None);
    }

    /// `sentence_bleu` of NLTK 3.9 with `SmoothingFunction().method1`, by hand: precisions
    /// 5/6, 3/5, 1/4 and (0.1)/3 of one, and brevity 1.
    #[test]
    fn bleu_is_that_of_the_formula() {
        let pair = replies(&["the cat sat on the mat", "the cat sat by the mat"]);
        let expected = (5.0_f64 / 6.0 * 3.0 / 5.0 * 1.0 / 4.0 * 0.1 / 3.0).powf(0.25);
        assert!((self_bleu(&pair).unwrap() - expected).abs() < 1e-12);
        let short = replies(&["a b c d", "a b c d e"]);
        let first = (1.0_f64 - 5.0 / 4.0).exp();
        let second = (4.0_f64 / 5.0 * 3.0 / 4.0 * 2.0 / 3.0 * 1.0 / 2.0).powf(0.25);
        assert!((self_bleu(&short).unwrap() - (first + second) / 2.0).abs() < 1e-12);
    }
}
