//! Messages between the programs.

use drift_proto::v1::{self as pb, coordinator_message::Body as Down, worker_message::Body as Up};
use prost::Message as _;

use super::Target;

/// Messages both ways; the first byte says which.
pub(super) struct Wire;

impl Target for Wire {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let up = |body| {
            let message = pb::WorkerMessage { generation: 3, body: Some(body) };
            [&[0], &message.encode_to_vec()[..]].concat()
        };
        let down = |body| {
            let message = pb::CoordinatorMessage { body: Some(body) };
            [&[1], &message.encode_to_vec()[..]].concat()
        };
        let file = || pb::File { name: "a.safetensors".to_owned(), bytes: 9, sha256: vec![7; 32] };
        let pair = || pb::TokenPair {
            pair: 4,
            prompt: vec![1, 2, 3],
            chosen: vec![4, 500, 70_000],
            rejected: vec![6],
            reference_chosen: Some(-1.5),
            reference_rejected: Some(-2.5),
        };
        let batches = || vec![pb::MicroBatch { pairs: vec![pair(), pair()] }];
        let outcome = pb::PairOutcome { pair: 4, loss: 0.69, ..Default::default() };
        let sample = pb::Sample { prompt: 1, index: 2, tokens: vec![3, 4, 5], finish: 1 };
        vec![
            up(Up::StoreListening(pb::StoreListening { address: "127.0.0.1:9".to_owned() })),
            up(Up::SampleResult(pb::SampleResult {
                shard: 1,
                samples: vec![sample.clone(), sample],
                seconds: 0.5,
            })),
            up(Up::ScoreResult(pb::ScoreResult {
                batch: 1,
                pairs: vec![pb::PairLogps { pair: 1, chosen: -3.0, rejected: -4.0 }],
            })),
            up(Up::StepResult(pb::StepResult {
                step: 2,
                pairs: vec![outcome],
                ..Default::default()
            })),
            up(Up::StateSaved(pb::StateSaved { files: vec![file(), file()] })),
            up(Up::SnapshotWritten(pb::SnapshotWritten {
                step: 7,
                files: vec![file()],
                ..Default::default()
            })),
            up(Up::RateResult(pb::RateResult { batch: 3, ratings: vec![0.5, -1.25] })),
            down(Down::Rate(pb::RateBatch {
                batch: 3,
                directory: "/reward".to_owned(),
                dtype: 1,
                sequences: vec![pb::Sequence { tokens: vec![1, 2, 3] }],
            })),
            down(Down::OpenGroup(pb::OpenGroup {
                store_address: "127.0.0.1:9".to_owned(),
                timeout_seconds: 60.0,
                number: 2,
            })),
            down(Down::LoadModel(pb::LoadModel { directory: "/model".to_owned(), dtype: 1 })),
            down(Down::Sample(pb::SampleShard {
                shard: 1,
                seed: 2,
                iteration: 3,
                params: Some(pb::SamplingParams {
                    temperature: 0.7,
                    top_p: 0.9,
                    max_new_tokens: 64,
                    stop_ids: vec![2],
                    ..Default::default()
                }),
                prompts: vec![pb::SamplePrompt { prompt: 1, index: 0, tokens: vec![1, 2, 3] }],
                engine: Some(pb::SamplingEngine {
                    max_rows: 8,
                    cache_bytes: 1 << 20,
                    drafting: true,
                }),
            })),
            down(Down::Score(pb::ScoreBatch { batch: 1, micro_batches: batches() })),
            down(Down::BeginTraining(pb::BeginTraining {
                objective: Some(pb::Objective { beta: 0.1, loss: 1, ..Default::default() }),
                optimizer: Some(pb::Optimizer {
                    max_grad_norm: 1.0,
                    algorithm: Some(pb::optimizer::Algorithm::RmsProp(pb::RmsProp {
                        alpha: 0.99,
                        epsilon: 1e-8,
                    })),
                }),
                engine: Some(pb::Engine {
                    sharding: 1,
                    recompute: 1,
                    reduce: 1,
                    ..Default::default()
                }),
            })),
            down(Down::TrainStep(pb::TrainStep {
                step: 1,
                learning_rate: 5e-7,
                global_pairs: 2,
                micro_batches: batches(),
            })),
        ]
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let Some((way, message)) = bytes.split_first() else { return };
        if way % 2 == 0 {
            if let Ok(message) = pb::WorkerMessage::decode(message) {
                let _ = drift_coordinator::server::decode(message);
            }
        } else if let Ok(pb::CoordinatorMessage { body: Some(body) }) =
            pb::CoordinatorMessage::decode(message)
        {
            let _ = drift_worker::agent::decode(body);
        }
    }
}
