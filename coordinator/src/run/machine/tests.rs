//! Runs simulated to their end: workers that answer whatever they are asked.

mod faults;
mod leaving;
mod rating;
mod workers;
mod world;

use std::time::Duration;

use super::*;
use crate::config::{Settings, TrainingSettings};
use crate::domain::{FinishReason, PromptId, Sample};
use crate::run::command::WrittenFile;
use crate::run::metrics::PairOutcome;
use crate::run::plan::{CostModel, PairSize};
use crate::store::{Commit, CommittedPhase, TO_BE_RATED};

fn shape(workers: u32) -> RunShape {
    shape_with(workers, workers)
}

/// A run that began with `began_with` workers and now has `workers`.
fn shape_with(workers: u32, began_with: u32) -> RunShape {
    let settings = Settings {
        workers: began_with,
        training: TrainingSettings { pairs_per_worker: 2, ..TrainingSettings::default() },
        ..Settings::default()
    };
    let cost = CostModel { token: 100, attended: 1, response: 10 };
    let prompts = (0..20).map(|n| (PromptId(n), 10 + n as usize)).collect();
    let mut shape = RunShape::new(&settings, workers, cost, prompts, false);
    shape.sharding.prompts = 3;
    shape
}

fn pairs() -> PairSets {
    let size = |n| PairSize { id: PairId(n), tokens: 30 + n as usize, chosen: 9, rejected: 8 };
    PairSets { train: (0..10).map(size).collect(), held_out: (10..13).map(size).collect() }
}

/// Samples of each batch that is rated.
const RATING_BATCHES: [usize; 7] = [4, 4, 4, 4, 4, 4, 2];

const START: ReferenceLogps = ReferenceLogps { chosen: -10.0, rejected: -20.0 };

/// The report that a worker gives to a command.
fn answer(command: &Command) -> Report {
    let ids = |batches: &[Vec<PairRef>]| batches.iter().flatten().copied().collect::<Vec<_>>();
    match command {
        Command::OpenGroup { .. } | Command::BeginTraining | Command::LoadState(..) => Report::Done,
        Command::LoadModel(_) => Report::ModelReady { parameters: 1 },
        Command::Sample { shard, .. } => Report::ShardDone {
            shard: *shard,
            samples: vec![Sample {
                prompt: PromptId(shard.0),
                index: 0,
                tokens: vec![1],
                finish: FinishReason::Stop,
            }],
        },
        Command::Score { batch, micro_batches } => Report::Scored {
            batch: *batch,
            logps: ids(micro_batches).iter().map(|pair| (pair.id, START)).collect(),
        },
        Command::Rate { batch } => Report::Rated {
            batch: *batch,
            ratings: (0..RATING_BATCHES[*batch as usize]).map(|n| n as f64).collect(),
        },
        Command::TrainStep { step, micro_batches, .. } => Report::Stepped(StepOutcomes {
            step: *step,
            grad_norm: 1.0,
            tokens: 5,
            seconds: 0.1,
            reduce_seconds: 0.5,
            exposed_seconds: 0.25,
            pairs: ids(micro_batches)
                .iter()
                .map(|pair| PairOutcome {
                    id: pair.id,
                    loss: std::f64::consts::LN_2,
                    logps: pair.reference.expect("training needs reference log-probabilities"),
                    reward_chosen: 0.0,
                    reward_rejected: 0.0,
                    logits_chosen: 0.0,
                    logits_rejected: 0.0,
                })
                .collect(),
        }),
        Command::SaveState(SnapshotId::EndOf(..)) => Report::StateSaved(vec![]),
        Command::SaveState(SnapshotId::After(..)) => Report::Done,
        Command::SaveModel(..) => Report::ModelSaved(vec![file("model.safetensors")]),
    }
}

fn file(name: &str) -> WrittenFile {
    WrittenFile { name: name.into(), bytes: 1, sha256: [0; 32] }
}

