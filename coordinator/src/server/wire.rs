//! Domain types to wire types and back. The only file that knows both.

use drift_proto::v1::{self as pb, coordinator_message::Body as Down, worker_message::Body as Up};

use crate::config::{
    DType, Loss, OptimizerChoice, Recompute, SamplingSettings, Sharding, TrainingSettings,
};
use crate::domain::{
    FinishReason, PairId, PromptId, ReferenceLogps, Sample, ShardId, Step, TokenPair,
};
use crate::run::command::{Report, SaveSeconds, StepOutcomes, WrittenFile};
use crate::run::metrics::PairOutcome;

/// Pairs computed together, with their reference log-probabilities where known.
pub type PairBatch = Vec<(TokenPair, Option<ReferenceLogps>)>;

/// A command with everything a worker needs: token ids and folders instead of ids.
#[derive(Debug, Clone, PartialEq)]
pub enum Outgoing {
    /// See [`Command::OpenGroup`](crate::run::Command::OpenGroup).
    OpenGroup {
        /// Keeps the group's keys apart from other groups'.
        number: u64,
        /// Where rank 0's store listens; empty for rank 0 itself.
        store: Option<String>,
        /// Seconds a collective may take.
        timeout: f64,
    },
    /// Load weights from a folder.
    LoadModel {
        /// The folder.
        directory: String,
        /// Compute type.
        dtype: DType,
    },
    /// Sample prompts.
    Sample {
        /// Which shard.
        shard: ShardId,
        /// Run's seed.
        seed: u64,
        /// Iteration.
        iteration: u32,
        /// Distribution and bounds.
        sampling: SamplingSettings,
        /// Any of these ends a reply.
        stop_ids: Vec<u32>,
        /// Prompts with their token ids.
        prompts: Vec<(PromptId, u32, Vec<u32>)>,
    },
    /// Score pairs.
    Score {
        /// Number that the answer repeats.
        batch: u64,
        /// Pairs computed together.
        micro_batches: Vec<PairBatch>,
    },
    /// Rate sequences.
    Rate {
        /// Number that the answer repeats.
        batch: u64,
        /// Where the reward model lies.
        directory: String,
        /// Its compute type.
        dtype: DType,
        /// In its ids.
        sequences: Vec<Vec<u32>>,
    },
    /// Fresh training state, by this recipe.
    BeginTraining(Box<TrainingSettings>),
    /// One optimiser step.
    TrainStep {
        /// Which.
        step: Step,
        /// Rate.
        learning_rate: f64,
        /// Pairs over all ranks.
        global_pairs: u32,
        /// This rank's.
        micro_batches: Vec<PairBatch>,
    },
    /// Write the rank's part of training state into a folder.
    SaveState(String),
    /// Copy it, and write the copy beside the next commands.
    SaveStateBeside {
        /// The folder.
        directory: String,
        /// The step that it is taken behind.
        step: Step,
    },
    /// Read back what the rank needs of all parts.
    LoadState(String),
    /// Write weights into a folder.
    SaveModel(String),
    /// Drop queued work.
    Abort,
    /// Leave.
    Shutdown,
    /// Still here.
    Heartbeat,
}

