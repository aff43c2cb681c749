//! Which prompts begin alike: what they share is computed and kept once.

use std::ops::Range;

/// A stretch of tokens with which several prompts go on behind what its parent holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stretch {
    /// What comes before it; nothing for one that prompts begin with.
    pub(super) parent: Option<usize>,
    /// Which tokens of its prompts it is.
    pub(super) tokens: Range<usize>,
    /// A prompt that has it.
    pub(super) prompt: usize,
}

/// What a set of prompts shares: a forest of stretches, parents before children.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Prefixes {
    pub(super) stretches: Vec<Stretch>,
    /// The last stretch of each prompt's shared beginning.
    pub(super) last: Vec<Option<usize>>,
}

impl Prefixes {
    /// Of `prompts`, each with a token at least: stretches that save `least` tokens. A
    /// prompt's last token is never shared: each row has one to compute, and its reply
    /// begins with what comes of it.
    pub(super) fn of(prompts: &[&[u32]], least: usize) -> Self {
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        order.sort_by_key(|&at| prompts[at]);
        let mut prefixes = Self::none(prompts.len());
        prefixes.share(prompts, least, &order, 0, None);
        prefixes
    }

    /// Of `prompts` prompts that share nothing.
    pub(super) fn none(prompts: usize) -> Self {
        Self { stretches: Vec::new(), last: vec![None; prompts] }
    }

    /// Shares what all of `some`, in order of their tokens, have in common from token
    /// `from` on, and then what parts of them have beyond that.
    fn share(
        &mut self,
        prompts: &[&[u32]],
        least: usize,
        some: &[usize],
        from: usize,
        parent: Option<usize>,
    ) {
        let (Some(&first), Some(&last)) = (some.first(), some.last()) else { return };
        if some.len() < 2 {
            return;
        }
        let common = common_prefix(prompts[first], prompts[last]);
        let shortest = some.iter().map(|&at| prompts[at].len()).min().unwrap_or(0);
        let end = common.min(shortest - 1);
        let (from, parent) = if end.saturating_sub(from) * (some.len() - 1) >= least {
            let stretch = Some(self.stretches.len());
            self.stretches.push(Stretch { parent, tokens: from..end, prompt: first });
            for &at in some {
                self.last[at] = stretch;
            }
            (end, stretch)
        } else {
            (from, parent)
        };
        // Those that end here are alike in all; the others part by their next token.
        for group in some.chunk_by(|&a, &b| prompts[a].get(common) == prompts[b].get(common)) {
            if prompts[group[0]].len() > common {
                self.share(prompts, least, group, from, parent);
            }
        }
    }

    /// The stretches of a beginning that ends with `last`, from its end to its start.
    pub(super) fn path(&self, last: Option<usize>) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(last, |&at| self.stretches[at].parent)
    }

    /// Tokens of a beginning that ends with `last`.
    pub(super) fn length(&self, last: Option<usize>) -> usize {
        last.map_or(0, |at| self.stretches[at].tokens.end)
    }
}

pub(super) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LEAST: usize = 256;

    /// `parts` after one another, each a token `length` times.
    fn prompt(parts: &[(u32, usize)]) -> Vec<u32> {
        parts.iter().flat_map(|&(token, length)| vec![token; length]).collect()
    }

    fn shared(prompts: &[Vec<u32>]) -> Prefixes {
        Prefixes::of(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>(), LEAST)
    }

    #[test]
    fn a_tree_of_beginnings_is_found() {
        let system = (1, 400);
        let prompts = [
            prompt(&[system, (2, 300), (3, 5)]),
            prompt(&[system, (4, 9)]),
            prompt(&[system, (2, 300), (5, 2)]),
            prompt(&[(6, 50)]),
        ];
        let prefixes = shared(&prompts);
        let stretch = |parent, tokens, prompt| Stretch { parent, tokens, prompt };
        assert_eq!(prefixes.stretches, [stretch(None, 0..400, 0), stretch(Some(0), 400..700, 0)],);
        assert_eq!(prefixes.last, [Some(1), Some(0), Some(1), None]);
        assert_eq!(prefixes.path(Some(1)).collect::<Vec<_>>(), [1, 0]);
        assert_eq!((prefixes.length(Some(1)), prefixes.length(None)), (700, 0));
    }

    #[test]
    fn a_prompts_last_token_is_its_own() {
        let prefixes = shared(&vec![prompt(&[(1, 1000)]); 128]);
        assert_eq!(prefixes.stretches.len(), 1);
        assert_eq!(prefixes.stretches[0].tokens, 0..999);
        // One is the beginning of the other.
        let prefixes = shared(&[prompt(&[(1, 1000)]), prompt(&[(1, 1000), (2, 500)])]);
        assert_eq!(prefixes.stretches[0].tokens, 0..999);
        assert_eq!(prefixes.last, [Some(0), Some(0)]);
    }

    #[test]
    fn what_saves_little_is_not_shared() {
        let pair =
            |length| shared(&[prompt(&[(1, length), (2, 3)]), prompt(&[(1, length), (3, 3)])]);
        assert_eq!(pair(LEAST - 1).stretches, []);
        assert_eq!(pair(LEAST).stretches.len(), 1);
        // A short beginning of many prompts does.
        let many: Vec<_> = (0..60).map(|at| prompt(&[(1, 20), (2 + at, 3)])).collect();
        assert_eq!(shared(&many).stretches[0].tokens, 0..20);
        // And what follows a beginning that is not worth it still may.
        let three = [
            prompt(&[(1, 2), (2, 900), (3, 1)]),
            prompt(&[(1, 2), (2, 900), (4, 1)]),
            prompt(&[(1, 2), (5, 7)]),
        ];
        let prefixes = shared(&three);
        assert_eq!(prefixes.stretches[0].tokens, 0..902);
        assert_eq!(prefixes.last, [Some(0), Some(0), None]);
        assert_eq!(shared(&[prompt(&[(1, 1)])]).last, [None]);
        assert_eq!(shared(&[]).last, []);
    }
}
