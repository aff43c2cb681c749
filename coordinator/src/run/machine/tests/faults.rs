//! Workers and coordinators lost at any moment: the run ends with what an
//! undisturbed one leaves.

use super::world::{Dice, Disk, World};
use super::*;
use crate::domain::ShardId;

fn world(workers: u32, snapshot_steps: u32, is_rated: bool) -> World {
    let mut shape = shape(workers);
    shape.is_rated = is_rated;
    shape.snapshots.steps = snapshot_steps;
    shape.max_losses = 1_000;
    shape.shard_tries = 1_000;
    World::new(shape)
}

fn undisturbed(workers: u32, is_rated: bool) -> Disk {
    let mut world = world(workers, 0, is_rated);
    world.run(&mut Dice::new(1), 0);
    assert_eq!(world.outcome, Some(Outcome::Finished));
    world.disk.result()
}

#[test]
fn whoever_is_lost_whenever_the_run_leaves_the_same() {
    let (mut losses, mut crashes) = (0, 0);
    for (workers, is_rated) in [(1, true), (2, false), (2, true), (3, true)] {
        let expected = undisturbed(workers, is_rated);
        for seed in 0..200 {
            let mut world = world(workers, [0, 1, 2][seed as usize % 3], is_rated);
            world.run(&mut Dice::new(seed), 25);
            assert_eq!(world.outcome, Some(Outcome::Finished), "seed {seed}, {workers} workers");
            assert_eq!(world.disk.result(), expected, "seed {seed}, {workers} workers");
            losses += world.losses;
            crashes += world.crashes;
        }
    }
    assert!(losses > 1_000 && crashes > 500, "{losses} losses, {crashes} crashes");
}

/// A machine of two workers that goes on at `position`, and was just told to load.
fn at(position: Position) -> Machine {
    let resume = Resume { position, pairs: pairs(), ..Resume::default() };
    Machine::new(Duration::ZERO, shape(2), resume)
}

#[test]
fn in_sampling_the_others_go_on_and_the_successor_loads_the_policy() {
    let mut machine = at(Position::Sampling(Iteration(1)));
    let before = simulate(&mut machine, attach(2), &|e| {
        matches!(e, Effect::Send(Rank(1), Command::Sample { .. }))
    });
    let held = work(&before).pop().expect("a shard").1;
    let lost = machine.step(Duration::ZERO, Event::Lost(Rank(1), "killed".into()));
    assert_eq!(lost, [Effect::Lost(Rank(1), "killed".into()), Effect::Start(Rank(1))]);
    let next = machine.step(Duration::ZERO, Event::Attached(Rank(1)));
    let policy = Command::LoadModel(ModelSource::Checkpoint(Iteration(0)));
    assert_eq!(work(&next), [(Rank(1), policy)]);
    let ready = Report::ModelReady { parameters: 1 };
    let next = machine.step(Duration::ZERO, Event::Told(Rank(1), ready));
    assert_eq!(work(&next), [(Rank(1), held)], "what was lost comes first");
}

#[test]
fn in_training_all_are_called_and_go_on_from_the_disk() {
    let mut machine = at(Position::Scoring(Iteration(1)));
    simulate(&mut machine, attach(2), &|e| matches!(e, Effect::RecordStep { .. }));
    let lost = machine.step(Duration::ZERO, Event::Lost(Rank(0), "killed".into()));
    let expected = [
        Effect::Lost(Rank(0), "killed".into()),
        Effect::Start(Rank(0)),
        Effect::Call(vec![Rank(1)]),
        Effect::Rewind,
    ];
    assert_eq!(lost, expected);
    // Nothing begins before all are there and it is known where to go on.
    assert!(machine.step(Duration::ZERO, Event::Attached(Rank(1))).is_empty());
    assert!(machine.step(Duration::ZERO, Event::Attached(Rank(0))).is_empty());
    let resume = Resume {
        position: Position::Training(Iteration(1), Epoch(0)),
        pairs: pairs(),
        references: (0..13).map(|n| (PairId(n), START)).collect(),
        after: Some(Step(1)),
        ..Resume::default()
    };
    let formed = machine.step(Duration::ZERO, Event::Rewound(Box::new(resume)));
    assert_eq!(work(&formed), [(Rank(0), Command::OpenGroup { number: 2, store: None })]);
}

