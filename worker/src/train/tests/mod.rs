#![allow(clippy::unwrap_used)]

mod sharded;
mod state;

use std::cell::Cell;
use std::f64::consts::LN_2;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::head::{Head, RowScores};
use super::packing::{Packed, Rows};
use super::{
    Algorithm, EngineSettings, LARGEST_PIECE, MicroBatch, Objective, OptimizerSettings,
    PreferenceLoss, Recompute, ReduceKind, ReferenceLogps, Sharding, StepReport, TokenPair,
    TrainError, TrainStep, Trainer, TrainingSettings,
};
use crate::collective::{ProcessGroup, Store};
use crate::host::count::{self, Crossings};
use crate::model::Decoder;

const VOCABULARY: i64 = 61;
const SETTINGS: TrainingSettings = TrainingSettings {
    objective: Objective { loss: PreferenceLoss::Sigmoid, beta: 0.1, rpo_alpha: 0.0 },
    optimizer: OptimizerSettings {
        algorithm: Algorithm::RmsProp { alpha: 0.99, epsilon: 1e-8 },
        max_grad_norm: 1.0,
    },
    engine: EngineSettings {
        sharding: Sharding::None,
        recompute: Recompute::None,
        reduce: ReduceKind::Float,
        largest_piece: LARGEST_PIECE,
    },
};

fn never() -> bool {
    false
}

/// A small Llama with grouped heads and a tied head, weights random but fixed.
fn model() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "hidden_act": "silu", "torch_dtype": "float32"}"#;
    fs::write(dir.path().join("config.json"), config).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, 32]),
        ("model.norm.weight".to_owned(), vec![32]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("self_attn.q_proj", vec![32, 32]),
            ("self_attn.k_proj", vec![16, 32]),
            ("self_attn.v_proj", vec![16, 32]),
            ("self_attn.o_proj", vec![32, 32]),
            ("mlp.gate_proj", vec![48, 32]),
            ("mlp.up_proj", vec![48, 32]),
            ("mlp.down_proj", vec![32, 48]),
            ("input_layernorm", vec![32]),
            ("post_attention_layernorm", vec![32]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let tensors: Vec<(String, Tensor)> = shapes
        .into_iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let values = noise(seed as u64, shape.iter().product());
            let scale = if shape.len() == 1 { 1.0 + values * 0.1 } else { values * 0.2 };
            (name, scale.reshape(&shape))
        })
        .collect();
    Tensor::write_safetensors(&tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

/// Fixed numbers between −1 and 1 that look like noise.
fn noise(seed: u64, length: i64) -> Tensor {
    let value = |at: u64| ((at * 7919 + seed * 104_729 + 13) as f64).sin() as f32;
    Tensor::from_slice(&(0..length as u64).map(value).collect::<Vec<_>>())
}

fn trainer(dir: &Path, kind: Kind) -> Trainer {
    Trainer::new(Decoder::load(dir, kind, Device::Cpu).unwrap())
}

fn begun(dir: &Path, kind: Kind) -> Trainer {
    let mut trainer = trainer(dir, kind);
    trainer.begin(SETTINGS, None).unwrap();
    trainer
}

fn pair(pair: u64) -> TokenPair {
    let tokens = |seed: u64, length: u64| {
        (0..length).map(|at| ((seed * 31 + at * at * 7 + at) % VOCABULARY as u64) as u32).collect()
    };
    TokenPair {
        pair,
        prompt: tokens(pair + 1, 3 + pair % 5),
        chosen: tokens(pair + 2, 2 + pair % 3),
        rejected: tokens(pair + 3, 1 + pair % 4),
        reference: Some(ReferenceLogps { chosen: -9.0 - pair as f64, rejected: -11.0 }),
    }
}

fn batch(pairs: impl IntoIterator<Item = u64>) -> MicroBatch {
    MicroBatch { pairs: pairs.into_iter().map(pair).collect() }
}

fn step(number: u64, global_pairs: u32, micro_batches: Vec<MicroBatch>) -> TrainStep {
    TrainStep { step: number, learning_rate: 1e-3, global_pairs, micro_batches }
}

/// Three steps over the same six pairs.
fn three_steps(trainer: &mut Trainer, from: u64, group: Option<&ProcessGroup>) {
    for number in from..3 {
        let share = match group.map_or(0, ProcessGroup::rank) {
            0 => vec![batch(0..4), batch(4..6)],
            // Nothing for the second rank: the first has it all.
            _ => Vec::new(),
        };
        trainer.step(&step(number, 6, share), group, &never).unwrap();
    }
}

/// All weights, as bytes.
fn weights(trainer: &Trainer) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let files = trainer.policy().save(dir.path()).unwrap();
    files.iter().flat_map(|file| fs::read(dir.path().join(&file.name)).unwrap()).collect()
}

