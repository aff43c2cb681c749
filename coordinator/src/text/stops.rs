//! Stop strings: where a sampled reply is cut because of what it says.
//!
//! Workers see no text, so they draw on past a stop string, to a stop id or to the last
//! token allowed. The reply is cut here, when samples become pairs; the journal keeps what
//! was drawn.

use super::error::TextError;
use super::model::TextModel;
use crate::domain::{FinishReason, Sample};

/// `samples`, each cut ahead of the first place where any of `stop_strings` occurs in its
/// text. A reply that was cut has stopped by itself: [`FinishReason::Stop`].
///
/// Ids are kept as they were drawn as far as they lie ahead of the cut. Where it falls
/// inside a token, the part ahead of it is encoded anew. Special tokens have no text, so
/// none of them is part of a stop string.
///
/// # Errors
/// The tokenizer library's.
pub fn cut_at_stops(
    text: &TextModel,
    mut samples: Vec<Sample>,
    stop_strings: &[String],
) -> Result<Vec<Sample>, TextError> {
    if stop_strings.is_empty() {
        return Ok(samples);
    }
    for sample in &mut samples {
        let says = text.decode(&sample.tokens)?;
        let found = stop_strings.iter().filter_map(|stop| says.find(stop.as_str())).min();
        if let Some(end) = found {
            sample.tokens = ids_ahead(text, &sample.tokens, &says[..end])?;
            sample.finish = FinishReason::Stop;
        }
    }
    Ok(samples)
}

/// Ids that say `kept`, which is how `tokens` begin: these themselves, and what it takes
/// of the token that is cut.
fn ids_ahead(text: &TextModel, tokens: &[u32], kept: &str) -> Result<Vec<u32>, TextError> {
    let mut whole = last_within(text, tokens, kept.len())?;
    let mut says = text.decode(&tokens[..whole])?;
    // Part of a character's bytes decode to another character.
    while !kept.starts_with(&says) {
        whole -= 1;
        says = text.decode(&tokens[..whole])?;
    }
    let mut ids = tokens[..whole].to_vec();
    ids.extend(text.encode(&kept[says.len()..])?);
    // A tokenizer that opens every text with a space cannot say a part of a word.
    if text.decode(&ids)? != kept {
        ids.truncate(whole);
    }
    Ok(ids)
}

/// How many of `tokens` decode to `length` bytes at most.
fn last_within(text: &TextModel, tokens: &[u32], length: usize) -> Result<usize, TextError> {
    let (mut within, mut beyond) = (0, tokens.len() + 1);
    while beyond - within > 1 {
        let middle = usize::midpoint(within, beyond);
        if text.decode(&tokens[..middle])?.len() <= length {
            within = middle;
        } else {
            beyond = middle;
        }
    }
    Ok(within)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::fixture::{END, EOS, model, word};
    use super::*;
    use crate::domain::PromptId;

    fn cut(tokens: &[u32], finish: FinishReason, stops: &[&str]) -> (Vec<u32>, FinishReason) {
        let sample = Sample { prompt: PromptId(4), index: 1, tokens: tokens.to_vec(), finish };
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let cut = cut_at_stops(&model(), vec![sample], &stops).unwrap().swap_remove(0);
        assert_eq!((cut.prompt, cut.index), (PromptId(4), 1));
        (cut.tokens, cut.finish)
    }

    #[test]
    fn a_reply_ends_ahead_of_the_first_stop_string() {
        let drawn = [word(1), word(2), word(3), word(4), word(2)];
        let ahead = |stops: &[&str]| cut(&drawn, FinishReason::Length, stops);
        assert_eq!(ahead(&["w3"]), (vec![word(1), word(2)], FinishReason::Stop));
        assert_eq!(ahead(&["w4 w2", "w2 w3"]), (vec![word(1)], FinishReason::Stop));
        assert_eq!(ahead(&["w1"]), (vec![], FinishReason::Stop));
        assert_eq!(ahead(&["w5", "w2 w4"]), (drawn.to_vec(), FinishReason::Length));
        assert_eq!(ahead(&[]), (drawn.to_vec(), FinishReason::Length));
    }

    #[test]
    fn a_token_that_is_cut_in_two_is_encoded_anew() {
        let drawn = [word(1), word(72), word(3), EOS];
        let (ids, finish) = cut(&drawn, FinishReason::Stop, &["2 w3"]);
        assert_eq!((ids, finish), (vec![word(1), word(7)], FinishReason::Stop));
    }

    #[test]
    fn a_cut_reply_is_a_complete_one() {
        let drawn = [word(1), word(2), word(3)];
        let (tokens, finish) = cut(&drawn, FinishReason::Length, &["w3"]);
        let sample = Sample { prompt: PromptId(0), index: 0, tokens, finish };
        assert_eq!(model().sampled_response(&sample, 10), [word(1), word(2), END]);
    }
}