/// Feeds a machine until it ends, or until `halt` holds of an effect.
fn simulate(
    machine: &mut Machine,
    first: Vec<Event>,
    halt: &dyn Fn(&Effect) -> bool,
) -> Vec<Effect> {
    simulate_with(machine, first, halt, &|_, command| answer(command))
}

/// As [`simulate`], with workers that answer as told.
fn simulate_with(
    machine: &mut Machine,
    first: Vec<Event>,
    halt: &dyn Fn(&Effect) -> bool,
    answer: &dyn Fn(Rank, &Command) -> Report,
) -> Vec<Effect> {
    let mut events: std::collections::VecDeque<Event> = first.into();
    let mut seen = Vec::new();
    while let Some(event) = events.pop_front() {
        for effect in machine.step(Duration::ZERO, event) {
            match &effect {
                Effect::Send(rank, command) => {
                    if matches!(command, Command::OpenGroup { store: None, .. }) {
                        events.push_back(Event::Told(*rank, Report::StoreListening("a:1".into())));
                    }
                    events.push_back(Event::Told(*rank, answer(*rank, command)));
                }
                Effect::PlanRating(_) => {
                    events.push_back(Event::RatingPlanned(RATING_BATCHES.to_vec()));
                }
                Effect::BuildPairs(_) => events.push_back(Event::PairsBuilt(pairs())),
                Effect::Publish(..) => events.push_back(Event::CheckpointPublished),
                _ => {}
            }
            let halted = halt(&effect);
            seen.push(effect);
            if halted {
                return seen;
            }
        }
        assert!(seen.len() < 10_000, "the run does not end");
    }
    seen
}

fn attach(workers: u32) -> Vec<Event> {
    (0..workers).map(|rank| Event::Attached(Rank(rank))).collect()
}

fn commits(effects: &[Effect]) -> Vec<(u32, CommittedPhase, Option<u32>)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Commit { iteration, phase, epoch, .. } => {
                Some((iteration.0, *phase, epoch.map(|e| e.0)))
            }
            _ => None,
        })
        .collect()
}

fn work(effects: &[Effect]) -> Vec<(Rank, Command)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Send(rank, command) => Some((*rank, command.clone())),
            _ => None,
        })
        .collect()
}

#[test]
fn a_run_commits_every_arrow_in_order_and_finishes() {
    use CommittedPhase as C;
    for workers in [1, 2, 5] {
        let mut machine = Machine::new(Duration::ZERO, shape(workers), Resume::default());
        let effects = simulate(&mut machine, attach(workers), &|_| false);
        assert_eq!(effects.last(), Some(&Effect::End(Outcome::Finished)));
        let mut expected = vec![(0, C::Prepared, None), (0, C::Paired, None), (0, C::Scored, None)];
        for epoch in 0..3 {
            expected.extend([(0, C::Trained, Some(epoch)), (0, C::Evaluated, Some(epoch))]);
        }
        expected.push((0, C::Published, None));
        for k in 1..=2 {
            expected.extend([
                (k, C::Sampled, None),
                (k, C::Paired, None),
                (k, C::Scored, None),
                (k, C::Trained, Some(0)),
                (k, C::Evaluated, Some(0)),
                (k, C::Published, None),
            ]);
        }
        expected.push((2, C::Finished, None));
        assert_eq!(commits(&effects), expected, "{workers} workers");
    }
}

#[test]
fn what_waits_and_what_is_in_hand_is_told() {
    let mut machine = Machine::new(Duration::ZERO, shape(2), Resume::default());
    assert_eq!(machine.commands(), (0, 0), "nobody is here");
    simulate(&mut machine, attach(2), &|e| matches!(e, Effect::Began(_, PhaseName::Sampling, ..)));
    assert_eq!(machine.commands(), (6, 2), "eight shards, and two workers with one each");
    machine.step(Duration::ZERO, Event::Lost(Rank(0), "killed".into()));
    assert_eq!(machine.commands(), (7, 1), "what it held waits again");
    machine.step(Duration::ZERO, Event::StopRequested);
    assert_eq!(machine.commands(), (0, 0));
}

