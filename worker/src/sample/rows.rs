//! Rows: replies in the making, and what each computes next.

use std::collections::VecDeque;

use super::cache::Region;
use super::draft::Lookup;
use super::pages::{Copied, Pages};
use super::pick::{Draw, Drawn};
use super::prefix::{Prefixes, common_prefix};
use super::step::{Owner, Piece, Step};
use super::{Finish, Prompt, Sample, SamplingParams, Shard, Uniforms, Work};

/// Tokens of prompts in one step at most, so that rows which decode do not wait long.
const PREFILL_TOKENS: usize = 512;

/// Tokens that a row may be ahead of the shortest reply and still guess, where no prompt waits:
/// a step with a guess takes longer, and then only who will be last matters.
const AHEAD: usize = 8;

/// Tokens with which two rows must begin alike for one to copy them from the other. Copying
/// takes four small operations a layer, which is a token's time on a CPU, and about that of
/// so many tokens of a 7B model on a GPU.
const LEAST_COPIED: usize = 16;

/// A reply in the making.
#[derive(Debug)]
struct Row {
    /// Its prompt's place in the shard.
    at: usize,
    /// Tokens of its prompt that are shared.
    shared: usize,
    /// Of its own tokens, those that the cache holds.
    computed: usize,
    /// Whose first tokens it waits for.
    donor: Option<Donor>,
    reply: Vec<u32>,
    logps: Vec<f32>,
    uniforms: Uniforms,
    /// None where guessing is off.
    lookup: Option<Lookup>,
    /// The guess that is being computed.
    guess: Vec<u32>,
}

/// A row that begins alike.
#[derive(Debug, Clone, Copy)]
struct Donor {
    /// Its prompt's place in the shard.
    at: usize,
    /// Own tokens that both have.
    common: usize,
}

/// The rows of a shard: those in slots, those that wait for one, and what they share.
pub(super) struct Rows<'a> {
    shard: &'a Shard,
    prefixes: &'a Prefixes,
    /// By slot.
    live: Vec<Row>,
    pages: Pages,
    slots: usize,
    /// Tokens of a step that cost no more than one.
    draft_tokens: usize,
    waiting: VecDeque<usize>,
    /// Of each shared stretch, tokens that the cache holds; none before a row wants it.
    stretches: Vec<Option<usize>>,
    /// Where the pool has each stretch.
    places: &'a [Region],
    samples: Vec<Option<Sample>>,
    pub(super) work: Work,
}

impl<'a> Rows<'a> {
    pub(super) fn new(
        shard: &'a Shard,
        prefixes: &'a Prefixes,
        places: &'a [Region],
        slots: usize,
        draft_tokens: usize,
    ) -> Self {
        Self {
            shard,
            prefixes,
            live: Vec::new(),
            pages: Pages::default(),
            slots,
            draft_tokens,
            waiting: (0..shard.prompts.len()).collect(),
            stretches: vec![None; prefixes.stretches.len()],
            places,
            samples: vec![None; shard.prompts.len()],
            work: Work::default(),
        }
    }

    /// Whether every prompt has its reply.
    pub(super) fn are_done(&self) -> bool {
        self.live.is_empty() && self.waiting.is_empty()
    }

    /// Tokens of replies so far, and replies that have ended.
    pub(super) fn drawn(&self) -> (u64, u32) {
        let ended = self.samples.iter().flatten();
        let tokens = ended.clone().map(|sample| sample.tokens.len()).sum::<usize>()
            + self.live.iter().map(|row| row.reply.len()).sum::<usize>();
        (tokens as u64, ended.count() as u32)
    }

    /// Where the pool has the rows' tokens.
    pub(super) fn pages(&self) -> &Pages {
        &self.pages
    }

    pub(super) fn into_samples(self) -> Vec<Sample> {
        self.samples.into_iter().flatten().collect()
    }