/// Runs `body` on each of `world_size` ranks, each on a thread of its own, and
/// gives what they gave, in the order of ranks.
fn on_ranks<R: Send + 'static>(
    world_size: u32,
    body: impl Fn(&ProcessGroup) -> R + Clone + Send + 'static,
) -> Vec<R> {
    const HOST: &str = "127.0.0.1";
    const PATIENCE: Duration = Duration::from_secs(60);
    let (store, port) = Store::listen(HOST).unwrap();
    let form = move |store: &Store, rank| {
        let group = ProcessGroup::gloo(store, 1, rank, world_size, PATIENCE, HOST).unwrap();
        // A rank that is done and leaves while the others still connect to one another would
        // fail them.
        group.barrier().unwrap();
        group
    };
    let others: Vec<_> = (1..world_size)
        .map(|rank| {
            let body = body.clone();
            thread::spawn(move || body(&form(&Store::connect(HOST, port, PATIENCE).unwrap(), rank)))
        })
        .collect();
    let first = body(&form(&store, 0));
    std::iter::once(first).chain(others.into_iter().map(|rank| rank.join().unwrap())).collect()
}

#[test]
fn scored_and_trained_alike_the_first_loss_is_exactly_ln_2() {
    let dir = model();
    for kind in [Kind::BFloat16, Kind::Float] {
        let mut trainer = begun(dir.path(), kind);
        let mut batches = vec![batch(0..4), batch(4..7)];
        let mut scores = trainer.score(&batches, &never).unwrap().into_iter();
        for pair in batches.iter_mut().flat_map(|batch| &mut batch.pairs) {
            let logps = scores.next().unwrap();
            assert_eq!(logps.pair, pair.pair);
            assert!(logps.chosen < 0.0 && logps.rejected < 0.0);
            pair.reference =
                Some(ReferenceLogps { chosen: logps.chosen, rejected: logps.rejected });
        }
        let report = trainer.step(&step(0, 7, batches), None, &never).unwrap();
        for outcome in &report.pairs {
            assert_eq!(outcome.loss.to_bits(), LN_2.to_bits(), "{kind:?} {outcome:?}");
            assert_eq!((outcome.reward_chosen, outcome.reward_rejected), (0.0, 0.0));
        }
        assert_eq!(report.pairs.len(), 7);
        assert!(report.grad_norm > 0.0);
    }
}

#[test]
fn a_pairs_scores_do_not_depend_on_its_neighbours_or_its_sides() {
    let dir = model();
    let trainer = trainer(dir.path(), Kind::Float);
    let together = trainer.score(&[batch(0..6)], &never).unwrap();
    for (number, packed) in together.iter().enumerate() {
        let mut swapped = pair(number as u64);
        std::mem::swap(&mut swapped.chosen, &mut swapped.rejected);
        let alone = trainer.score(&[MicroBatch { pairs: vec![swapped] }], &never).unwrap()[0];
        // y⁻ in the place of y⁺ attends by another path, and must come to the same.
        assert!((alone.rejected - packed.chosen).abs() < 1e-4, "{alone:?} {packed:?}");
        assert!((alone.chosen - packed.rejected).abs() < 1e-4, "{alone:?} {packed:?}");
    }
}

#[test]
fn a_single_reply_can_be_scored_and_not_trained() {
    let dir = model();
    let mut trainer = trainer(dir.path(), Kind::Float);
    let pairs = trainer.score(&[batch(0..6)], &never).unwrap();
    let mut single = batch(0..6);
    for pair in single.pairs.iter_mut().step_by(2) {
        pair.rejected.clear();
    }
    let scored = trainer.score(std::slice::from_ref(&single), &never).unwrap();
    for (number, (found, pair)) in scored.iter().zip(&pairs).enumerate() {
        assert!((found.chosen - pair.chosen).abs() < 1e-5, "{found:?} {pair:?}");
        let rejected = if number % 2 == 0 { 0.0 } else { pair.rejected };
        assert!((found.rejected - rejected).abs() < 1e-5, "{found:?} {pair:?}");
    }
    trainer.begin(SETTINGS, None).unwrap();
    let refused = trainer.step(&step(0, 6, vec![single]), None, &never).unwrap_err();
    assert!(refused.to_string().contains("the rejected reply is empty"), "{refused}");
}