impl From<Outgoing> for pb::CoordinatorMessage {
    fn from(outgoing: Outgoing) -> Self {
        let body = match outgoing {
            Outgoing::OpenGroup { number, store, timeout } => Down::OpenGroup(pb::OpenGroup {
                number,
                store_address: store.unwrap_or_default(),
                timeout_seconds: timeout,
            }),
            Outgoing::LoadModel { directory, dtype } => {
                Down::LoadModel(pb::LoadModel { directory, dtype: wire_dtype(dtype) as i32 })
            }
            Outgoing::Sample { shard, seed, iteration, sampling, stop_ids, prompts } => {
                Down::Sample(pb::SampleShard {
                    shard: shard.0,
                    seed,
                    iteration,
                    params: Some(pb::SamplingParams {
                        temperature: sampling.temperature,
                        top_k: sampling.top_k,
                        top_p: sampling.top_p,
                        min_p: sampling.min_p,
                        repetition_penalty: sampling.repetition_penalty,
                        min_new_tokens: sampling.min_new_tokens,
                        max_new_tokens: sampling.max_new_tokens,
                        stop_ids,
                    }),
                    engine: Some(pb::SamplingEngine {
                        max_rows: sampling.max_rows,
                        cache_bytes: sampling.cache_budget.0,
                        drafting: sampling.drafting,
                    }),
                    prompts: prompts
                        .into_iter()
                        .map(|(prompt, index, tokens)| pb::SamplePrompt {
                            prompt: prompt.0,
                            index,
                            tokens,
                        })
                        .collect(),
                })
            }
            Outgoing::Score { batch, micro_batches } => Down::Score(pb::ScoreBatch {
                batch,
                micro_batches: micro_batches.into_iter().map(micro_batch).collect(),
            }),
            Outgoing::Rate { batch, directory, dtype, sequences } => Down::Rate(pb::RateBatch {
                batch,
                directory,
                dtype: wire_dtype(dtype) as i32,
                sequences: sequences.into_iter().map(|tokens| pb::Sequence { tokens }).collect(),
            }),
            Outgoing::BeginTraining(training) => Down::BeginTraining(begin_training(&training)),
            Outgoing::TrainStep { step, learning_rate, global_pairs, micro_batches } => {
                Down::TrainStep(pb::TrainStep {
                    step: step.0,
                    learning_rate,
                    global_pairs,
                    micro_batches: micro_batches.into_iter().map(micro_batch).collect(),
                })
            }
            Outgoing::SaveState(directory) => {
                Down::SaveState(pb::SaveState { directory, background: false, step: 0 })
            }
            Outgoing::SaveStateBeside { directory, step } => {
                Down::SaveState(pb::SaveState { directory, background: true, step: step.0 })
            }
            Outgoing::LoadState(directory) => Down::LoadState(pb::LoadState { directory }),
            Outgoing::SaveModel(directory) => Down::SaveModel(pb::SaveModel { directory }),
            Outgoing::Abort => Down::Abort(pb::Abort {}),
            Outgoing::Shutdown => Down::Shutdown(pb::Shutdown {}),
            Outgoing::Heartbeat => Down::Heartbeat(pb::Heartbeat { resident_bytes: 0 }),
        };
        Self { body: Some(body) }
    }
}

fn wire_dtype(dtype: DType) -> pb::DType {
    match dtype {
        DType::Bf16 => pb::DType::Bf16,
        DType::F32 => pb::DType::F32,
    }
}

fn begin_training(training: &TrainingSettings) -> pb::BeginTraining {
    use pb::optimizer::Algorithm;
    let objective = pb::Objective {
        beta: training.beta,
        rpo_alpha: training.rpo_alpha,
        loss: match training.loss {
            Loss::Sigmoid => pb::PreferenceLoss::Sigmoid,
            Loss::Hinge => pb::PreferenceLoss::Hinge,
            Loss::Ipo => pb::PreferenceLoss::Ipo,
            Loss::Robust => pb::PreferenceLoss::Robust,
            Loss::SigmoidNorm => pb::PreferenceLoss::SigmoidNorm,
        } as i32,
        label_smoothing: training.label_smoothing,
    };
    let algorithm = match training.optimizer {
        OptimizerChoice::RmsProp => Algorithm::RmsProp(pb::RmsProp {
            alpha: training.rmsprop_alpha,
            epsilon: training.rmsprop_epsilon,
        }),
        OptimizerChoice::AdamW => Algorithm::AdamW(pb::AdamW {
            beta1: training.adamw_beta1,
            beta2: training.adamw_beta2,
            epsilon: training.adamw_epsilon,
            weight_decay: training.weight_decay,
        }),
    };
    let engine = pb::Engine {
        sharding: match training.sharding {
            Sharding::None => pb::Sharding::None,
            Sharding::Zero2 => pb::Sharding::Zero2,
        } as i32,
        recompute: match training.recompute {
            Recompute::None => pb::Recompute::None,
            Recompute::All => pb::Recompute::All,
            Recompute::Auto => pb::Recompute::Auto,
        } as i32,
        recompute_budget_bytes: training.activation_budget.0,
        reduce: wire_dtype(training.reduce_dtype) as i32,
    };
    pb::BeginTraining {
        objective: Some(objective),
        optimizer: Some(pb::Optimizer {
            max_grad_norm: training.max_grad_norm,
            algorithm: Some(algorithm),
        }),
        engine: Some(engine),
    }
}

