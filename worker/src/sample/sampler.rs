//! The sampling loop: admit, compute, draw, until every prompt has its reply.

use std::ops::ControlFlow;

use tch::{Device, TchError, Tensor};

use super::cache::{Division, KvCache, PAGE, Region, bytes_per_token};
use super::pick::choose;
use super::prefix::Prefixes;
use super::rows::Rows;
use super::step::Memory;
use super::{Progress, Prompt, Sample, SampleError, SamplingParams, Shard, Work};
use crate::model::ops::multiply;
use crate::model::{Decoder, check_tokens};

/// Samples shards with the weights of one model; its cache lasts from shard to shard.
#[derive(Debug)]
pub struct Sampler {
    pub(super) model: Decoder,
    cache: KvCache,
}

/// What a shard came to.
#[derive(Debug)]
pub struct Sampled {
    /// A reply to every prompt, in the shard's order.
    pub samples: Vec<Sample>,
    /// What it took.
    pub work: Work,
}

impl Sampler {
    /// With the weights of `policy`: shared on a GPU; on a CPU copied, as it multiplies few
    /// rows fastest. Weights that change want a new sampler.
    pub fn new(policy: &Decoder) -> Result<Self, TchError> {
        Ok(Self { model: policy.for_products()?, cache: KvCache::empty() })
    }

    /// Samples a reply to every prompt of `shard`.
    ///
    /// `observe` is called after every step; when it breaks, the shard ends within that
    /// step as [`SampleError::Stopped`].
    pub fn sample(
        &mut self,
        shard: &Shard,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Sampled, SampleError> {
        check(&self.model, shard)?;
        tch::no_grad(|| self.run(shard, observe))
    }

    fn run(
        &mut self,
        shard: &Shard,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Sampled, SampleError> {
        let prompts: Vec<&[u32]> = shard.prompts.iter().map(|p| p.tokens.as_slice()).collect();
        let (prefixes, division) = self.plan(shard, &prompts);
        let (kind, device) = (self.model.kind(), self.model.device());
        self.cache.divide(&self.model.config, division, kind, device)?;
        let places = stretch_places(&prefixes);
        let draft_tokens = if shard.engine.drafting { free_tokens(device) } else { 0 };
        let mut rows = Rows::new(shard, &prefixes, &places, division.rows as usize, draft_tokens);
        while !rows.are_done() {
            rows.admit();
            for copies in rows.copies() {
                self.cache.copy(&copies)?;
            }
            let step = rows.next_step();
            let memory = Memory {
                cache: &self.cache,
                pages: rows.pages(),
                prefixes: &prefixes,
                stretches: &places,
            };
            let hidden = step.forward(&self.model, &memory)?;
            if hidden.size()[0] > 0 {
                let logits = self.logits(&hidden)?;
                let drawn = choose(&logits, &shard.params, &rows.draws(&step))?;
                self.cache.copy(&rows.take(&step, &drawn))?;
            }
            let (tokens, finished) = rows.drawn();
            if observe(Progress { tokens, finished }).is_break() {
                return Err(SampleError::Stopped);
            }
        }
        let work = rows.work;
        Ok(Sampled { samples: rows.into_samples(), work })
    }

    /// Which beginnings are shared, and how many rows are computed together: as many as
    /// the cache may hold.
    fn plan(&self, shard: &Shard, prompts: &[&[u32]]) -> (Prefixes, Division) {
        let bytes = bytes_per_token(&self.model.config, self.model.kind());
        let tokens = (shard.engine.cache_bytes / bytes as u64) as i64;
        let prefixes = Prefixes::of(prompts, shard.engine.least_shared);
        let shared: usize = prefixes.stretches.iter().map(|s| s.tokens.len()).sum();
        let (prefixes, shared) = if shared as i64 > tokens / 2 {
            (Prefixes::none(prompts.len()), 0)
        } else {
            (prefixes, shared as i64)
        };
        let own =
            |(at, prompt): (usize, &&[u32])| prompt.len() - prefixes.length(prefixes.last[at]);
        let longest = prompts.iter().enumerate().map(own).max().unwrap_or(0);
        // The last token of a reply is never computed.
        let pages =
            (longest + shard.params.max_new_tokens as usize - 1).div_ceil(PAGE).max(1) as i64;
        let most = prompts.len().min(shard.engine.max_rows as usize) as i64;
        let rows = ((tokens - shared) / (pages * PAGE as i64)).clamp(1, most.max(1));
        (prefixes, Division { shared, rows, pages })
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor, TchError> {
        multiply(&self.model.final_norm(hidden)?, self.model.head_weight(), None)
    }
}

/// Tokens that a step computes in about the time of one, since reading the weights takes
/// that long. Fixed, not measured: what is computed must not depend on a clock. On a CPU
/// without AMX the last of them cost something, and less than they save.
fn free_tokens(device: Device) -> usize {
    match device {
        Device::Cpu => 16,
        _ => 64,
    }
}

/// Where the pool has each stretch: one after another.
fn stretch_places(prefixes: &Prefixes) -> Vec<Region> {
    let lengths = prefixes.stretches.iter().map(|stretch| stretch.tokens.len() as i64);
    let place = |next: &mut i64, length| {
        let start = std::mem::replace(next, *next + length);
        Some(Region { start, length })
    };
    lengths.scan(0, place).collect()
}

fn check(model: &Decoder, shard: &Shard) -> Result<(), SampleError> {
    let SamplingParams { temperature, top_p, min_p, repetition_penalty, max_new_tokens, .. } =
        shard.params;
    let invalid = |problem| Err(SampleError::Invalid(problem));
    if !(temperature.is_finite() && temperature >= 0.0) {
        return invalid(format!("temperature is {temperature}, expected a number from 0"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return invalid(format!("top_p is {top_p}, expected a number above 0, at most 1"));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return invalid(format!("min_p is {min_p}, expected a number from 0 to 1"));
    }
    if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
        return invalid(format!(
            "repetition_penalty is {repetition_penalty}, expected a number above 0"
        ));
    }
    if max_new_tokens == 0 {
        return invalid("max_new_tokens is 0, expected at least 1".to_owned());
    }
    for Prompt { prompt, tokens, .. } in &shard.prompts {
        check_tokens(model.config.vocab_size, &format_args!("prompt {prompt}"), tokens)
            .map_err(SampleError::Invalid)?;
    }
    Ok(())
}

/// Samples one shard with a sampler of its own.
pub fn sample_shard(
    policy: &Decoder,
    shard: &Shard,
    observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Vec<Sample>, SampleError> {
    Ok(Sampler::new(policy)?.sample(shard, observe)?.samples)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