#[test]
fn micro_batches_add_up() {
    let dir = model();
    let run = |batches: Vec<MicroBatch>| -> (StepReport, Trainer) {
        let mut trainer = begun(dir.path(), Kind::Float);
        let report = trainer.step(&step(0, 6, batches), None, &never).unwrap();
        (report, trainer)
    };
    let (joint, _) = run(vec![batch(0..6)]);
    let (split, _) = run(vec![batch(0..1), batch(1..4), batch(4..6)]);
    assert!((joint.grad_norm / split.grad_norm - 1.0).abs() < 1e-5, "{joint:?} {split:?}");
    assert_eq!(joint.tokens, split.tokens);
    for (a, b) in joint.pairs.iter().zip(&split.pairs) {
        assert!((a.loss - b.loss).abs() < 1e-5, "{a:?} {b:?}");
    }
}

#[test]
fn runs_repeat_to_the_byte_and_learn() {
    let dir = model();
    let run = || {
        let mut trainer = begun(dir.path(), Kind::BFloat16);
        let losses: Vec<f64> = (0..8)
            .map(|number| {
                let share = vec![batch(0..4), batch(4..6)];
                let report = trainer.step(&step(number, 6, share), None, &never).unwrap();
                report.pairs.iter().map(|outcome| outcome.loss).sum()
            })
            .collect();
        (losses, weights(&trainer))
    };
    let (losses, bytes) = run();
    assert!(losses[7] < losses[0], "{losses:?}");
    assert!(run() == (losses, bytes));
}

#[test]
fn stopping_changes_nothing() {
    let dir = model();
    let mut undisturbed = begun(dir.path(), Kind::BFloat16);
    three_steps(&mut undisturbed, 0, None);

    let mut trainer = begun(dir.path(), Kind::BFloat16);
    let before = weights(&trainer);
    // At each of its checks once, until a step gets through.
    let share = || vec![batch(0..4), batch(4..6)];
    for allowed in 0.. {
        let checks = Cell::new(0);
        let stop = || checks.replace(checks.get() + 1) >= allowed;
        match trainer.step(&step(0, 6, share()), None, &stop) {
            Err(TrainError::Stopped) => assert!(weights(&trainer) == before),
            Err(other) => panic!("{other}"),
            Ok(_) => {
                // Blocks and head, there and back, of two micro-batches.
                assert!(allowed >= 12, "only {allowed} checks");
                break;
            }
        }
    }
    three_steps(&mut trainer, 1, None);
    assert!(weights(&trainer) == weights(&undisturbed));
}

/// A pair with more rows than may have logits at once is scored in chunks, all but the
/// last of which are computed again.
#[test]
fn the_head_in_chunks_is_the_head_at_once() {
    let dir = model();
    let options = (Kind::Float, Device::Cpu);
    let policy = Decoder::load(dir.path(), options.0, options.1).unwrap();
    let packed = Packed::new(&batch(0..6), None, options.0, options.1).unwrap();
    let rows = packed.targets.size()[0];
    let normed = noise(9, rows * 32).reshape([rows, 32]);
    let run = |most_rows| {
        let mut head = Head::new(&policy, &packed, &never);
        head.most_rows = most_rows;
        let (mut told, mut logps) = (Vec::new(), Vec::new());
        let evaluate = |pairs: Range<usize>, scores: &RowScores| {
            told.push(pairs);
            logps.extend_from_slice(&scores.logps);
            Ok(scores.logps.iter().map(|logp| logp.sin()).collect())
        };
        let by_weight = Tensor::zeros([VOCABULARY, 32], options);
        let add = |words: Rows, left: &Tensor, right: &Tensor| {
            words.of(&by_weight)?.f_add_(&left.f_mm(right)?).map(drop)
        };
        let by_normed = head.backward(&normed, evaluate, add).unwrap();
        assert!(logps == head.scores(&normed).unwrap().logps);
        (told, [Tensor::from_slice(&logps), by_normed, by_weight])
    };
    let (told, at_once) = run(rows);
    assert!(told.len() == 1 && told[0] == (0..6), "{told:?}");
    // Replies of 2 to 4 and of 1 to 4 tokens.
    let (told, in_chunks) = run(4);
    assert_eq!(told, [0..1, 1..2, 2..3, 3..4, 4..5, 5..6]);
    for (chunked, whole) in in_chunks.iter().zip(&at_once) {
        let error = ((chunked - whole).norm() / whole.norm()).double_value(&[]);
        assert!(error < 1e-6, "{error:e}");
    }
}