fn micro_batch(pairs: PairBatch) -> pb::MicroBatch {
    pb::MicroBatch {
        pairs: pairs
            .into_iter()
            .map(|(pair, reference)| pb::TokenPair {
                pair: pair.id.0,
                prompt: pair.prompt,
                chosen: pair.chosen,
                rejected: pair.rejected,
                reference_chosen: reference.map(|r| r.chosen),
                reference_rejected: reference.map(|r| r.rejected),
            })
            .collect(),
    }
}

/// What an upstream message is to the run.
pub(super) enum Incoming {
    /// A heartbeat.
    Heartbeat,
    /// It begins a generation.
    Ready,
    /// A report.
    Report(Report),
}

/// Decodes a message after the greeting; the error says what was wrong with it.
pub(super) fn incoming(message: pb::WorkerMessage) -> Result<Incoming, String> {
    let body = message.body.ok_or("a message without a body")?;
    let report = match body {
        Up::Hello(_) => return Err("a second greeting".to_owned()),
        Up::Heartbeat(_) => return Ok(Incoming::Heartbeat),
        Up::Ready(_) => return Ok(Incoming::Ready),
        Up::StoreListening(m) => Report::StoreListening(m.address),
        Up::Done(_) => Report::Done,
        Up::ModelReady(m) => Report::ModelReady { parameters: m.parameters },
        Up::SampleProgress(m) => Report::SampleProgress {
            shard: ShardId(m.shard),
            tokens: m.tokens,
            finished: m.finished,
        },
        Up::SampleResult(m) => Report::ShardDone {
            shard: ShardId(m.shard),
            samples: m.samples.into_iter().map(sample).collect::<Result<_, _>>()?,
        },
        Up::ScoreResult(m) => Report::Scored {
            batch: m.batch,
            logps: m
                .pairs
                .into_iter()
                .map(|p| {
                    finite(p.pair, [p.chosen, p.rejected])?;
                    let logps = ReferenceLogps { chosen: p.chosen, rejected: p.rejected };
                    Ok((PairId(p.pair), logps))
                })
                .collect::<Result<_, String>>()?,
        },
        Up::EmbedResult(_) => return Err("embeddings that nobody asked for".to_owned()),
        Up::RateResult(m) => {
            if let Some(rating) = m.ratings.iter().find(|rating| !rating.is_finite()) {
                return Err(format!(
                    "a reply is rated {rating}: the reward model's numbers overflow; check its weights, or take reward.dtype = \"f32\""
                ));
            }
            Report::Rated { batch: m.batch, ratings: m.ratings }
        }
        Up::StepResult(m) => Report::Stepped(StepOutcomes {
            step: Step(m.step),
            grad_norm: m.grad_norm,
            pairs: m.pairs.into_iter().map(outcome).collect::<Result<_, _>>()?,
            tokens: m.tokens,
            seconds: m.seconds,
            reduce_seconds: m.reduce_seconds,
            exposed_seconds: m.exposed_seconds,
        }),
        Up::StateSaved(m) => Report::StateSaved(files(m.files)?),
        Up::SnapshotWritten(m) if m.failure.is_empty() => Report::SnapshotWritten {
            step: Step(m.step),
            files: files(m.files)?,
            seconds: SaveSeconds { copy: m.copy_seconds, write: m.write_seconds },
        },
        Up::SnapshotWritten(m) => Report::SnapshotFailed { step: Step(m.step), why: m.failure },
        Up::ModelSaved(m) => Report::ModelSaved(files(m.files)?),
        Up::Failure(m) => Report::Failed(m.message),
    };
    Ok(Incoming::Report(report))
}

