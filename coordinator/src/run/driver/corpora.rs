//! What the corpus files hold for the run's method.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::config::{DEMO_CORPUS, Guidance, HeldOutSetting, Settings};
use crate::corpus::{self, Counts, Format, ReadOptions, Record};
use crate::domain::SeedPair;
use crate::hub;
use crate::method::{self, Case};
use crate::run::plan::keyed_order;
use crate::text::{HeldOut, HeldOutSet, PromptKey, hold_out};

/// Cases, seed pairs, and which of their prompts never train.
#[derive(Debug)]
pub struct Corpora {
    /// What replies are drawn for in every iteration.
    pub cases: Vec<Case>,
    /// Pairs of the warm start.
    pub seeds: Vec<SeedPair>,
    /// Whether a complaint guides sampling: as the settings say, where there are any.
    pub guidance: Guidance,
    /// Prompts that never train.
    pub held_out: HeldOutSet,
    /// What became of each file's records.
    pub counts: Vec<Counts>,
}

/// Told the file, its size, and the bytes read of it.
pub type Reading<'a> = dyn FnMut(&Path, u64, u64) + 'a;

impl Corpora {
    /// Reads the files that `settings` name. A corpus is one of pairs if all of its files
    /// are; pairs beside conversations are seed pairs.
    ///
    /// # Errors
    /// A file that cannot be used, or files that hold nothing for the method.
    pub fn read(settings: &Settings, progress: &mut Reading<'_>) -> Result<Self> {
        let rules = method::of(settings.method);
        let (mut cases, mut seeds, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        for name in &settings.corpus.0 {
            counts.push(read(name, settings, progress, &mut |record| {
                cases.extend(rules.of_conversation(&record));
                seeds.extend(seed(record));
            })?);
        }
        let is_pairs =
            !counts.is_empty() && counts.iter().all(|counts| counts.format == Format::Pairs);
        if is_pairs {
            cases = seeds.iter().map(|pair| rules.of_pair(pair)).collect();
        }
        let guidance = if is_pairs { Guidance::Off } else { settings.sampling.guidance };
        if !settings.seeds.0.is_empty() {
            seeds.clear();
            for name in &settings.seeds.0 {
                let sink = &mut |record| seeds.extend(seed(record));
                counts.push(read(name, settings, progress, sink)?);
            }
        }
        let training = &settings.training;
        if training.iterations > 0 && cases.is_empty() {
            let (files, (turn, why)) = (settings.corpus.0.join(", "), rules.needs());
            bail!(
                "no {turn} in {files}: {why}; `coordinator data FILE` shows what each file holds"
            );
        }
        if training.iterations > 0 {
            agree_on_rating(settings, rules.is_rated(guidance))?;
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
        let cases = draw(cases, settings.data.limit, "limit", settings.seed);
        let seeds = draw(seeds, settings.data.seed_limit, "seed limit", settings.seed);
        let held_out = hold_out(
            &[
                &seeds.iter().map(|pair| PromptKey::of(&pair.context)).collect::<Vec<_>>(),
                &cases.iter().map(|case| PromptKey::of(&case.context)).collect::<Vec<_>>(),
            ],
            match settings.data.held_out {
                HeldOutSetting::Pairs(pairs) => HeldOut::Pairs(pairs as usize),
                HeldOutSetting::Share(share) => HeldOut::Share(share),
            },
            settings.seed,
        );
        Ok(Self { cases, seeds, guidance, held_out, counts })
    }
}

/// A reward model is named where samples are rated, and nowhere else.
fn agree_on_rating(settings: &Settings, is_rated: bool) -> Result<()> {
    let (method, files) = (settings.method, settings.corpus.0.join(", "));
    match (is_rated, settings.reward.model.is_empty()) {
        (true, true) => bail!(
            "method {method} on pairs ({files}): of two replies to a bare prompt only a reward model tells the better one; name one with --set reward.model=OpenAssistant/reward-model-deberta-v3-large-v2, take method = \"drift\" or \"spin\", or a corpus of conversations with complaints"
        ),
        (false, false) => bail!(
            "reward.model is set, and nothing would be rated: {method} prefers the reply that the complaints in {files} guided; leave it out, or set sampling.guidance = \"off\""
        ),
        _ => Ok(()),
    }
}

fn seed(record: Record) -> Option<SeedPair> {
    match record {
        Record::Seed(pair) => Some(pair),
        Record::Dsat(_) | Record::Sat(_) => None,
    }
}

/// Reads one file, or the corpus built into the program.
fn read(
    name: &str,
    settings: &Settings,
    progress: &mut Reading<'_>,
    sink: &mut dyn FnMut(Record),
) -> Result<Counts> {
    let folder;
    let path = if name == "demo" {
        folder = tempfile::tempdir().context("make a folder for the built-in corpus")?;
        let path = folder.path().join("demo.json");
        std::fs::write(&path, DEMO_CORPUS).context("write the built-in corpus")?;
        path
    } else {
        hub::local(name)?
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

/// `count` of the items by a seeded draw, in the order they had; 0 takes all.
fn draw<T>(items: Vec<T>, count: usize, purpose: &str, seed: u64) -> Vec<T> {
    if count == 0 || count >= items.len() {
        return items;
    }
    let ids: Vec<u64> = (0..items.len() as u64).collect();
    let drawn: std::collections::BTreeSet<u64> =
        keyed_order(seed, purpose, &[], &ids).into_iter().take(count).collect();
    items
        .into_iter()
        .zip(ids)
        .filter_map(|(item, id)| drawn.contains(&id).then_some(item))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_is_seeded_and_keeps_the_order() {
        let all: Vec<u32> = (0..100).collect();
        let drawn = |count, seed| draw(all.clone(), count, "limit", seed);
        let forty = drawn(40, 42);
        assert_eq!(forty.len(), 40);
        assert!(forty.is_sorted());
        assert_eq!(forty, drawn(40, 42));
        assert_ne!(forty, drawn(40, 43));
        assert!(drawn(20, 42).iter().all(|item| forty.contains(item)), "fewer are some of more");
        assert_eq!(drawn(0, 42), all);
        assert_eq!(drawn(1000, 42), all);
    }
}