    /// Gives waiting prompts the free slots.
    pub(super) fn admit(&mut self) {
        while self.live.len() < self.slots
            && let Some(at) = self.waiting.pop_front()
        {
            let Shard { seed, iteration, prompts, .. } = self.shard;
            let Prompt { prompt, index, tokens } = &prompts[at];
            let last = self.prefixes.last[at];
            for stretch in self.prefixes.path(last) {
                self.stretches[stretch].get_or_insert(0);
            }
            let shared = self.prefixes.length(last);
            self.pages.admit();
            self.live.push(Row {
                at,
                shared,
                computed: 0,
                donor: self.donor(at, shared),
                reply: Vec::new(),
                logps: Vec::new(),
                uniforms: Uniforms::new(*seed, *iteration, *prompt, *index),
                lookup: (self.draft_tokens > 0).then(|| Lookup::new(tokens)),
                guess: Vec::new(),
            });
        }
    }

    /// The live row that has most of the tokens with which a prompt's own begin, the first of
    /// several; none where that is not worth it. A row's last token is always its own.
    fn donor(&self, at: usize, shared: usize) -> Option<Donor> {
        let own = |at: usize| &self.shard.prompts[at].tokens[shared..];
        let most = own(at).len() - 1;
        let behind = self.prefixes.last[at];
        let alike = self.live.iter().filter(|row| self.prefixes.last[row.at] == behind);
        let donors = alike.map(|row| {
            let common = common_prefix(own(at), own(row.at)).min(most);
            Donor { at: row.at, common }
        });
        let worth_it = donors.filter(|donor| donor.common >= LEAST_COPIED);
        worth_it.rev().max_by_key(|donor| donor.common)
    }

    /// What rows are given that waited for another's first tokens, which are there now: row
    /// after row. Each waits for one that was admitted before it, so that one of them can
    /// always go on.
    pub(super) fn copies(&mut self) -> Vec<Vec<Copied>> {
        let mut copies = Vec::new();
        for to in 0..self.live.len() {
            let Some(Donor { at, common }) = self.live[to].donor else { continue };
            let from = self.live.iter().position(|row| row.at == at);
            match from.map(|from| (from, self.live[from].computed)) {
                Some((_, computed)) if computed < common => continue,
                Some((from, _)) => {
                    self.live[to].computed = common;
                    copies.push(self.pages.copy(from, to, common));
                }
                // It has ended.
                None => {}
            }
            self.live[to].donor = None;
        }
        copies
    }

    /// What is computed next: one token of each row that decodes, with a guess behind it
    /// where that is cheap, and a bounded number of tokens of prompts.
    pub(super) fn next_step(&mut self) -> Step {
        let mut pieces = Vec::new();
        let mut room = PREFILL_TOKENS;
        for (stretch, computed) in self.stretches.iter_mut().enumerate() {
            let (Some(before), shared) = (computed, &self.prefixes.stretches[stretch]) else {
                continue;
            };
            let length = room.min(shared.tokens.len() - *before);
            if length > 0 {
                let start = shared.tokens.start + *before;
                let tokens = &self.shard.prompts[shared.prompt].tokens[start..start + length];
                pieces.push(Piece {
                    owner: Owner::Stretch(self.places[stretch]),
                    tokens: tokens.to_vec(),
                    before: *before,
                    behind: shared.parent,
                    wanted: 0,
                });
                room -= length;
                *before += length;
            }
        }
        let (decoding, reading): (Vec<usize>, Vec<usize>) =
            (0..self.live.len()).partition(|&slot| !self.live[slot].reply.is_empty());
        for slot in reading {
            pieces.extend(self.prompt_piece(slot, &mut room));
        }
        // Beside prompts, or many rows, a guess is not cheap.
        let free = if room == PREFILL_TOKENS { self.draft_tokens } else { 0 };
        let length = |slot: &usize| self.live[*slot].reply.len();
        let most = match self.waiting.is_empty() {
            true => decoding.iter().map(length).min().unwrap_or(0) + AHEAD,
            false => usize::MAX,
        };
        let (guessing, plain): (Vec<usize>, Vec<usize>) =
            decoding.into_iter().partition(|slot| length(slot) <= most);
        let guess_room = free.saturating_sub(guessing.len() + plain.len()) / guessing.len().max(1);
        for (slots, guess_room) in [(guessing, guess_room), (plain, 0)] {
            pieces.extend(slots.into_iter().map(|slot| self.reply_piece(slot, guess_room)));
        }
        self.work.steps += 1;
        self.work.prefilled += (PREFILL_TOKENS - room) as u64;
        Step::new(pieces)
    }

