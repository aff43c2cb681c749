//! Rows of preference pairs: two replies to one prompt, as text and as token ids.

mod counts;

use serde::{Deserialize, Serialize};

pub use self::counts::{DropReason, PairCounts};
use super::error::TextError;
use super::held_out::HeldOutSet;
use super::model::{TextModel, keep_end};
use super::python;
use crate::config::Overlong;
use crate::domain::{
    Iteration, Message, Origin, PairId, PairRow, Sample, SeedPair, Side, TokenPair,
};

/// Candidates that are rendered and encoded together; bounds the memory of texts.
const BATCH: usize = 512;

/// Bounds on token ids (the recipe's are 2,048 and 1,024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// Prompt and one response together.
    pub max_length: usize,
    /// The prompt alone; its end is kept.
    pub max_prompt: usize,
    /// What becomes of a pair with a longer prompt or reply.
    pub overlong: Overlong,
}

/// One side of a pair before it is tokenised.
#[derive(Debug, Clone, Copy)]
pub enum Reply<'a> {
    /// Words of the corpus.
    Corpus {
        /// The reply.
        text: &'a str,
        /// The record it stands in.
        origin: &'a Origin,
    },
    /// A sample of the policy: its ids are kept as they were drawn.
    Drawn {
        /// The iteration that drew it.
        iteration: Iteration,
        /// The sample.
        sample: &'a Sample,
    },
}

/// A pair to be: two replies to one prompt.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// x: the conversation before the reply.
    pub context: &'a [Message],
    /// y⁺.
    pub chosen: Reply<'a>,
    /// y⁻.
    pub rejected: Reply<'a>,
    /// Why it makes no pair, if neither of its sides is at fault.
    pub flaw: Option<DropReason>,
}

/// The warm start's pairs, both sides from the corpus, in its order.
///
/// # Errors
/// As [`build_pairs`].
pub fn seed_pairs(
    text: &TextModel,
    pairs: &[SeedPair],
    lengths: Lengths,
    held_out: &HeldOutSet,
) -> Result<(Vec<PairRow>, PairCounts), TextError> {
    let candidates: Vec<_> = pairs
        .iter()
        .map(|pair| Candidate {
            context: &pair.context,
            chosen: Reply::Corpus { text: &pair.chosen, origin: &pair.origin },
            rejected: Reply::Corpus { text: &pair.rejected, origin: &pair.origin },
            flaw: None,
        })
        .collect();
    build_pairs(text, &candidates, lengths, held_out)
}

/// Makes rows of `candidates`, in their order; a row's id is its number among
/// the rows. What is dropped or cut is counted.
///
/// # Errors
/// A template or tokenizer that fails; a template that refuses a conversation
/// costs only that candidate.
pub fn build_pairs(
    text: &TextModel,
    candidates: &[Candidate<'_>],
    lengths: Lengths,
    held_out: &HeldOutSet,
) -> Result<(Vec<PairRow>, PairCounts), TextError> {
    let mut rows = Vec::new();
    let mut counts = PairCounts { candidates: candidates.len() as u64, ..PairCounts::default() };
    for batch in candidates.chunks(BATCH) {
        let (taken, prompts) = render_prompts(text, batch, &mut counts)?;
        let prompts = text.encode_all(&prompts)?;
        let chosen = responses(text, taken.iter().map(|candidate| candidate.chosen))?;
        let rejected = responses(text, taken.iter().map(|candidate| candidate.rejected))?;
        for (((candidate, prompt), chosen), rejected) in
            taken.into_iter().zip(prompts).zip(chosen).zip(rejected)
        {
            let cut = cut(prompt, &chosen, &rejected, lengths);
            match cut.and_then(|cut| candidate.flaw.map_or(Ok(cut), Err)) {
                Err(reason) => *counts.dropped.entry(reason).or_default() += 1,
                Ok(cut) => {
                    let held_out = held_out.contains(candidate.context);
                    counts.add(&cut, held_out);
                    let replies = [(candidate.chosen, &chosen), (candidate.rejected, &rejected)];
                    for (reply, Response { text, .. }) in replies {
                        if let Reply::Drawn { sample, .. } = reply {
                            counts.add_drawn(sample.finish, text);
                        }
                    }
                    rows.push(PairRow {
                        context: candidate.context.to_vec(),
                        chosen: chosen.text,
                        rejected: rejected.text,
                        tokens: TokenPair { id: PairId(rows.len() as u64), ..cut.tokens },
                        chosen_from: side(candidate.chosen),
                        rejected_from: side(candidate.rejected),
                        held_out,
                    });
                }
            }
        }
    }
    Ok((rows, counts))
}

/// The batch without what the template refuses, and each one's rendered prompt.
fn render_prompts<'a, 'b>(
    text: &TextModel,
    batch: &'b [Candidate<'a>],
    counts: &mut PairCounts,
) -> Result<(Vec<&'b Candidate<'a>>, Vec<String>), TextError> {
    let mut taken = Vec::with_capacity(batch.len());
    let mut prompts = Vec::with_capacity(batch.len());
    for candidate in batch {
        match text.apply_chat_template(candidate.context, true) {
            Ok(prompt) => {
                taken.push(candidate);
                prompts.push(prompt);
            }
            Err(TextError::Refused { message, .. }) => {
                *counts.dropped.entry(DropReason::TemplateRefused).or_default() += 1;
                counts.first_refusal.get_or_insert(message);
            }
            Err(other) => return Err(other),
        }
    }
    Ok((taken, prompts))
}

