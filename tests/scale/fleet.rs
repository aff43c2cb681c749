//! All workers of a run: how long a lease takes, what is replied, who is lost.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use drift_proto::{join, v1 as pb};
use tonic::metadata::{Ascii, MetadataValue};

use crate::tally::Tally;
use crate::worker::{Ended, attend};

/// What a run's workers have in common.
#[derive(Debug)]
pub(crate) struct Fleet {
    pub(crate) address: String,
    pub(crate) bearer: MetadataValue<Ascii>,
    /// Seconds that a prompt takes a worker; 0 where it never sleeps.
    pub(crate) seconds_per_prompt: f64,
    pub(crate) reply_tokens: u32,
    /// Leases whose first worker is lost with them.
    pub(crate) losing: Mutex<BTreeSet<u64>>,
    pub(crate) tally: Tally,
}

/// A supervisor takes this long to start a worker anew, at least.
const RESTART: Duration = Duration::from_millis(200);

/// How often it does so before it gives up.
const TRIES: u32 = 20;

/// Of all prompts' made replies.
pub(crate) const FINISH: pb::FinishReason = pb::FinishReason::Stop;

/// The reply that is made for a prompt: whoever finds it in the journal can tell.
pub(crate) fn reply(prompt: u64, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|n| (prompt as u32).wrapping_mul(31).wrapping_add(n) % 32_000).collect()
}

impl Fleet {
    /// What lets workers into the run that the join folder belongs to.
    pub(crate) fn way_in(folder: &Path) -> Result<(String, MetadataValue<Ascii>)> {
        let read = |name| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let token = format!("Bearer {}", read(join::TOKEN)?.trim());
        Ok((read(join::ADDRESS)?.trim().to_owned(), token.parse().context("the token")?))
    }

    /// How long a lease takes: from half of the mean to one and a half, so that leases
    /// end at any time and not all together.
    pub(crate) fn takes(&self, lease: &pb::SampleShard) -> Duration {
        let dice = lease.shard.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let spread = 0.5 + dice as f64 / f64::from(u32::MAX);
        Duration::from_secs_f64(lease.prompts.len() as f64 * self.seconds_per_prompt * spread)
    }

    /// Whether the worker that holds this lease is to be lost with it; once for each.
    pub(crate) fn loses(&self, shard: u64) -> bool {
        self.losing.lock().unwrap_or_else(PoisonError::into_inner).remove(&shard)
    }

    pub(crate) fn replies(&self, lease: &pb::SampleShard) -> pb::SampleResult {
        let sample = |prompt: &pb::SamplePrompt| pb::Sample {
            prompt: prompt.prompt,
            index: prompt.index,
            tokens: reply(prompt.prompt, self.reply_tokens),
            finish: FINISH as i32,
        };
        let samples = lease.prompts.iter().map(sample).collect();
        pb::SampleResult { shard: lease.shard, samples, seconds: 0.0 }
    }

    /// Starts `workers` of them. One that is lost comes again after a while, as the
    /// process would that a supervisor starts in its place.
    pub(crate) fn start(self: &Arc<Self>, workers: u32) {
        for slot in 0..workers {
            let fleet = Arc::clone(self);
            tokio::spawn(async move {
                let mut tries = 0;
                loop {
                    match attend(&fleet, slot).await {
                        Ok(Ended::Lost) => tries = TRIES,
                        Ok(Ended::Dismissed) => return,
                        // It came before the coordinator knew that its place is free.
                        Err(_) if tries > 0 => tries -= 1,
                        Err(error) => return fleet.tally.failed(format!("{error:#}")),
                    }
                    tokio::time::sleep(RESTART).await;
                }
            });
        }
    }
}