    /// The next tokens of a row's prompt; none while there is no room, or while what comes
    /// before them is not there.
    fn prompt_piece(&mut self, slot: usize, room: &mut usize) -> Option<Piece> {
        let row = &mut self.live[slot];
        let behind = self.prefixes.last[row.at];
        let is_there =
            |at: usize| self.stretches[at] == Some(self.prefixes.stretches[at].tokens.len());
        let own = &self.shard.prompts[row.at].tokens[row.shared..];
        let length = (*room).min(own.len() - row.computed);
        if length == 0 || row.donor.is_some() || !self.prefixes.path(behind).all(is_there) {
            return None;
        }
        let tokens = own[row.computed..row.computed + length].to_vec();
        let (before, end) = (row.computed, row.computed + length);
        row.computed = end;
        self.pages.hold(slot, end);
        *room -= length;
        let wanted = usize::from(end == own.len());
        Some(Piece { owner: Owner::Slot(slot), tokens, before, behind, wanted })
    }

    /// A row's last token, and a guess at the next.
    fn reply_piece(&mut self, slot: usize, guess_room: usize) -> Piece {
        let row = &mut self.live[slot];
        let left = self.shard.params.max_new_tokens as usize - row.reply.len();
        let room = guess_room.min(left - 1);
        let guess = match &mut row.lookup {
            Some(lookup) if room > 0 => lookup.guess(room),
            _ => &[],
        };
        row.guess = guess.to_vec();
        let tokens = row.reply.last().copied().into_iter().chain(row.guess.iter().copied());
        let tokens: Vec<u32> = tokens.collect();
        self.pages.hold(slot, row.computed + tokens.len());
        Piece {
            owner: Owner::Slot(slot),
            wanted: tokens.len(),
            tokens,
            before: row.computed,
            behind: self.prefixes.last[row.at],
        }
    }

    /// What each wanted hidden state of `step` is drawn with, in their order.
    pub(super) fn draws(&self, step: &Step) -> Vec<Draw<'_>> {
        let mut draws = Vec::new();
        for piece in &step.pieces {
            let Owner::Slot(slot) = piece.owner else { continue };
            let row = &self.live[slot];
            let prompt = &self.shard.prompts[row.at].tokens;
            draws.extend((0..piece.wanted).map(|ahead| Draw {
                uniform: row.uniforms.at((row.reply.len() + ahead) as u32),
                position: row.reply.len() + ahead,
                seen: [prompt, &row.reply, &row.guess[..ahead]],
            }));
        }
        draws
    }

    /// Takes what was drawn for `step`. The rows of the last slots move into those that others
    /// have left; returned is what moves in the pool.
    pub(super) fn take(&mut self, step: &Step, drawn: &[Drawn]) -> Vec<Copied> {
        let mut rest = drawn;
        let mut ended = Vec::new();
        for piece in &step.pieces {
            let Owner::Slot(slot) = piece.owner else { continue };
            let (wanted, behind) = rest.split_at(piece.wanted);
            rest = behind;
            let row = &mut self.live[slot];
            if let Some(finish) = row.take(wanted, &self.shard.params, &mut self.work) {
                ended.push((slot, finish));
            }
        }
        ended.sort_unstable_by_key(|&(slot, _)| std::cmp::Reverse(slot));
        for &(slot, finish) in &ended {
            let Row { at, reply, logps, .. } = self.live.swap_remove(slot);
            let Prompt { prompt, index, .. } = self.shard.prompts[at];
            self.samples[at] = Some(Sample { prompt, index, tokens: reply, logps, finish });
        }
        let slots: Vec<usize> = ended.into_iter().map(|(slot, _)| slot).collect();
        self.pages.release(&slots)
    }
}