/// A reply as text and as ids before cutting, its end-of-sequence id included.
struct Response {
    text: String,
    ids: Vec<u32>,
}

fn responses<'a>(
    text: &TextModel,
    replies: impl Iterator<Item = Reply<'a>> + Clone,
) -> Result<Vec<Response>, TextError> {
    let words: Vec<&str> = replies
        .clone()
        .filter_map(|reply| match reply {
            Reply::Corpus { text: words, .. } => Some(text.reply_text(words)),
            Reply::Drawn { .. } => None,
        })
        .collect();
    let mut encoded = text.encode_all(&words)?.into_iter();
    replies
        .map(|reply| match reply {
            Reply::Corpus { text: words, .. } => Ok(Response {
                text: words.to_owned(),
                ids: text.closed(encoded.next().unwrap_or_default(), true, usize::MAX),
            }),
            Reply::Drawn { sample, .. } => {
                let ids = text.sampled_response(sample, usize::MAX);
                Ok(Response { text: text.decode(&ids)?, ids })
            }
        })
        .collect()
}

/// A pair cut to length, and what it lost.
struct CutPair {
    tokens: TokenPair,
    prompt_cut: bool,
    chosen_cut: bool,
    rejected_cut: bool,
}

fn cut(
    prompt: Vec<u32>,
    chosen: &Response,
    rejected: &Response,
    lengths: Lengths,
) -> Result<CutPair, DropReason> {
    let says = |response: &Response| python::strip(&response.text, None, true, true).to_owned();
    let (chosen_says, rejected_says) = (says(chosen), says(rejected));
    if chosen_says.is_empty() {
        return Err(DropReason::EmptyChosen);
    }
    if rejected_says.is_empty() {
        return Err(DropReason::EmptyRejected);
    }
    if chosen_says == rejected_says {
        return Err(DropReason::EqualSides);
    }
    let prompt_len = prompt.len();
    let prompt = keep_end(prompt, lengths.max_prompt);
    let room = lengths.max_length.saturating_sub(prompt.len());
    if room == 0 {
        return Err(DropReason::NoRoom);
    }
    let first = |ids: &[u32]| ids[..ids.len().min(room)].to_vec();
    let tokens = TokenPair {
        id: PairId::default(),
        chosen: first(&chosen.ids),
        rejected: first(&rejected.ids),
        prompt,
    };
    if tokens.chosen == tokens.rejected {
        return Err(DropReason::EqualSides);
    }
    let pair = CutPair {
        prompt_cut: tokens.prompt.len() < prompt_len,
        chosen_cut: tokens.chosen.len() < chosen.ids.len(),
        rejected_cut: tokens.rejected.len() < rejected.ids.len(),
        tokens,
    };
    match lengths.overlong {
        Overlong::Cut => Ok(pair),
        Overlong::Drop if pair.prompt_cut => Err(DropReason::OverlongPrompt),
        Overlong::Drop if pair.chosen_cut => Err(DropReason::OverlongChosen),
        Overlong::Drop if pair.rejected_cut => Err(DropReason::OverlongRejected),
        Overlong::Drop => Ok(pair),
    }
}

fn side(reply: Reply<'_>) -> Side {
    match reply {
        Reply::Corpus { origin, .. } => Side::Corpus { origin: origin.clone() },
        Reply::Drawn { iteration, sample } => Side::Sample {
            iteration,
            prompt: sample.prompt,
            index: sample.index,
            finish: sample.finish,
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
