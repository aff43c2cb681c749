//! Our side: a job, computed one way or another.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use drift_worker::collective::{ProcessGroup, Store};
use drift_worker::train::{
    EngineSettings, OptimizerSettings, Sharding, StepReport, TokenPair, TrainStep, Trainer,
    TrainingSettings,
};
use tch::{Kind, Tensor};

use super::pairs::with_reference;
use super::trl::{Job, MAX_GRAD_NORM, tensors};
use crate::support::training::{load, micro_batches};

const HOST: &str = "127.0.0.1";
const PATIENCE: Duration = Duration::from_secs(120);

/// How the engine goes about a job; the result must be the same.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Way {
    pub(super) engine: EngineSettings,
    /// At most so many pairs in one pass over the model; 0 has a rank's share in one.
    pub(super) pass_pairs: usize,
}

/// What comes of a job.
pub(super) struct Ours {
    /// Of each step, each rank's report.
    pub(super) reports: Vec<Vec<StepReport>>,
    /// The first step's gradients, clipped; where ranks hold parts of them, none.
    pub(super) gradients: Option<HashMap<String, Tensor>>,
    /// After the last step.
    pub(super) weights: HashMap<String, Tensor>,
}

/// A job's pairs with their reference log-probabilities, in fp32.
pub(super) fn scored(job: &Job) -> Vec<TokenPair> {
    with_reference(&load(&job.reference, Kind::Float), job.pairs.clone(), job.batch)
}

/// Trains in fp32 on `scored` pairs, on as many ranks as the job has devices.
pub(super) fn train(job: &Job, scored: &[TokenPair], way: Way) -> Ours {
    let settings = settings(job, way.engine);
    let whole_gradients = job.devices == 1 || way.engine.sharding == Sharding::None;
    let mut ranks = on_ranks(job.devices, |rank, group| {
        let mut trainer = load(&job.policy, Kind::Float);
        trainer.begin(settings, group).unwrap();
        let (mut reports, mut gradients) = (Vec::new(), None);
        for (number, global) in scored.chunks(job.step_pairs()).enumerate() {
            let share = global.chunks(job.batch).nth(rank).unwrap();
            let pass_pairs = if way.pass_pairs == 0 { job.batch } else { way.pass_pairs };
            let step = TrainStep {
                step: number as u64,
                learning_rate: job.learning_rate,
                global_pairs: global.len() as u32,
                micro_batches: micro_batches(share, pass_pairs),
            };
            reports.push(trainer.step(&step, group, &|| false).unwrap());
            if number == 0 && whole_gradients {
                gradients = Some(copied_gradients(&trainer));
            }
        }
        (reports, gradients, weights(&trainer))
    });
    let steps = ranks[0].0.len();
    let reports = (0..steps).map(|step| ranks.iter().map(|rank| rank.0[step].clone()).collect());
    let reports = reports.collect();
    let (_, gradients, weights) = ranks.swap_remove(0);
    Ours { reports, gradients, weights }
}

/// Runs `work` on each of `count` ranks, each in a thread, over a real group;
/// one rank alone has none.
pub(super) fn on_ranks<T: Send>(
    count: usize,
    work: impl Fn(usize, Option<&ProcessGroup>) -> T + Sync,
) -> Vec<T> {
    if count == 1 {
        return vec![work(0, None)];
    }
    let (store, port) = Store::listen(HOST).unwrap();
    let mut store = Some(store);
    let work = &work;
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..count)
            .map(|rank| {
                let store = store.take();
                scope.spawn(move || {
                    let connect = || Store::connect(HOST, port, PATIENCE).unwrap();
                    let store = store.unwrap_or_else(connect);
                    let (number, size) = (rank as u32, count as u32);
                    let group =
                        ProcessGroup::gloo(&store, 1, number, size, PATIENCE, HOST).unwrap();
                    let result = work(rank, Some(&group));
                    // Nobody leaves while another still reduces.
                    group.barrier().unwrap();
                    result
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

pub(super) fn settings(job: &Job, engine: EngineSettings) -> TrainingSettings {
    let optimizer = OptimizerSettings { algorithm: job.algorithm, max_grad_norm: MAX_GRAD_NORM };
    TrainingSettings { objective: job.objective, optimizer, engine }
}

/// The last step's gradients, apart from the buffers that the next one overwrites.
pub(super) fn copied_gradients(trainer: &Trainer) -> HashMap<String, Tensor> {
    let copied = |(name, tensor): (String, Tensor)| (name, tensor.copy());
    trainer.gradients().unwrap().into_iter().map(copied).collect()
}

fn weights(trainer: &Trainer) -> HashMap<String, Tensor> {
    let dir = tempfile::tempdir().unwrap();
    trainer.policy().save(dir.path()).unwrap();
    tensors(&dir.path().join("model.safetensors"))
}
