//! Runs that are asked to leave, at any moment: they do, and nothing is done twice.

use super::world::{Dice, World};
use super::*;

fn world(workers: u32, snapshot_steps: u32, is_rated: bool) -> World {
    let mut shape = shape(workers);
    shape.is_rated = is_rated;
    shape.snapshots.steps = snapshot_steps;
    shape.max_losses = 1_000;
    shape.shard_tries = 1_000;
    World::new(shape)
}

#[test]
fn whenever_it_leaves_no_step_and_no_shard_is_computed_again() {
    let mut leaves = 0;
    for (workers, is_rated) in [(1, true), (2, false), (3, true)] {
        let mut whole = world(workers, 0, is_rated);
        whole.run(&mut Dice::new(1), 0);
        let computed = whole.computed;
        let expected = whole.disk.result();
        for seed in 0..100 {
            let mut world = world(workers, [0, 1, 2][seed as usize % 3], is_rated);
            world.leave_rarity = 12;
            world.run(&mut Dice::new(seed), 0);
            assert_eq!(world.outcome, Some(Outcome::Finished), "seed {seed}, {workers} workers");
            assert_eq!(world.computed, computed, "seed {seed}, {workers} workers");
            assert_eq!(world.disk.result(), expected, "seed {seed}, {workers} workers");
            leaves += world.leaves;
        }
    }
    assert!(leaves > 1_000, "{leaves} times");
}

#[test]
fn leaving_among_losses_and_crashes_leaves_the_same() {
    let mut whole = world(2, 0, true);
    whole.run(&mut Dice::new(1), 0);
    let expected = whole.disk.result();
    for seed in 0..200 {
        let mut world = world(2, [0, 1, 2][seed as usize % 3], true);
        world.leave_rarity = 40;
        world.run(&mut Dice::new(seed), 25);
        assert_eq!(world.outcome, Some(Outcome::Finished), "seed {seed}");
        assert_eq!(world.disk.result(), expected, "seed {seed}");
    }
}

/// A machine of two workers whose first epoch of iteration 1 has begun, and what it said.
fn in_training() -> (Machine, Vec<Effect>) {
    let position = Position::Training(Iteration(1), Epoch(0));
    let references = (0..13).map(|n| (PairId(n), START)).collect();
    let resume = Resume { position, pairs: pairs(), references, ..Resume::default() };
    let mut machine = Machine::new(Duration::ZERO, shape(2), resume);
    let effects = simulate(&mut machine, attach(2), &|e| {
        matches!(e, Effect::Send(Rank(1), Command::TrainStep { .. }))
    });
    (machine, effects)
}

#[test]
fn in_training_nothing_follows_the_steps_in_hand_but_a_snapshot_and_the_end() {
    let (mut machine, before) = in_training();
    let mut effects = machine.step(Duration::ZERO, Event::LeaveRequested);
    assert!(machine.step(Duration::ZERO, Event::LeaveRequested).is_empty(), "once is enough");
    let handed = work(&before).into_iter().filter(|(_, c)| !matches!(c, Command::LoadModel(_)));
    let mut events: std::collections::VecDeque<_> = handed
        .filter(|(_, c)| matches!(c, Command::BeginTraining | Command::TrainStep { .. }))
        .map(|(rank, command)| Event::Told(rank, answer(&command)))
        .collect();
    while let Some(event) = events.pop_front() {
        for effect in machine.step(Duration::ZERO, event) {
            if let Effect::Send(rank, command) = &effect {
                events.push_back(Event::Told(*rank, answer(command)));
                if let Command::SaveState(SnapshotId::After(_, step)) = command {
                    let (files, seconds) = (vec![], SaveSeconds::default());
                    let written = Report::SnapshotWritten { step: *step, files, seconds };
                    events.push_back(Event::Told(*rank, written));
                }
            }
            effects.push(effect);
        }
    }
    let kept = effects.iter().position(|e| matches!(e, Effect::KeepSnapshot(..)));
    let kept = kept.expect("a snapshot");
    let steps = |effects: &[Effect]| {
        effects.iter().filter(|e| matches!(e, Effect::RecordStep { .. })).count()
    };
    assert!(steps(&effects) > 0 && steps(&effects[kept..]) == 0, "{effects:?}");
    assert_eq!(effects[effects.len() - 2..], [Effect::Dismiss, Effect::End(Outcome::Stopped)]);
    assert!(commits(&effects).is_empty());
}

#[test]
fn a_snapshot_that_fails_or_a_worker_that_is_lost_does_not_keep_it() {
    let ends = |event| {
        let (mut machine, _) = in_training();
        machine.step(Duration::ZERO, Event::LeaveRequested);
        machine.step(Duration::ZERO, event).pop()
    };
    let stopped = Some(Effect::End(Outcome::Stopped));
    assert_eq!(ends(Event::Lost(Rank(1), "killed".into())), stopped);
    let why = || "no space left on device".to_owned();
    let failed = Report::SnapshotFailed { step: Step(0), why: why() };
    assert_eq!(ends(Event::Told(Rank(0), failed)), stopped);
}