impl Row {
    /// Takes tokens drawn one after another, as far as each but the last was guessed.
    fn take(
        &mut self,
        drawn: &[Drawn],
        params: &SamplingParams,
        work: &mut Work,
    ) -> Option<Finish> {
        let guess = std::mem::take(&mut self.guess);
        let (mut right, mut finish) = (0, None);
        let was_decoding = !self.reply.is_empty();
        let mut taken = 0;
        for &Drawn { id, logp } in drawn {
            self.reply.push(id);
            self.logps.push(logp);
            taken += 1;
            if let Some(lookup) = &mut self.lookup {
                lookup.push(id);
            }
            if params.stop_ids.contains(&id) {
                finish = Some(Finish::Stop);
            } else if self.reply.len() == params.max_new_tokens as usize {
                finish = Some(Finish::Length);
            }
            if guess.get(right) != Some(&id) {
                break;
            }
            right += 1;
            if finish.is_some() {
                break;
            }
        }
        if was_decoding {
            // Each token but the last one drawn is computed; wrong guesses are overwritten.
            self.computed += taken;
        }
        if !guess.is_empty() {
            work.guessed += guess.len() as u64;
            work.guessed_right += right as u64;
            if let Some(lookup) = &mut self.lookup {
                lookup.learn(guess.len(), right);
            }
        }
        finish
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::SamplingEngine;

    /// New tokens of slots 0 and 1 in the steps in which these guess, rightly in slot 0 and
    /// wrongly in slot 1; of `prompts` alike.
    fn guesses(prompts: u64) -> Vec<[usize; 2]> {
        let prompt = |prompt| {
            // From the first token on they are no copies of each other.
            let tokens = std::iter::once(100 + prompt as u32).chain(0..60).chain(0..2);
            Prompt { prompt, index: 0, tokens: tokens.collect() }
        };
        let shard = Shard {
            seed: 1,
            iteration: 1,
            params: SamplingParams { max_new_tokens: 60, ..SamplingParams::default() },
            engine: SamplingEngine::default(),
            prompts: (0..prompts).map(prompt).collect(),
        };
        let prefixes = Prefixes::none(shard.prompts.len());
        let mut rows = Rows::new(&shard, &prefixes, &[], 2, 16);
        rows.admit();
        let drawn = |id: u32| Drawn { id, logp: 0.0 };
        let step = rows.next_step();
        assert!(rows.take(&step, &[drawn(2), drawn(2)]).is_empty());
        let mut lengths = Vec::new();
        let (mut right, mut wrong) = (3.., 200..);
        for _ in 0..4 {
            let step = rows.next_step();
            let of_step = [0, 1].map(|slot| step.pieces[slot].tokens.len());
            let mut ids: Vec<Drawn> = right.by_ref().take(of_step[0]).map(drawn).collect();
            ids.extend(wrong.by_ref().take(of_step[1]).map(drawn));
            assert!(rows.take(&step, &ids).is_empty());
            lengths.push(of_step);
        }
        lengths
    }

    #[test]
    fn who_is_ahead_guesses_for_those_that_wait_alone() {
        // Four tokens, then as many as there is room for; the other finds nothing behind new ones.
        assert_eq!(guesses(2), [[5, 5], [8, 1], [1, 1], [1, 1]]);
        assert_eq!(guesses(3), [[5, 5], [8, 1], [8, 1], [8, 1]]);
    }
}
