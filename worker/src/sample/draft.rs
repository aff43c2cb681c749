//! Guesses at a reply's next tokens, looked up in what the row has read and written.
//!
//! A reply that improves on another repeats parts of it. Where the last few tokens
//! stood before, what followed them then is a guess at what follows now; a forward pass
//! over the guess costs little more than one over a single token where a step is bound
//! by reading weights. A guess changes no token: it is kept as far as the draws agree.

use std::collections::HashMap;

/// Tokens that must stand together for what follows them to be a guess: the more, the likelier
/// it is right, so longer runs are looked up first.
const GRAMS: [usize; 3] = [4, 3, 2];

/// Tokens of the first guess, and of any.
const FIRST: usize = 4;
const LONGEST: usize = 16;

/// Steps that a row pauses for after guesses that all failed: twice as long each time.
const LONGEST_PAUSE: u32 = 256;

/// One row's text as ids, and where each run of so many tokens stood last.
#[derive(Debug)]
pub(super) struct Lookup {
    text: Vec<u32>,
    /// Where the token behind each run is, but for the run at the end.
    behind: HashMap<Box<[u32]>, usize>,
    length: usize,
    pause: u32,
    next_pause: u32,
}

impl Lookup {
    pub(super) fn new(prompt: &[u32]) -> Self {
        let mut lookup = Self {
            text: Vec::with_capacity(prompt.len()),
            behind: HashMap::new(),
            length: FIRST,
            pause: 0,
            next_pause: 1,
        };
        prompt.iter().for_each(|&id| lookup.push(id));
        lookup
    }

    /// The row's text goes on with `id`.
    pub(super) fn push(&mut self, id: u32) {
        for run in last_runs(&self.text) {
            self.behind.insert(run.into(), self.text.len());
        }
        self.text.push(id);
    }

    /// A guess of at most `room` tokens; none where nothing is found, or while the row
    /// pauses. To be called once a step.
    pub(super) fn guess(&mut self, room: usize) -> &[u32] {
        if self.pause > 0 {
            self.pause -= 1;
            return &[];
        }
        let found = last_runs(&self.text).find_map(|run| self.behind.get(run).copied());
        let Some(start) = found else { return &[] };
        let end = self.text.len().min(start + self.length.min(room));
        &self.text[start..end]
    }

    /// Learns how many tokens of a guess, which was not empty, were right.
    pub(super) fn learn(&mut self, guessed: usize, right: usize) {
        if right == 0 {
            self.pause = self.next_pause;
            self.next_pause = (2 * self.next_pause).min(LONGEST_PAUSE);
            self.length = FIRST;
        } else {
            self.next_pause = 1;
            if right == guessed {
                self.length = (2 * self.length).min(LONGEST);
            }
        }
    }
}

/// The runs at a text's end, the longest first.
fn last_runs(text: &[u32]) -> impl Iterator<Item = &[u32]> {
    GRAMS.iter().filter_map(|&length| text.len().checked_sub(length).map(|start| &text[start..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_guessed() {
        let mut lookup = Lookup::new(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        lookup.push(1);
        assert!(lookup.guess(8).is_empty());
        lookup.push(2);
        assert_eq!(lookup.guess(8), [3, 4, 5, 6]);
        lookup.push(3);
        assert_eq!(lookup.guess(8), [4, 5, 6, 7]);
        assert_eq!(lookup.guess(2), [4, 5]);
        lookup.learn(4, 4);
        assert_eq!(lookup.guess(16), [4, 5, 6, 7, 8, 9, 1, 2]);
        // The latest place counts.
        for id in [0, 1, 2, 3] {
            lookup.push(id);
        }
        assert_eq!(lookup.guess(1), [0]);
    }

    #[test]
    fn the_longest_run_counts() {
        let mut lookup = Lookup::new(&[1, 2, 3, 4, 9, 3, 4, 8, 2, 3, 4, 7]);
        let guesses = [(&[5, 3, 4][..], 7), (&[5, 2, 3, 4], 7), (&[1, 2, 3, 4], 9)];
        for (ids, expected) in guesses {
            ids.iter().for_each(|&id| lookup.push(id));
            assert_eq!(lookup.guess(1), [expected], "behind {ids:?}");
        }
    }

    #[test]
    fn a_run_does_not_find_itself() {
        let mut lookup = Lookup::new(&[7, 7]);
        assert!(lookup.guess(4).is_empty());
        lookup.push(7);
        assert_eq!(lookup.guess(4), [7]);
    }

    #[test]
    fn rows_whose_guesses_fail_pause_longer_and_longer() {
        let mut lookup = Lookup::new(&[1, 2, 3, 4, 1, 2, 3]);
        let paused = |lookup: &mut Lookup| (0..).take_while(|_| lookup.guess(4).is_empty()).count();
        for expected in [0, 1, 2, 4, 8] {
            assert_eq!(paused(&mut lookup), expected);
            lookup.learn(4, 0);
        }
        assert_eq!(paused(&mut lookup), 16);
        lookup.learn(4, 1);
        lookup.learn(4, 0);
        assert_eq!(paused(&mut lookup), 1, "one right token, and it is trusted again");
    }
}
