//! Sharded training beside unsharded, on ranks that are threads.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use super::*;
use crate::train::{MemoryReport, ReductionTimes};

pub(super) const ADAMW: Algorithm =
    Algorithm::AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };

/// The settings of these tests, sharded or not.
pub(super) fn settings(sharding: Sharding) -> TrainingSettings {
    TrainingSettings { engine: EngineSettings { sharding, ..SETTINGS.engine }, ..SETTINGS }
}

/// Seven pairs of step `number`, dealt out to the ranks in micro-batches of two.
pub(super) fn dealt(number: u64, group: Option<&ProcessGroup>) -> TrainStep {
    let (rank, ranks) = group.map_or((0, 1), |g| (g.rank().into(), g.world_size().into()));
    let own: Vec<u64> = (0..7).filter(|at| at % ranks == rank).map(|at| number + at * 3).collect();
    step(number, 7, own.chunks(2).map(|pairs| batch(pairs.iter().copied())).collect())
}

pub(super) fn run(
    trainer: &mut Trainer,
    steps: std::ops::Range<u64>,
    group: Option<&ProcessGroup>,
) {
    for number in steps {
        trainer.step(&dealt(number, group), group, &never).unwrap();
    }
}

/// All weights in fp64, by name.
pub(super) fn values(trainer: &Trainer) -> Vec<(String, Tensor)> {
    let training = trainer.training().unwrap();
    let named = training
        .buckets
        .slots()
        .flat_map(|(_, slot)| slot.named(&slot.flat_weight().unwrap()).unwrap());
    named.map(|(name, values)| (name, values.to_kind(Kind::Double).copy())).collect()
}

/// ‖ours − theirs‖ / ‖theirs‖ of the tensor where it is largest.
pub(super) fn distance(ours: &[(String, Tensor)], theirs: &[(String, Tensor)]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let tensors = ours.iter().zip(theirs).map(|((a, ours), (b, theirs))| {
        assert_eq!(a, b);
        (ours - theirs).norm().double_value(&[]) / theirs.norm().double_value(&[])
    });
    tensors.fold(0.0, f64::max)
}

fn trained(
    dir: &Path,
    kind: Kind,
    settings: TrainingSettings,
    steps: u64,
    group: &ProcessGroup,
) -> Trainer {
    let mut trainer = trainer(dir, kind);
    trainer.begin(settings, Some(group)).unwrap();
    run(&mut trainer, 0..steps, Some(group));
    trainer
}

#[test]
fn sharded_equals_unsharded_after_twenty_steps() {
    let dir = model();
    let rms_prop = SETTINGS.optimizer.algorithm;
    // In pieces, too, of which several pass between the ranks at once.
    for (ranks, algorithm, largest_piece) in
        [(2, rms_prop, LARGEST_PIECE), (3, ADAMW, LARGEST_PIECE), (3, rms_prop, 1000)]
    {
        let train = |sharding, kind| {
            let path = dir.path().to_path_buf();
            let mut settings = settings(sharding);
            settings.optimizer.algorithm = algorithm;
            settings.engine.largest_piece = largest_piece;
            on_ranks(ranks, move |group| {
                let trainer = trained(&path, kind, settings, 20, group);
                (weights(&trainer), values(&trainer))
            })
        };
        for kind in [Kind::Float, Kind::BFloat16] {
            let sharded = train(Sharding::Zero2, kind);
            // All ranks to the byte, and again.
            assert!(sharded.iter().all(|(bytes, _)| *bytes == sharded[0].0));
            assert!(train(Sharding::Zero2, kind)[0].0 == sharded[0].0);

            let whole = train(Sharding::None, kind);
            // A master at the edge between two bf16 weights may fall on either side.
            let bound = if kind == Kind::Float { 1e-5 } else { 4e-3 };
            let distance = distance(&sharded[0].1, &whole[0].1);
            assert!(distance < bound, "{ranks} ranks, {algorithm:?}, {kind:?}: {distance}");
        }
    }
}

#[test]
fn each_rank_holds_no_more_than_its_share() {
    let dir = model();
    let mut alone = trainer(dir.path(), Kind::BFloat16);
    alone.begin(settings(Sharding::Zero2), None).unwrap();
    let whole = alone.memory().unwrap();
    let elements = whole.weights / 2;
    let fp32 = 4 * elements;
    let expected = MemoryReport {
        weights: 2 * elements,
        gradients: fp32,
        masters: fp32,
        optimizer_state: fp32,
        buffers: 0,
    };
    assert_eq!(whole, expected);

    let path = dir.path().to_path_buf();
    let reports = on_ranks(3, move |group| {
        let mut trainer = trainer(&path, Kind::BFloat16);
        let mut settings = settings(Sharding::Zero2);
        settings.optimizer.algorithm = ADAMW;
        trainer.begin(settings, Some(group)).unwrap();
        let begun = trainer.memory().unwrap();
        run(&mut trainer, 0..5, Some(group));
        (begun, trainer.memory().unwrap(), trainer.training().unwrap().buckets.largest(true))
    });
    // Padding is less than one element per rank and bucket.
    let share = fp32.div_ceil(3)..=fp32.div_ceil(3) + 4 * 3 * 4;
    for (begun, trained, block) in reports {
        assert_eq!(begun.weights, whole.weights);
        assert!(share.contains(&begun.gradients), "{begun:?} {share:?}");
        assert_eq!(begun.masters, begun.gradients);
        assert_eq!(begun.optimizer_state, 2 * begun.masters);
        assert_eq!(begun.buffers, 0);
        assert_eq!(trained, MemoryReport { buffers: trained.buffers, ..begun });
        // Whole fp32 buckets, in which two micro-batches add up; then what is under way, however
        // many the steps: a block in fp32, and three pieces of its size in bf16 with their shares.
        let block = block as u64 + 3;
        let most = fp32 + 4 * 3 * 4 + 4 * block + 3 * 2 * (block + block / 3);
        assert!(trained.buffers > fp32 && trained.buffers <= most, "{trained:?} {most}");
    }
}

