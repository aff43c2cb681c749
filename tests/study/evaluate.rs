//! Success on questions that were held out: replies drawn as runs draw theirs.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use drift_coordinator::domain::{Message, Role};
use drift_coordinator::text::{TextModel, TextOptions};
use drift_worker::model::Decoder;
use drift_worker::sample::{Prompt, Sampler, SamplingEngine, SamplingParams, Shard};
use jiff::civil::date;
use tch::{Device, Kind};

use crate::Arguments;
use crate::task::{Question, judge};

/// Replies to each question.
const REPLIES: u32 = 2;
/// Tokens of a prompt, at most; questions are far shorter.
const PROMPT_TOKENS: usize = 192;

/// Shares of replies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Success {
    /// That are one word, as was asked.
    pub(crate) form: f64,
    /// That are the right word.
    pub(crate) right: f64,
}

impl Success {
    /// For people.
    pub(crate) fn percent(&self) -> String {
        format!("{:.1} %", 100.0 * self.form)
    }
}

/// How the model in `folder` does, by the recipe's distribution.
pub(crate) fn success(
    arguments: &Arguments,
    folder: &Path,
    questions: &[Question],
    seed: u64,
) -> Result<Success> {
    tch::set_num_threads(i32::try_from(arguments.threads)?);
    let text =
        TextModel::load(folder, &TextOptions { chat_template: None, today: date(2026, 1, 1) })?;
    let mut prompts = Vec::new();
    for (prompt, question) in (0..).zip(questions) {
        let tokens =
            text.prompt(&[Message::new(Role::User, question.text.as_str())], PROMPT_TOKENS)?;
        let copy = |index| Prompt { prompt, index, tokens: tokens.clone() };
        prompts.extend((0..REPLIES).map(copy));
    }
    let count = prompts.len();
    let shard = Shard {
        seed,
        // No run's draws.
        iteration: u32::MAX,
        params: SamplingParams {
            temperature: 0.7,
            top_p: 0.9,
            max_new_tokens: 16,
            stop_ids: text.stop_ids().to_vec(),
            ..SamplingParams::default()
        },
        engine: SamplingEngine { cache_bytes: 1 << 30, ..SamplingEngine::default() },
        prompts,
    };
    let model = Decoder::load(folder, Kind::BFloat16, Device::Cpu)?;
    let sampled = Sampler::new(&model)?.sample(&shard, &mut |_| ControlFlow::Continue(()))?;
    let (mut form, mut right) = (0, 0);
    for sample in &sampled.samples {
        let ids: Vec<u32> = sample.tokens.clone();
        let ended = ids.last().is_some_and(|id| text.stop_ids().contains(id));
        let reply = text.decode(&ids[..ids.len() - usize::from(ended)])?;
        let (is_word, is_right) = judge(&questions[usize::try_from(sample.prompt)?], &reply);
        // A reply that was cut off is not one word.
        form += usize::from(is_word && ended);
        right += usize::from(is_right && ended);
    }
    let share = |n: usize| n as f64 / count as f64;
    Ok(Success { form: share(form), right: share(right) })
}
