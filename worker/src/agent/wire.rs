//! Wire types to the engine's and back. The only file that knows both.

use std::path::PathBuf;
use std::time::Duration;

use drift_proto::v1::{self as pb, coordinator_message::Body as Down, worker_message::Body as Up};
use tch::Kind;

use super::engine::{Command, Reply};
use crate::model::SavedFile;
use crate::sample;
use crate::train::{
    Algorithm, EngineSettings, LARGEST_PIECE, MicroBatch, Objective, OptimizerSettings,
    PairOutcome, PreferenceLoss, Recompute, ReduceKind, ReferenceLogps, Sharding, TokenPair,
    TrainStep, TrainingSettings,
};

/// A command that an engine can carry out, of a message that carries one.
pub(super) fn command(body: Down) -> Result<Command, String> {
    Ok(match body {
        Down::OpenGroup(m) => Command::OpenGroup {
            number: m.number,
            store: (!m.store_address.is_empty()).then_some(m.store_address),
            timeout: Duration::try_from_secs_f64(m.timeout_seconds)
                .map_err(|e| format!("open_group.timeout_seconds: {e}"))?,
        },
        Down::LoadModel(m) => Command::LoadModel {
            kind: kind(m.dtype()).ok_or("load_model without a dtype")?,
            directory: m.directory.into(),
        },
        Down::Sample(m) => {
            let params = m.params.ok_or("sample without parameters")?;
            let engine = m.engine.ok_or("sample without engine settings")?;
            Command::Sample {
                number: m.shard,
                shard: sample::Shard {
                    seed: m.seed,
                    iteration: m.iteration,
                    params: sample::SamplingParams {
                        temperature: params.temperature,
                        top_k: params.top_k,
                        top_p: params.top_p,
                        min_p: params.min_p,
                        repetition_penalty: params.repetition_penalty,
                        min_new_tokens: params.min_new_tokens,
                        max_new_tokens: params.max_new_tokens,
                        stop_ids: params.stop_ids,
                    },
                    engine: sample::SamplingEngine {
                        max_rows: engine.max_rows,
                        cache_bytes: engine.cache_bytes,
                        drafting: engine.drafting,
                        ..sample::SamplingEngine::default()
                    },
                    prompts: m
                        .prompts
                        .into_iter()
                        .map(|p| sample::Prompt {
                            prompt: p.prompt,
                            index: p.index,
                            tokens: p.tokens,
                        })
                        .collect(),
                },
            }
        }
        Down::Score(m) => {
            Command::Score { batch: m.batch, micro_batches: micro_batches(m.micro_batches) }
        }
        Down::Embed(m) => Command::Embed { batch: m.batch, sequences: sequences(m.sequences) },
        Down::Rate(m) => Command::Rate {
            batch: m.batch,
            kind: kind(m.dtype()).ok_or("rate without a dtype")?,
            directory: m.directory.into(),
            sequences: sequences(m.sequences),
        },
        Down::BeginTraining(m) => {
            let objective = m.objective.ok_or("begin_training without an objective")?;
            let optimizer = m.optimizer.ok_or("begin_training without an optimizer")?;
            let engine = m.engine.ok_or("begin_training without engine settings")?;
            Command::BeginTraining(TrainingSettings {
                objective: self::objective(&objective)?,
                optimizer: self::optimizer(optimizer)?,
                engine: self::engine(&engine)?,
            })
        }
        Down::TrainStep(m) => Command::TrainStep(TrainStep {
            step: m.step,
            learning_rate: m.learning_rate,
            global_pairs: m.global_pairs,
            micro_batches: micro_batches(m.micro_batches),
        }),
        Down::SaveState(m) if m.background => {
            Command::SaveStateBeside { directory: m.directory.into(), step: m.step }
        }
        Down::SaveState(m) => Command::SaveState(PathBuf::from(m.directory)),
        Down::LoadState(m) => Command::LoadState(PathBuf::from(m.directory)),
        Down::SaveModel(m) => Command::SaveModel(PathBuf::from(m.directory)),
        Down::Welcome(_) | Down::Heartbeat(_) | Down::Abort(_) | Down::Shutdown(_) => {
            return Err("a message that carries no command".to_owned());
        }
    })
}

fn kind(dtype: pb::DType) -> Option<Kind> {
    match dtype {
        pb::DType::F32 => Some(Kind::Float),
        pb::DType::Bf16 => Some(Kind::BFloat16),
        pb::DType::Unspecified => None,
    }
}

