//! Before the first worker starts: corpora are read, prompts are tokenised, and
//! what is held out is chosen.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::config::{DEMO_CORPUS, Guidance, HeldOutSetting, Settings};
use crate::corpus::{self, Counts, Format, ReadOptions, Record};
use crate::domain::{DsatSample, PromptId, SeedPair};
use crate::run::plan::keyed_order;
use crate::text::{HeldOut, HeldOutSet, Lengths, PromptKey, TextModel, TextOptions, hold_out};

/// What the corpora and the model's text side amount to.
#[derive(Debug)]
pub struct Prepared {
    /// Tokenizer and template.
    pub text: TextModel,
    /// DSAT samples; a [`PromptId`] is an index into them.
    pub dsat: Vec<DsatSample>,
    /// Seed pairs of the warm start.
    pub seeds: Vec<SeedPair>,
    /// Sampling prompts, by [`PromptId`].
    pub prompts: Vec<Vec<u32>>,
    /// Prompts that never train.
    pub held_out: HeldOutSet,
    /// Bounds on token ids.
    pub lengths: Lengths,
    /// Any of these ends a reply, and is left out of it.
    pub stop_strings: Vec<String>,
    /// What became of each file's records.
    pub counts: Vec<Counts>,
}

impl Prepared {
    /// Prompts with their lengths, for planning.
    pub fn prompt_lengths(&self) -> Vec<(PromptId, usize)> {
        self.prompts.iter().enumerate().map(|(n, ids)| (PromptId(n as u64), ids.len())).collect()
    }

    /// SHA-256 over everything that later phases compute from. A run continues
    /// only on the very inputs it began with.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for ids in &self.prompts {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            add(&bytes);
        }
        for sample in &self.dsat {
            add(json!(sample).to_string().as_bytes());
        }
        for pair in &self.seeds {
            add(json!(pair).to_string().as_bytes());
        }
        crate::store::manifest::hex(&hash.finalize())
    }
}

/// Reads and tokenises what `settings` name. `progress` is told the file, its
/// size, and the bytes read of it.
///
/// # Errors
/// A file that cannot be used, or corpora that hold nothing to train on.
pub fn prepare(
    settings: &Settings,
    model_dir: &Path,
    progress: &mut dyn FnMut(&Path, u64, u64),
) -> Result<Prepared> {
    let text = TextModel::load(
        model_dir,
        &TextOptions {
            chat_template: (!settings.text.chat_template.is_empty())
                .then(|| PathBuf::from(&settings.text.chat_template)),
            today: settings.text.today.parse().context("parse text.today")?,
        },
    )?;
    let mut counts = Vec::new();
    let (mut dsat, mut seeds) = (Vec::new(), Vec::new());
    for name in &settings.corpus.0 {
        counts.push(read(name, settings, progress, &mut |record| match record {
            Record::Dsat(sample) => dsat.push(sample),
            Record::Seed(pair) => seeds.push(pair),
            Record::Sat(_) => {}
        })?);
    }
    if !settings.seeds.0.is_empty() {
        seeds.clear();
        for name in &settings.seeds.0 {
            counts.push(read(name, settings, progress, &mut |record| {
                if let Record::Seed(pair) = record {
                    seeds.push(pair);
                }
            })?);
        }
    }
    let training = &settings.training;
    if training.iterations > 0 && dsat.is_empty() {
        bail!(
            "no DSAT turn in {}: there is no dissatisfaction to train on; `coordinator data FILE` shows what each file holds",
            settings.corpus.0.join(", ")
        );
    }
    if training.warm_start_epochs > 0 && seeds.is_empty() {
        bail!(
            "no seed pair for the warm start in {}; name files that hold some with --seeds, or skip it with --set training.warm_start_epochs=0",
            if settings.seeds.0.is_empty() { &settings.corpus } else { &settings.seeds }
                .0
                .join(", ")
        );
    }
    if training.warm_start_epochs == 0 {
        seeds.clear();
    }
    if settings.data.limit > 0 && settings.data.limit < dsat.len() {
        dsat = draw(dsat, settings.data.limit, settings.seed);
    }
    let keys = |contexts: &mut dyn Iterator<Item = &Vec<_>>| -> Vec<PromptKey> {
        contexts.map(|context| PromptKey::of(context)).collect()
    };
    let held_out = hold_out(
        &[
            &keys(&mut seeds.iter().map(|pair| &pair.context)),
            &keys(&mut dsat.iter().map(|sample| &sample.context)),
        ],
        match settings.data.held_out {
            HeldOutSetting::Pairs(pairs) => HeldOut::Pairs(pairs as usize),
            HeldOutSetting::Share(share) => HeldOut::Share(share),
        },
        settings.seed,
    );
    let max_tokens = settings.sampling.max_prompt_tokens;
    let prompts = dsat
        .iter()
        .map(|sample| match settings.sampling.guidance {
            Guidance::On => text.guided_prompt(sample, &settings.text.instruction, max_tokens),
            Guidance::Off => text.prompt(&sample.context, max_tokens),
        })
        .collect::<Result<_, _>>()?;
    let lengths = Lengths {
        max_length: settings.text.max_length,
        max_prompt: settings.text.max_prompt_tokens,
    };
    let stop_strings = settings.sampling.stop_strings.clone();
    Ok(Prepared { text, dsat, seeds, prompts, held_out, lengths, stop_strings, counts })
}

/// Reads one file, or the corpus built into the program.
fn read(
    name: &str,
    settings: &Settings,
    progress: &mut dyn FnMut(&Path, u64, u64),
    sink: &mut dyn FnMut(Record),
) -> Result<Counts> {
    let folder;
    let path = if name == "demo" {
        folder = tempfile::tempdir().context("make a folder for the built-in corpus")?;
        let path = folder.path().join("demo.json");
        std::fs::write(&path, DEMO_CORPUS).context("write the built-in corpus")?;
        path
    } else {
        PathBuf::from(name)
    };
    let options = ReadOptions {
        format: named_format(&settings.data.format)?,
        max_malformed: settings.data.max_malformed,
        ..ReadOptions::default()
    };
    let size = std::fs::metadata(&path).map_or(0, |meta| meta.len());
    Ok(corpus::read(&path, &options, &mut |bytes| progress(&path, size, bytes), sink)?)
}

/// `auto` is none.
pub(crate) fn named_format(name: &str) -> Result<Option<Format>> {
    if name == "auto" {
        return Ok(None);
    }
    Ok(Some(name.parse().map_err(|e| anyhow::anyhow!("{e}"))?))
}

/// `count` of the samples by a seeded draw, in the order they had.
fn draw(samples: Vec<DsatSample>, count: usize, seed: u64) -> Vec<DsatSample> {
    let ids: Vec<u64> = (0..samples.len() as u64).collect();
    let drawn: std::collections::BTreeSet<u64> =
        keyed_order(seed, "limit", &[], &ids).into_iter().take(count).collect();
    samples
        .into_iter()
        .zip(ids)
        .filter_map(|(sample, id)| drawn.contains(&id).then_some(sample))
        .collect()
}