#[test]
fn the_first_steps_passes_are_those_that_scoring_computed() {
    let mut machine = Machine::new(Duration::ZERO, shape(2), Resume::default());
    let effects = simulate(&mut machine, attach(2), &|e| {
        matches!(e, Effect::Commit { phase: CommittedPhase::Trained, .. })
    });
    let passes = |batches: &[Vec<PairRef>]| -> Vec<Vec<PairId>> {
        batches.iter().map(|pass| pass.iter().map(|p| p.id).collect()).collect()
    };
    let of = |rank: u32, training: bool| -> Vec<Vec<Vec<PairId>>> {
        work(&effects)
            .iter()
            .filter_map(|(r, command)| match command {
                Command::Score { micro_batches, .. } if !training && r.0 == rank => {
                    Some(passes(micro_batches))
                }
                Command::TrainStep { micro_batches, .. } if training && r.0 == rank => {
                    Some(passes(micro_batches)).filter(|p| !p.is_empty())
                }
                _ => None,
            })
            .collect()
    };
    for rank in 0..2 {
        let (scored, trained) = (of(rank, false), of(rank, true));
        assert!(!trained.is_empty());
        assert_eq!(scored[..trained.len()], trained, "rank {rank}");
    }
}

#[test]
fn resumed_after_any_commit_the_rest_is_the_same_work() {
    let whole = {
        let mut machine = Machine::new(Duration::ZERO, shape(2), Resume::default());
        simulate(&mut machine, attach(2), &|_| false)
    };
    // After the last commit there is no run to go on with, and no machine.
    let is_commit = |effect: &Effect| matches!(effect, Effect::Commit { phase, .. } if *phase != CommittedPhase::Finished);
    let cuts: Vec<usize> = (0..whole.len()).filter(|&n| is_commit(&whole[n])).collect();
    for cut in cuts {
        let Effect::Commit { iteration, phase, epoch, detail } = &whole[cut] else {
            unreachable!()
        };
        let last = Commit {
            iteration: *iteration,
            phase: *phase,
            epoch: *epoch,
            at: 0.0,
            detail: detail.clone(),
        };
        let position = shape(2).extent.position(Some(&last), 2);
        let scored = matches!(
            position,
            Position::Training(..) | Position::Evaluating(..) | Position::Publishing(_)
        );
        let resume = Resume {
            position,
            pairs: pairs(),
            references: if scored {
                (0..13).map(|n| (PairId(n), START)).collect()
            } else {
                BTreeMap::new()
            },
            ..Resume::default()
        };
        let mut machine = Machine::new(Duration::ZERO, shape(2), resume);
        let resumed = simulate(&mut machine, attach(2), &|_| false);
        assert_eq!(commits(&resumed), commits(&whole[cut + 1..]), "after {last:?}");
        // Which rank answers first is chance; what each rank is told is not.
        let compute = |effects: &[Effect]| -> Vec<(Rank, Command)> {
            let mut all: Vec<_> = work(effects)
                .into_iter()
                .filter(|(_, c)| {
                    matches!(
                        c,
                        Command::Score { .. } | Command::TrainStep { .. } | Command::SaveModel(..)
                    )
                })
                .collect();
            all.sort_by_key(|(rank, _)| *rank);
            all
        };
        assert_eq!(compute(&resumed), compute(&whole[cut + 1..]), "after {last:?}");
    }
}

