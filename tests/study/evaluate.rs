//! Replies of a model, drawn as runs draw theirs, and how many of them satisfy.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use drift_coordinator::domain::{Message, Role};
use drift_coordinator::text::{TextModel, TextOptions};
use drift_worker::model::Decoder;
use drift_worker::sample::{Prompt, Sampler, SamplingEngine, SamplingParams, Shard};
use jiff::civil::date;
use tch::{Device, Kind};

use crate::task::{Question, judge};

/// Tokens of a prompt, at most; questions are far shorter.
const PROMPT_TOKENS: usize = 192;
/// Tokens of a reply, at most, as in the runs.
pub(crate) const REPLY_TOKENS: u32 = 48;

/// How a model does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Success {
    /// Share of replies that satisfy.
    pub(crate) share: f64,
    /// Words of a reply, on average.
    pub(crate) words: f64,
}

impl Success {
    /// For people.
    pub(crate) fn percent(&self) -> String {
        format!("{:.1} %", 100.0 * self.share)
    }
}

/// How the model in `folder` does, by `each` replies to each question.
pub(crate) fn success(
    folder: &Path,
    questions: &[Question],
    each: u32,
    seed: u64,
) -> Result<Success> {
    let replies = replies(folder, questions, each, seed)?;
    let of = questions.iter().zip(&replies);
    let satisfy =
        of.map(|(question, replies)| replies.iter().filter(|reply| judge(question, reply)).count());
    let words = replies.iter().flatten().map(|reply| reply.split_whitespace().count());
    let count = (questions.len() * each as usize) as f64;
    Ok(Success {
        share: satisfy.sum::<usize>() as f64 / count,
        words: words.sum::<usize>() as f64 / count,
    })
}

/// `each` replies of the model in `folder` to each question, by the recipe's distribution.
/// One that was cut off has no end, and so is no sentence.
pub(crate) fn replies(
    folder: &Path,
    questions: &[Question],
    each: u32,
    seed: u64,
) -> Result<Vec<Vec<String>>> {
    let text =
        TextModel::load(folder, &TextOptions { chat_template: None, today: date(2026, 1, 1) })?;
    let mut prompts = Vec::new();
    for (prompt, question) in (0..).zip(questions) {
        let tokens =
            text.prompt(&[Message::new(Role::User, question.text.as_str())], PROMPT_TOKENS)?;
        let copy = |index| Prompt { prompt, index, tokens: tokens.clone() };
        prompts.extend((0..each).map(copy));
    }
    let shard = Shard {
        seed,
        // No run's draws.
        iteration: u32::MAX,
        params: SamplingParams {
            temperature: 0.7,
            top_p: 0.9,
            max_new_tokens: REPLY_TOKENS,
            stop_ids: text.stop_ids().to_vec(),
            ..SamplingParams::default()
        },
        engine: SamplingEngine { cache_bytes: 1 << 30, ..SamplingEngine::default() },
        prompts,
    };
    let model = Decoder::load(folder, Kind::BFloat16, Device::Cpu)?;
    let sampled = Sampler::new(&model)?.sample(&shard, &mut |_| ControlFlow::Continue(()))?;
    let mut replies = vec![Vec::new(); questions.len()];
    for sample in &sampled.samples {
        let ids = &sample.tokens;
        let ended = ids.last().is_some_and(|id| text.stop_ids().contains(id));
        let reply = text.decode(&ids[..ids.len() - usize::from(ended)])?;
        replies[usize::try_from(sample.prompt)?].push(reply);
    }
    Ok(replies)
}
