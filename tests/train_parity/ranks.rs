//! Two ranks' weights equal one's, and repeat to the byte.

use drift_worker::train::{EngineSettings, PreferenceLoss, TokenPair, TrainStep, Trainer};
use tch::Kind;

use super::compare::relative;
use super::engine::{on_ranks, settings};
use super::trl::{Job, random_models, tensors};
use super::{BATCH, VOCABULARY, objective, pairs};
use crate::support::training::{load, micro_batches, random_pairs};

const WEIGHTS: f64 = 1e-5;

#[test]
fn two_ranks_train_as_one_and_repeat_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let models = random_models(dir.path());
    // No RPO: its mean is over a rank's tokens, so that it depends on who has which pairs.
    let mut job = super::job(dir.path(), &models[1], objective(PreferenceLoss::Sigmoid, 0.0));
    // Two micro-batches a step; the last step is short, so that rank 1 has nothing in it.
    job.pairs = random_pairs(8 + 8 + 3, VOCABULARY);
    job.learning_rate = 1e-4;
    let reference = load(&job.reference, Kind::Float);
    let pairs = pairs::with_reference(&reference, job.pairs.clone(), BATCH);

    for kind in [Kind::Float, Kind::BFloat16] {
        let one = train(&job, kind, &pairs, 1);
        let two = train(&job, kind, &pairs, 2);
        assert!(two[0] == two[1], "{kind:?}: the ranks differ from one another");
        assert!(train(&job, kind, &pairs, 2) == two, "{kind:?}: two runs differ");
        if kind == Kind::Float {
            let [one, two] = [&one, &two].map(|run| {
                let file = dir.path().join("weights.st");
                std::fs::write(&file, &run[0]).unwrap();
                tensors(&file)
            });
            let worst = two.iter().map(|(name, t)| relative(t, &one[name])).fold(0.0, f64::max);
            eprintln!("two ranks against one: weights within {worst:.1e} (bound {WEIGHTS:.0e})");
            assert!(worst < WEIGHTS, "{worst:e}");
        }
    }
}

/// Each rank's `model.safetensors` after a few steps.
fn train(job: &Job, kind: Kind, pairs: &[TokenPair], world_size: usize) -> Vec<Vec<u8>> {
    on_ranks(world_size, |rank, group| {
        let mut trainer = load(&job.policy, kind);
        trainer.begin(settings(job, EngineSettings::default()), group).unwrap();
        for (number, global) in pairs.chunks(2 * BATCH).enumerate() {
            let dealt = micro_batches(global, BATCH).into_iter().enumerate();
            let mine = dealt.filter(|(index, _)| index % world_size == rank);
            let step = TrainStep {
                step: number as u64,
                learning_rate: job.learning_rate,
                global_pairs: global.len() as u32,
                micro_batches: mine.map(|(_, batch)| batch).collect(),
            };
            trainer.step(&step, group, &|| false).unwrap();
        }
        saved(&trainer)
    })
}

fn saved(trainer: &Trainer) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    trainer.policy().save(dir.path()).unwrap();
    std::fs::read(dir.path().join("model.safetensors")).unwrap()
}