#[test]
fn gradients_in_bf16_cost_digits_and_nothing_else() {
    let dir = model();
    let norm = |sharding, reduce| {
        let path = dir.path().to_path_buf();
        let mut settings = settings(sharding);
        settings.engine.reduce = reduce;
        let ranks = on_ranks(2, move |group| {
            let mut trainer = trainer(&path, Kind::Float);
            trainer.begin(settings, Some(group)).unwrap();
            let report = trainer.step(&dealt(0, Some(group)), Some(group), &never).unwrap();
            run(&mut trainer, 1..4, Some(group));
            (report.grad_norm, weights(&trainer))
        });
        assert!(ranks[0].1 == ranks[1].1, "{sharding:?} {reduce:?}");
        assert_eq!(ranks[0].0.to_bits(), ranks[1].0.to_bits());
        ranks[0].0
    };
    let exact = norm(Sharding::None, ReduceKind::Float);
    for sharding in [Sharding::None, Sharding::Zero2] {
        let rounded = norm(sharding, ReduceKind::BFloat16);
        let difference = (rounded / exact - 1.0).abs();
        assert!(difference > 1e-6 && difference < 4e-3, "{sharding:?}: {rounded} {exact}");
    }
}

#[test]
fn waiting_is_a_part_of_what_reductions_take() {
    let dir = model();
    for sharding in [Sharding::None, Sharding::Zero2] {
        let path = dir.path().to_path_buf();
        let ranks = on_ranks(2, move |group| {
            let mut trainer = trainer(&path, Kind::BFloat16);
            trainer.begin(settings(sharding), Some(group)).unwrap();
            trainer.record_trace(true);
            group.barrier().unwrap();
            let began = Instant::now();
            if group.rank() == 1 {
                // Late, so that the other waits: it is done with its own part long before.
                thread::sleep(Duration::from_secs(2));
            }
            let report = trainer.step(&dealt(0, Some(group)), Some(group), &never).unwrap();
            let seconds = began.elapsed().as_secs_f64();
            let mut trace = Vec::new();
            trainer.take_trace().write_chrome(&mut trace, group.rank()).unwrap();
            (report.reduction, seconds, String::from_utf8(trace).unwrap())
        });
        for (ReductionTimes { busy, exposed }, seconds, trace) in &ranks {
            assert!(0.0 < *busy && busy <= seconds, "{busy} {seconds}");
            assert!((0.0..=*busy).contains(exposed), "{busy} {exposed}");
            for name in ["forward 0", "backward 1", "reduce bucket 3", "update bucket 3"] {
                assert!(trace.contains(name), "{name}: {trace}");
            }
        }
        assert!(ranks[0].0.exposed > 0.5, "{:?}", ranks[0].0);
    }
}

#[test]
fn a_rank_stops_while_its_peer_is_silent() {
    let dir = model();
    for sharding in [Sharding::None, Sharding::Zero2] {
        let path = dir.path().to_path_buf();
        let met = Arc::new(Barrier::new(2));
        on_ranks(2, move |group| {
            let mut trainer = trainer(&path, Kind::BFloat16);
            trainer.begin(settings(sharding), Some(group)).unwrap();
            if group.rank() == 0 {
                let before = weights(&trainer);
                let stopped = Arc::new(AtomicBool::new(false));
                let flag = Arc::clone(&stopped);
                let told = thread::spawn(move || {
                    thread::sleep(Duration::from_millis(100));
                    flag.store(true, Ordering::Relaxed);
                    Instant::now()
                });
                let stop = || stopped.load(Ordering::Relaxed);
                let error = trainer.step(&dealt(0, Some(group)), Some(group), &stop).unwrap_err();
                assert!(matches!(error, TrainError::Stopped), "{error}");
                assert!(told.join().unwrap().elapsed() < Duration::from_secs(5));
                assert!(weights(&trainer) == before);
            }
            // The silent one stays until the other has stopped; then both drop the group.
            met.wait();
        });
    }
}

#[test]
fn shares_belong_to_the_group_that_training_began_with() {
    let dir = model();
    let path: PathBuf = dir.path().to_path_buf();
    on_ranks(2, move |group| {
        let mut trainer = trainer(&path, Kind::BFloat16);
        trainer.begin(settings(Sharding::Zero2), Some(group)).unwrap();
        let error = trainer.step(&dealt(0, None), None, &never).unwrap_err();
        assert!(matches!(error, TrainError::OtherGroup { given: (0, 1), .. }), "{error}");
        assert!(matches!(trainer.gradients(), Err(TrainError::Sharded)));
        run(&mut trainer, 0..1, Some(group));
    });
}