#[test]
fn shards_in_the_journal_are_not_sampled_again() {
    let done = vec![crate::domain::ShardId(0), crate::domain::ShardId(3)];
    let resume = Resume {
        position: Position::Sampling(Iteration(1)),
        shards_done: done.clone(),
        ..Resume::default()
    };
    let mut machine = Machine::new(Duration::ZERO, shape(2), resume);
    let effects = simulate(&mut machine, attach(2), &|e| matches!(e, Effect::BuildPairs(_)));
    let sampled: Vec<_> = work(&effects)
        .into_iter()
        .filter_map(|(_, c)| match c {
            Command::Sample { shard, .. } => Some(shard),
            _ => None,
        })
        .collect();
    // 20 prompts by threes are 7 shards; two workers get as many each.
    assert_eq!(sampled.len(), 8 - done.len());
    assert!(done.iter().all(|shard| !sampled.contains(shard)));
    assert!(matches!(
        work(&effects).iter().find(|(_, c)| matches!(c, Command::LoadModel(_))),
        Some((_, Command::LoadModel(ModelSource::Checkpoint(Iteration(0)))))
    ));
}

#[test]
fn with_the_initial_model_as_reference_it_scores_and_the_policy_comes_back() {
    let mut shape = shape(1);
    shape.training.reference = Reference::Initial;
    let mut machine = Machine::new(Duration::ZERO, shape, Resume::default());
    let effects = simulate(&mut machine, attach(1), &|_| false);
    let loads: Vec<_> = work(&effects)
        .into_iter()
        .filter_map(|(_, c)| match c {
            Command::LoadModel(source) => Some(source),
            _ => None,
        })
        .collect();
    use ModelSource::{Base, Checkpoint};
    let k = Iteration;
    assert_eq!(loads, [Base, Base, Checkpoint(k(0)), Base, Checkpoint(k(1))]);
}

#[test]
fn a_stop_dismisses_and_ends_in_every_state() {
    let whole = {
        let mut machine = Machine::new(Duration::ZERO, shape(2), Resume::default());
        simulate(&mut machine, attach(2), &|_| false).len()
    };
    for at in 0..whole - 2 {
        let mut machine = Machine::new(Duration::ZERO, shape(2), Resume::default());
        let count = std::cell::Cell::new(0);
        simulate(&mut machine, attach(2), &|_| {
            count.set(count.get() + 1);
            count.get() > at
        });
        let stopped = machine.step(Duration::ZERO, Event::StopRequested);
        if !stopped.is_empty() {
            assert_eq!(stopped, [Effect::Dismiss, Effect::End(Outcome::Stopped)]);
        }
        assert!(machine.step(Duration::ZERO, Event::Tick).is_empty(), "nothing follows an end");
    }
}

#[test]
fn a_worker_that_never_attaches_fails_the_run_by_name() {
    let mut machine = Machine::new(Duration::ZERO, shape(2), Resume::default());
    machine.step(Duration::ZERO, Event::Attached(Rank(1)));
    for second in 1..120 {
        machine.step(Duration::from_secs(second), Event::Heard(Rank(1)));
    }
    let late = machine.step(Duration::from_secs(121), Event::Tick);
    let Some(Effect::End(Outcome::Failed(why))) = late.last() else { panic!("{late:?}") };
    assert!(why.starts_with("worker 0 did not attach"), "{why}");
}

#[test]
fn an_answer_that_nobody_asked_for_fails_the_run() {
    let mut machine = Machine::new(Duration::ZERO, shape(1), Resume::default());
    let asked = machine.step(Duration::ZERO, Event::Attached(Rank(0)));
    assert_eq!(work(&asked).len(), 1);
    let wrong = Report::Scored { batch: 0, logps: vec![] };
    let effects = machine.step(Duration::ZERO, Event::Told(Rank(0), wrong));
    assert!(
        matches!(effects.last(), Some(Effect::End(Outcome::Failed(why))) if why.contains("Scored"))
    );
}

#[test]
fn an_effect_that_fails_ends_the_run_with_its_words() {
    let mut machine = Machine::new(Duration::ZERO, shape(1), Resume::default());
    let effects = machine.step(Duration::ZERO, Event::EffectFailed("disk full".into()));
    assert_eq!(effects, [Effect::Dismiss, Effect::End(Outcome::Failed("disk full".into()))]);
}
