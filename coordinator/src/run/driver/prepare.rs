//! Before the first worker starts: corpora are read, prompts are tokenised, and
//! what is held out is chosen.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::corpora::{Corpora, Reading};
use super::prompts::Prompts;
use crate::config::{Guidance, Method, Settings};
use crate::corpus::Counts;
use crate::domain::{PromptId, SeedPair};
use crate::method::{self, Case, PreferenceMethod};
use crate::text::{HeldOutSet, Lengths, RewardText, TextModel, TextOptions};

/// What the corpora and the model's text side amount to.
#[derive(Debug)]
pub struct Prepared {
    /// Tokenizer and template.
    pub text: TextModel,
    /// Which replies are preferred.
    pub method: Method,
    /// Whether a complaint guides sampling.
    pub guidance: Guidance,
    /// Text side of the reward model, where samples are rated.
    pub reward: Option<RewardText>,
    /// What replies are drawn for; a [`PromptId`] is an index into them.
    pub cases: Vec<Case>,
    /// Seed pairs of the warm start.
    pub seeds: Vec<SeedPair>,
    /// What samples are drawn from.
    pub prompts: Prompts,
    /// Prompts that never train.
    pub held_out: HeldOutSet,
    /// Bounds on token ids.
    pub lengths: Lengths,
    /// Any of these ends a reply, and is left out of it.
    pub stop_strings: Vec<String>,
    /// Iterations whose samples an iteration's pairs are made of, its own included.
    pub pair_iterations: u32,
    /// What became of each file's records.
    pub counts: Vec<Counts>,
}

impl Prepared {
    /// The method's rules.
    pub fn rules(&self) -> &'static dyn PreferenceMethod {
        method::of(self.method)
    }

    /// Whether samples are rated before they make pairs.
    pub fn is_rated(&self) -> bool {
        self.rules().is_rated(self.guidance)
    }

    /// Prompts with their lengths, for planning: the mean where several samples are drawn
    /// for one, each from a prompt of its own.
    pub fn prompt_lengths(&self) -> Vec<(PromptId, usize)> {
        let samples = self.prompts.samples();
        let mean = |id| {
            let lengths = (0..samples).map(|sample| self.prompts.of(id, sample).len());
            (id, lengths.sum::<usize>() / samples.max(1))
        };
        (0..self.prompts.cases() as u64).map(PromptId).map(mean).collect()
    }

    /// What the samples of one case are drawn from, with their indices.
    pub fn sampling_prompts(
        &self,
        id: PromptId,
    ) -> impl Iterator<Item = (PromptId, u32, Vec<u32>)> + '_ {
        (0..self.prompts.samples()).map(move |index| (id, index as u32, self.prompts.of(id, index)))
    }

    /// SHA-256 over everything that later phases compute from. A run continues
    /// only on the very inputs it began with.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for ids in self.prompts.iter() {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            add(&bytes);
        }
        for case in &self.cases {
            add(json!(case).to_string().as_bytes());
        }
        for pair in &self.seeds {
            add(json!(pair).to_string().as_bytes());
        }
        if let Some(reward) = &self.reward {
            add(&reward.fingerprint());
        }
        crate::store::manifest::hex(&hash.finalize())
    }
}

/// Reads and tokenises what `settings` name; `reward_dir` is where their reward model lies.
///
/// # Errors
/// A file that cannot be used, or corpora that hold nothing to train on.
pub fn prepare(
    settings: &Settings,
    model_dir: &Path,
    reward_dir: Option<&Path>,
    progress: &mut Reading<'_>,
) -> Result<Prepared> {
    let text = text_model(settings, model_dir)?;
    let corpora = Corpora::read(settings, progress)?;
    let reward = reward_dir.map(|folder| reward_text(settings, folder)).transpose()?;
    Ok(Prepared { reward, ..tokenise(settings, text, corpora)? })
}

/// The text side of the reward model in `directory`.
///
/// # Errors
/// A model that does not rate, or a tokenizer that is missing or cannot be used.
pub(crate) fn reward_text(settings: &Settings, directory: &Path) -> Result<RewardText> {
    let today = settings.text.today.parse().context("parse text.today")?;
    Ok(RewardText::load(directory, settings.reward.max_length, today)?)
}

/// The text side of the model in `model_dir`.
///
/// # Errors
/// A tokenizer or a template that is missing or cannot be used.
pub(crate) fn text_model(settings: &Settings, model_dir: &Path) -> Result<TextModel> {
    let options = TextOptions {
        chat_template: (!settings.text.chat_template.is_empty())
            .then(|| PathBuf::from(&settings.text.chat_template)),
        today: settings.text.today.parse().context("parse text.today")?,
    };
    Ok(TextModel::load(model_dir, &options)?)
}

/// Makes the sampling prompts of all cases.
pub(crate) fn tokenise(settings: &Settings, text: TextModel, corpora: Corpora) -> Result<Prepared> {
    let kinds = method::of(settings.method).prompts(corpora.guidance);
    let prompt = |case: &Case, sample: usize| -> Result<Vec<u32>> {
        let messages = case.messages(kinds[sample], &settings.text.instruction);
        Ok(text.prompt(&messages, settings.sampling.max_prompt_tokens)?)
    };
    let prompts = Prompts::make(&corpora.cases, kinds.len(), prompt)?;
    Ok(Prepared {
        text,
        method: settings.method,
        guidance: corpora.guidance,
        reward: None,
        cases: corpora.cases,
        seeds: corpora.seeds,
        prompts,
        held_out: corpora.held_out,
        lengths: Lengths {
            max_length: settings.text.max_length,
            max_prompt: settings.text.max_prompt_tokens,
            overlong: settings.text.overlong,
        },
        stop_strings: settings.sampling.stop_strings.clone(),
        pair_iterations: settings.training.pair_iterations,
        counts: corpora.counts,
    })
}