#[test]
fn a_rank_without_pairs_joins_every_reduction() {
    let dir = model();
    let mut alone = begun(dir.path(), Kind::BFloat16);
    three_steps(&mut alone, 0, None);

    let path = dir.path().to_path_buf();
    let both = on_ranks(2, move |group| {
        let mut trainer = begun(&path, Kind::BFloat16);
        three_steps(&mut trainer, 0, Some(group));
        weights(&trainer)
    });
    assert!(both.iter().all(|weights_of_one| *weights_of_one == weights(&alone)));
}

#[test]
fn a_gradient_that_is_not_finite_moves_nothing() {
    let dir = model();
    let mut trainer = begun(dir.path(), Kind::BFloat16);
    let before = weights(&trainer);
    let mut poisoned = batch(0..2);
    poisoned.pairs[1].reference = Some(ReferenceLogps { chosen: f64::NAN, rejected: -3.0 });
    let error = trainer.step(&step(0, 2, vec![poisoned]), None, &never).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 0, .. }), "{error}");
    assert!(weights(&trainer) == before);
    trainer.step(&step(0, 2, vec![batch(0..2)]), None, &never).unwrap();
}

#[test]
fn steps_that_make_no_sense_are_refused() {
    let dir = model();
    let mut trainer = trainer(dir.path(), Kind::Float);
    let whole = || step(0, 2, vec![batch(0..2)]);
    assert!(matches!(trainer.step(&whole(), None, &never), Err(TrainError::NotBegun)));
    assert!(matches!(trainer.save_state(dir.path()), Err(TrainError::NotBegun)));

    trainer.begin(SETTINGS, None).unwrap();
    let refused = |trainer: &mut Trainer, step: TrainStep| {
        trainer.step(&step, None, &never).unwrap_err().to_string()
    };
    let late = TrainStep { step: 1, ..whole() };
    assert_eq!(refused(&mut trainer, late), "step 1 was asked for, and step 0 is next");
    let crowded = TrainStep { global_pairs: 1, ..whole() };
    assert!(refused(&mut trainer, crowded).contains("global_pairs = 1"));
    let mut unscored = whole();
    unscored.micro_batches[0].pairs[0].reference = None;
    assert!(refused(&mut trainer, unscored).contains("no reference log-probabilities"));
    trainer.step(&whole(), None, &never).unwrap();
}

#[test]
fn adamw_decays_matrices_and_spares_norms() {
    let dir = model();
    let trained = |weight_decay| {
        let mut trainer = trainer(dir.path(), Kind::Float);
        let mut settings = SETTINGS;
        settings.optimizer.algorithm =
            Algorithm::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay };
        trainer.begin(settings, None).unwrap();
        trainer.step(&step(0, 4, vec![batch(0..4)]), None, &never).unwrap();
        sharded::values(&trainer)
    };
    for ((name, decayed), (_, plain)) in trained(0.5).into_iter().zip(trained(0.0)) {
        assert_eq!(decayed.equal(&plain), name.ends_with("norm.weight"), "{name}");
    }
}

/// The table of `host.rs`.
#[test]
fn a_step_reads_no_more_than_it_must() {
    let dir = model();
    let mut trainer = begun(dir.path(), Kind::Float);
    let share = || vec![batch(0..4), batch(4..6)];
    count::take();
    trainer.score(&share(), &never).unwrap();
    assert_eq!(count::take(), Crossings { reads: 2, uploads: 2 * 4 });
    trainer.step(&step(0, 6, share()), None, &never).unwrap();
    assert_eq!(count::take(), Crossings { reads: 2 + 1, uploads: 2 * 8 });
}