fn sequences(sequences: Vec<pb::Sequence>) -> Vec<Vec<u32>> {
    sequences.into_iter().map(|sequence| sequence.tokens).collect()
}

fn objective(m: &pb::Objective) -> Result<Objective, String> {
    let loss = match m.loss() {
        pb::PreferenceLoss::Sigmoid => PreferenceLoss::Sigmoid,
        pb::PreferenceLoss::Hinge => PreferenceLoss::Hinge,
        pb::PreferenceLoss::Ipo => PreferenceLoss::Ipo,
        pb::PreferenceLoss::Robust => PreferenceLoss::Robust { label_smoothing: m.label_smoothing },
        pb::PreferenceLoss::SigmoidNorm => PreferenceLoss::SigmoidNorm,
        pb::PreferenceLoss::Unspecified => return Err("an objective without a loss".to_owned()),
    };
    Ok(Objective { loss, beta: m.beta, rpo_alpha: m.rpo_alpha })
}

fn optimizer(m: pb::Optimizer) -> Result<OptimizerSettings, String> {
    use pb::optimizer::Algorithm as Wire;
    let algorithm = match m.algorithm.ok_or("an optimizer without an algorithm")? {
        Wire::RmsProp(m) => Algorithm::RmsProp { alpha: m.alpha, epsilon: m.epsilon },
        Wire::AdamW(m) => Algorithm::AdamW {
            beta1: m.beta1,
            beta2: m.beta2,
            epsilon: m.epsilon,
            weight_decay: m.weight_decay,
        },
    };
    Ok(OptimizerSettings { algorithm, max_grad_norm: m.max_grad_norm })
}

fn engine(m: &pb::Engine) -> Result<EngineSettings, String> {
    Ok(EngineSettings {
        sharding: match m.sharding() {
            pb::Sharding::None => Sharding::None,
            pb::Sharding::Zero2 => Sharding::Zero2,
            pb::Sharding::Unspecified => return Err("engine settings without sharding".to_owned()),
        },
        recompute: match m.recompute() {
            pb::Recompute::None => Recompute::None,
            pb::Recompute::All => Recompute::All,
            pb::Recompute::Auto => Recompute::Auto { budget_bytes: m.recompute_budget_bytes },
            pb::Recompute::Unspecified => {
                return Err("engine settings without a recompute policy".to_owned());
            }
        },
        reduce: match m.reduce() {
            pb::DType::F32 => ReduceKind::Float,
            pb::DType::Bf16 => ReduceKind::BFloat16,
            pb::DType::Unspecified => return Err("engine settings without reduce".to_owned()),
        },
        largest_piece: LARGEST_PIECE,
    })
}

fn micro_batches(batches: Vec<pb::MicroBatch>) -> Vec<MicroBatch> {
    batches
        .into_iter()
        .map(|batch| MicroBatch {
            pairs: batch
                .pairs
                .into_iter()
                .map(|p| TokenPair {
                    pair: p.pair,
                    reference: p
                        .reference_chosen
                        .zip(p.reference_rejected)
                        .map(|(chosen, rejected)| ReferenceLogps { chosen, rejected }),
                    prompt: p.prompt,
                    chosen: p.chosen,
                    rejected: p.rejected,
                })
                .collect(),
        })
        .collect()
}

