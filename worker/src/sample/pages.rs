//! Which pages of the pool hold which row's keys and values.

use super::cache::PAGE;

/// The rows' pages, by slot. Those in use are the pool's first ones, without a gap: attention
/// goes through all of them in one product.
#[derive(Debug, Default)]
pub(super) struct Pages {
    tables: Vec<Vec<usize>>,
    used: usize,
}

/// A page's content that another page gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) from: usize,
    pub(super) to: usize,
}

impl Pages {
    /// A row without tokens, in the next slot.
    pub(super) fn admit(&mut self) {
        self.tables.push(Vec::new());
    }

    /// Has the row in `slot` hold so many tokens at least.
    pub(super) fn hold(&mut self, slot: usize, tokens: usize) {
        let table = &mut self.tables[slot];
        while table.len() * PAGE < tokens {
            table.push(self.used);
            self.used += 1;
        }
    }

    /// The pages of the row in `slot`, in the order of its tokens.
    pub(super) fn of(&self, slot: usize) -> &[usize] {
        &self.tables[slot]
    }

    /// How many are in use.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Gives the row in slot `to` the first `tokens` tokens of that in `from`.
    pub(super) fn copy(&mut self, from: usize, to: usize, tokens: usize) -> Vec<Copied> {
        self.hold(to, tokens);
        let pairs = self.tables[from].iter().zip(&self.tables[to]);
        pairs.take(tokens.div_ceil(PAGE)).map(|(&from, &to)| Copied { from, to }).collect()
    }

    /// Ends the rows in `slots`, the last first: into each moves the row of the last slot.
    /// What the last pages hold moves into the gaps.
    pub(super) fn release(&mut self, slots: &[usize]) -> Vec<Copied> {
        let mut free: Vec<usize> =
            slots.iter().flat_map(|&slot| self.tables.swap_remove(slot)).collect();
        free.sort_unstable();
        self.used -= free.len();
        let mut gaps = free.into_iter().take_while(|&page| page < self.used);
        let mut moves = Vec::new();
        for page in self.tables.iter_mut().flatten().filter(|page| **page >= self.used) {
            // As many pages lie behind the end as there are gaps before it.
            let Some(gap) = gaps.next() else { break };
            moves.push(Copied { from: std::mem::replace(page, gap), to: gap });
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_use_have_no_gap() {
        let mut pages = Pages::default();
        (0..3).for_each(|_| pages.admit());
        for (slot, tokens) in [(0, 1), (1, PAGE + 1), (2, 2 * PAGE), (0, PAGE + 1)] {
            pages.hold(slot, tokens);
        }
        assert_eq!(pages.tables, [vec![0, 5], vec![1, 2], vec![3, 4]]);
        pages.hold(1, PAGE);
        assert_eq!(pages.used(), 6, "it holds more already");

        // Of the pages 1 to 4 two are gaps, and one of page 5 is behind the end.
        assert_eq!(pages.release(&[1]), [Copied { from: 5, to: 1 }, Copied { from: 4, to: 2 }]);
        assert_eq!(pages.tables, [vec![0, 1], vec![3, 2]]);
        assert_eq!(pages.used(), 4);
        assert_eq!(pages.release(&[1, 0]), []);
        assert_eq!((pages.tables.len(), pages.used()), (0, 0));
    }

    #[test]
    fn a_row_gets_whole_pages_of_another() {
        let mut pages = Pages::default();
        pages.admit();
        pages.admit();
        pages.hold(0, 3 * PAGE);
        assert_eq!(
            pages.copy(0, 1, PAGE + 1),
            [Copied { from: 0, to: 3 }, Copied { from: 1, to: 4 }]
        );
        assert_eq!(pages.of(1), [3, 4]);
    }
}