#[test]
fn a_failed_command_in_training_replaces_nobody() {
    let mut machine = at(Position::Scoring(Iteration(1)));
    simulate(&mut machine, attach(2), &|e| matches!(e, Effect::RecordStep { .. }));
    let why = "a peer closed its connection".to_owned();
    let failed = machine.step(Duration::ZERO, Event::Told(Rank(1), Report::Failed(why.clone())));
    let expected =
        [Effect::Failed(Rank(1), why), Effect::Call(vec![Rank(0), Rank(1)]), Effect::Rewind];
    assert_eq!(failed, expected);
}

#[test]
fn a_run_that_makes_no_progress_gives_up_with_the_last_reason() {
    let mut machine = at(Position::Sampling(Iteration(1)));
    machine.shape.max_losses = 3;
    simulate(&mut machine, attach(2), &|e| matches!(e, Effect::Send(_, Command::Sample { .. })));
    let mut effects = Vec::new();
    for n in 0..4 {
        effects = machine.step(Duration::ZERO, Event::Lost(Rank(1), format!("reason {n}")));
    }
    let Some(Effect::End(Outcome::Failed(why))) = effects.last() else { panic!("{effects:?}") };
    assert!(why.starts_with("worker 1 is lost: reason 3"), "{why}");
    assert!(why.contains("launch.max_losses = 3"), "{why}");
}

#[test]
fn a_shard_that_takes_its_worker_with_it_ends_the_run_or_is_left_out() {
    let poison = ShardId(2);
    for skip in [false, true] {
        let mut machine = at(Position::Sampling(Iteration(1)));
        machine.shape.skip_poison = skip;
        let mut events: std::collections::VecDeque<_> = attach(2).into();
        let mut seen = Vec::new();
        let mut now = Duration::ZERO;
        while let Some(event) = events.pop_front() {
            // Waits before a start pass, and nobody is silent meanwhile.
            now += Duration::from_secs(4);
            for rank in 0..2 {
                machine.step(now, Event::Heard(Rank(rank)));
            }
            let effects = machine.step(now, event).into_iter();
            for effect in effects.chain(machine.step(now, Event::Tick)) {
                match &effect {
                    Effect::Send(rank, Command::OpenGroup { store: None, .. }) => {
                        events.push_back(Event::Told(*rank, Report::StoreListening("a:1".into())));
                        events.push_back(Event::Told(*rank, Report::Done));
                    }
                    Effect::Send(rank, Command::Sample { shard, .. }) if *shard == poison => {
                        events.push_back(Event::Lost(*rank, "out of memory".into()));
                    }
                    Effect::Send(rank, command) => {
                        events.push_back(Event::Told(*rank, answer(command)));
                    }
                    Effect::Start(rank) => events.push_back(Event::Attached(*rank)),
                    _ => {}
                }
                seen.push(effect);
            }
            if events.is_empty() && now < Duration::from_secs(2_000) {
                events.push_back(Event::Tick);
            }
        }
        let tries = seen.iter().filter(
            |e| matches!(e, Effect::Send(_, Command::Sample { shard, .. }) if *shard == poison),
        );
        assert_eq!(tries.count(), 3);
        let left_out = seen.iter().any(|e| matches!(e, Effect::SetAside(_, s, _) if *s == poison));
        let sampled = commits(&seen).contains(&(1, CommittedPhase::Sampled, None));
        let ended = seen.iter().any(|e| {
            matches!(e, Effect::End(Outcome::Failed(why)) if why.contains("launch.poison_shard=skip"))
        });
        assert_eq!((left_out, sampled, ended), (skip, skip, !skip));
    }
}

#[test]
fn a_worker_that_ends_before_it_ever_attached_ends_the_run_at_once() {
    let mut machine = at(Position::Start);
    let why = "exit status 1; no such device".to_owned();
    let effects = machine.step(Duration::ZERO, Event::StartFailed(Rank(1), why));
    let Some(Effect::End(Outcome::Failed(why))) = effects.last() else { panic!("{effects:?}") };
    assert!(why.starts_with("worker 1 did not start: exit status 1"), "{why}");
}

#[test]
fn a_silent_worker_is_lost_after_its_deadline() {
    let mut machine = at(Position::Sampling(Iteration(1)));
    simulate(&mut machine, attach(2), &|e| matches!(e, Effect::Send(_, Command::Sample { .. })));
    assert!(machine.step(Duration::from_secs(4), Event::Heard(Rank(0))).is_empty());
    assert!(machine.step(Duration::from_secs(5), Event::Tick).is_empty());
    let silent = machine.step(Duration::from_millis(5_250), Event::Tick);
    assert!(
        matches!(&silent[0], Effect::Lost(Rank(1), why) if why.contains("heartbeat_deadline")),
        "{silent:?}"
    );
}
