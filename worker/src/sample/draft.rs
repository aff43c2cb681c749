//! Guesses at a reply's next tokens, looked up in what the row has read and written.
//!
//! A reply that improves on another repeats parts of it. Where the last few tokens
//! stood before, what followed them then is a guess at what follows now; a forward pass
//! over the guess costs little more than one over a single token where a step is bound
//! by reading weights. A guess changes no token: it is kept as far as the draws agree.

use std::collections::HashMap;

/// Tokens that must stand together for what follows them to be a guess.
const GRAM: usize = 3;

/// Tokens of the first guess, and of any.
const FIRST: usize = 4;
const LONGEST: usize = 16;

/// Steps that a row pauses for after guesses that all failed: twice as long each time.
const LONGEST_PAUSE: u32 = 256;

/// One row's text as ids, and where each run of [`GRAM`] tokens stood last.
#[derive(Debug)]
pub(super) struct Lookup {
    text: Vec<u32>,
    /// Where the token behind each run is, but for the run at the end.
    behind: HashMap<[u32; GRAM], usize>,
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
        if let Some(run) = self.last_run() {
            self.behind.insert(run, self.text.len());
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
        let found = self.last_run().and_then(|run| self.behind.get(&run).copied());
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

    fn last_run(&self) -> Option<[u32; GRAM]> {
        self.text.last_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_guessed() {
        let mut lookup = Lookup::new(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert!(lookup.guess(8).is_empty());
        for id in [1, 2, 3] {
            lookup.push(id);
        }
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
    fn a_run_does_not_find_itself() {
        let mut lookup = Lookup::new(&[7, 7, 7]);
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