/// A reply as the message that tells it.
pub(super) fn message(reply: Reply) -> Up {
    match reply {
        Reply::StoreListening(address) => Up::StoreListening(pb::StoreListening { address }),
        Reply::Done => Up::Done(pb::Done {}),
        Reply::ModelReady { parameters } => Up::ModelReady(pb::ModelReady { parameters }),
        Reply::SampleProgress { shard, tokens, finished } => {
            Up::SampleProgress(pb::SampleProgress { shard, tokens, finished })
        }
        Reply::Sampled { shard, samples, seconds } => Up::SampleResult(pb::SampleResult {
            shard,
            seconds,
            samples: samples
                .into_iter()
                .map(|s| pb::Sample {
                    prompt: s.prompt,
                    index: s.index,
                    tokens: s.tokens,
                    finish: match s.finish {
                        sample::Finish::Stop => pb::FinishReason::Stop,
                        sample::Finish::Length => pb::FinishReason::Length,
                    } as i32,
                })
                .collect(),
        }),
        Reply::Scored { batch, logps } => Up::ScoreResult(pb::ScoreResult {
            batch,
            pairs: logps
                .into_iter()
                .map(|p| pb::PairLogps { pair: p.pair, chosen: p.chosen, rejected: p.rejected })
                .collect(),
        }),
        Reply::Embedded { batch, embeddings } => Up::EmbedResult(pb::EmbedResult {
            batch,
            embeddings: embeddings.into_iter().map(|values| pb::Embedding { values }).collect(),
        }),
        Reply::Rated { batch, ratings } => Up::RateResult(pb::RateResult { batch, ratings }),
        Reply::Stepped { step, report, seconds } => Up::StepResult(pb::StepResult {
            step,
            grad_norm: report.grad_norm,
            pairs: report.pairs.into_iter().map(outcome).collect(),
            tokens: report.tokens,
            seconds,
            reduce_seconds: report.reduction.busy,
            exposed_seconds: report.reduction.exposed,
        }),
        Reply::StateSaved(files) => Up::StateSaved(pb::StateSaved { files: self::files(files) }),
        Reply::ModelSaved(files) => Up::ModelSaved(pb::ModelSaved { files: self::files(files) }),
        Reply::SnapshotWritten { step, saved, copy_seconds, write_seconds } => {
            let (files, failure) = match saved {
                Ok(files) => (self::files(files), String::new()),
                Err(why) => (Vec::new(), why),
            };
            let told = pb::SnapshotWritten { step, files, copy_seconds, write_seconds, failure };
            Up::SnapshotWritten(told)
        }
        Reply::Failed(message) => Up::Failure(pb::Failure { message }),
    }
}

fn outcome(p: PairOutcome) -> pb::PairOutcome {
    pb::PairOutcome {
        pair: p.pair,
        loss: p.loss,
        logp_chosen: p.logp_chosen,
        logp_rejected: p.logp_rejected,
        reward_chosen: p.reward_chosen,
        reward_rejected: p.reward_rejected,
        logits_chosen: p.logits_chosen,
        logits_rejected: p.logits_rejected,
    }
}

fn files(files: Vec<SavedFile>) -> Vec<pb::File> {
    files
        .into_iter()
        .map(|f| pb::File { name: f.name, bytes: f.bytes, sha256: f.sha256.to_vec() })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sequences_come_in_and_embeddings_go_out_in_order() {
        let sequence = |tokens: &[u32]| pb::Sequence { tokens: tokens.to_vec() };
        let sequences = vec![sequence(&[1, 2]), sequence(&[3])];
        let Command::Embed { batch, sequences } =
            command(Down::Embed(pb::EmbedBatch { batch: 7, sequences })).unwrap()
        else {
            panic!("another command");
        };
        assert_eq!((batch, sequences), (7, vec![vec![1, 2], vec![3]]));
        let embeddings = vec![vec![0.6, 0.8], vec![1.0, 0.0]];
        let Up::EmbedResult(result) = message(Reply::Embedded { batch, embeddings }) else {
            panic!("another message");
        };
        let embedding = |values: &[f32]| pb::Embedding { values: values.to_vec() };
        let expected = vec![embedding(&[0.6, 0.8]), embedding(&[1.0, 0.0])];
        assert_eq!(result, pb::EmbedResult { batch: 7, embeddings: expected });
    }
    #[test]
    fn conversations_come_in_and_ratings_go_out_in_order() {
        let sequence = |tokens: &[u32]| pb::Sequence { tokens: tokens.to_vec() };
        let asked = |dtype: pb::DType| {
            command(Down::Rate(pb::RateBatch {
                batch: 9,
                directory: "models/reward".to_owned(),
                dtype: dtype.into(),
                sequences: vec![sequence(&[1, 2, 3]), sequence(&[4])],
            }))
        };
        let Command::Rate { batch, directory, kind, sequences } = asked(pb::DType::Bf16).unwrap()
        else {
            panic!("another command");
        };
        assert_eq!((batch, directory), (9, PathBuf::from("models/reward")));
        assert_eq!((kind, sequences), (Kind::BFloat16, vec![vec![1, 2, 3], vec![4]]));
        assert_eq!(asked(pb::DType::Unspecified).unwrap_err(), "rate without a dtype");

        let Up::RateResult(result) = message(Reply::Rated { batch, ratings: vec![-1.5, 2.0] })
        else {
            panic!("another message");
        };
        assert_eq!(result, pb::RateResult { batch: 9, ratings: vec![-1.5, 2.0] });
    }
}