fn sample(sample: pb::Sample) -> Result<Sample, String> {
    let finish = match sample.finish() {
        pb::FinishReason::Stop => FinishReason::Stop,
        pb::FinishReason::Length => FinishReason::Length,
        pb::FinishReason::Unspecified => {
            return Err(format!("sample of prompt {} without a finish reason", sample.prompt));
        }
    };
    let prompt = PromptId(sample.prompt);
    Ok(Sample { prompt, index: sample.index, tokens: sample.tokens, finish })
}

fn outcome(p: pb::PairOutcome) -> Result<PairOutcome, String> {
    finite(p.pair, [p.loss, p.logp_chosen, p.logp_rejected])?;
    Ok(PairOutcome {
        id: PairId(p.pair),
        loss: p.loss,
        logps: ReferenceLogps { chosen: p.logp_chosen, rejected: p.logp_rejected },
        reward_chosen: p.reward_chosen,
        reward_rejected: p.reward_rejected,
        logits_chosen: p.logits_chosen,
        logits_rejected: p.logits_rejected,
    })
}

/// A model that computes no number any more must not go on training unseen.
fn finite<const N: usize>(pair: u64, values: [f64; N]) -> Result<(), String> {
    if values.iter().all(|value| value.is_finite()) {
        Ok(())
    } else {
        Err(format!(
            "pair {pair} came out as {values:?}: the model's numbers overflow; check its weights, or take a lower training.learning_rate"
        ))
    }
}

fn files(files: Vec<pb::File>) -> Result<Vec<WrittenFile>, String> {
    files
        .into_iter()
        .map(|file| {
            let sha256 = file
                .sha256
                .try_into()
                .map_err(|_| format!("{}: its SHA-256 is not 32 bytes long", file.name))?;
            Ok(WrittenFile { name: file.name, bytes: file.bytes, sha256 })
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ByteSize;

    #[test]
    fn every_setting_of_the_recipe_reaches_the_wire() {
        let begin = begin_training(&TrainingSettings::default());
        let objective = begin.objective.unwrap();
        assert_eq!((objective.beta, objective.rpo_alpha), (0.1, 0.0));
        assert_eq!(objective.loss(), pb::PreferenceLoss::Sigmoid);
        let optimizer = begin.optimizer.unwrap();
        assert_eq!(optimizer.max_grad_norm, 1.0);
        let rms_prop = pb::RmsProp { alpha: 0.99, epsilon: 1e-8 };
        let rms_prop = pb::optimizer::Algorithm::RmsProp(rms_prop);
        assert_eq!(optimizer.algorithm, Some(rms_prop));
        let engine = begin.engine.unwrap();
        assert_eq!(engine.sharding(), pb::Sharding::None);
        assert_eq!(engine.recompute(), pb::Recompute::None);
        assert_eq!(engine.reduce(), pb::DType::F32);

        let begin = begin_training(&TrainingSettings {
            loss: Loss::Robust,
            label_smoothing: 0.2,
            optimizer: OptimizerChoice::AdamW,
            adamw_beta1: 0.8,
            adamw_beta2: 0.95,
            adamw_epsilon: 1e-6,
            weight_decay: 0.01,
            sharding: Sharding::Zero2,
            recompute: Recompute::Auto,
            activation_budget: ByteSize::gib(3),
            reduce_dtype: DType::Bf16,
            ..TrainingSettings::default()
        });
        let objective = begin.objective.unwrap();
        assert_eq!(objective.loss(), pb::PreferenceLoss::Robust);
        assert_eq!(objective.label_smoothing, 0.2);
        let adam_w = pb::AdamW { beta1: 0.8, beta2: 0.95, epsilon: 1e-6, weight_decay: 0.01 };
        let adam_w = pb::optimizer::Algorithm::AdamW(adam_w);
        assert_eq!(begin.optimizer.unwrap().algorithm, Some(adam_w));
        let engine = begin.engine.unwrap();
        assert_eq!(engine.sharding(), pb::Sharding::Zero2);
        assert_eq!(engine.recompute(), pb::Recompute::Auto);
        assert_eq!(engine.recompute_budget_bytes, 3 << 30);
        assert_eq!(engine.reduce(), pb::DType::Bf16);
    }
}
