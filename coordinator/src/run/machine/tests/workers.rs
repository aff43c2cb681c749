//! Ranks that share a step: what each saves and loads, and what changes when there
//! are more or fewer of them than before.

use super::*;

/// The end of a run that goes on at an iteration's scoring.
fn scored_and_trained(workers: u32, began_with: u32) -> Vec<Effect> {
    let resume =
        Resume { position: Position::Scoring(Iteration(1)), pairs: pairs(), ..Resume::default() };
    let mut machine = Machine::new(Duration::ZERO, shape_with(workers, began_with), resume);
    simulate(&mut machine, attach(workers), &|e| {
        matches!(e, Effect::Commit { phase: CommittedPhase::Published, .. })
    })
}

#[test]
fn with_another_number_of_workers_the_steps_train_the_same_pairs() {
    let steps = |workers: u32| -> BTreeMap<Step, (u32, u64, Vec<PairId>)> {
        let mut steps = BTreeMap::new();
        for (_, command) in work(&scored_and_trained(workers, 2)) {
            let Command::TrainStep { step, learning_rate, global_pairs, micro_batches } = command
            else {
                continue;
            };
            let entry = steps
                .entry(step)
                .or_insert_with(|| (global_pairs, learning_rate.to_bits(), Vec::new()));
            entry.2.extend(micro_batches.iter().flatten().map(|pair| pair.id));
        }
        for (_, _, ids) in steps.values_mut() {
            ids.sort_unstable();
        }
        steps
    };
    let began_with = steps(2);
    let sizes: Vec<_> = began_with.values().map(|(pairs, ..)| *pairs).collect();
    assert_eq!(sizes, [4, 4, 2], "two pairs for each of the two workers");
    for workers in [1, 3, 7] {
        assert_eq!(steps(workers), began_with, "{workers} workers");
    }
}

#[test]
fn what_scores_were_computed_with_is_committed_with_them() {
    let effects = scored_and_trained(3, 2);
    let scored = effects.iter().find_map(|effect| match effect {
        Effect::Commit { phase: CommittedPhase::Scored, detail, .. } => Some(detail.clone()),
        _ => None,
    });
    assert_eq!(scored, Some(json!({ "workers": 3 })));
}

/// Runs to the end of the warm start's first epoch, its workers saving `files`.
fn first_epoch_saved(files: &dyn Fn(Rank) -> Vec<WrittenFile>) -> Vec<Effect> {
    let mut machine = Machine::new(Duration::ZERO, shape(3), Resume::default());
    let halt =
        |effect: &Effect| matches!(effect, Effect::Commit { phase: CommittedPhase::Evaluated, .. });
    simulate_with(&mut machine, attach(3), &halt, &|rank, command| match command {
        Command::SaveState(..) => Report::StateSaved(files(rank)),
        other => answer(other),
    })
}

#[test]
fn every_rank_saves_its_part_and_the_snapshot_is_kept_when_all_have() {
    let effects = first_epoch_saved(&|rank| match rank.0 {
        // Ranks have as many parts as they please.
        1 => vec![],
        n => vec![file(&format!("state-{}.safetensors", 9 - n))],
    });
    let k = Iteration(0);
    let asked: Vec<_> = work(&effects)
        .into_iter()
        .filter(|(_, c)| *c == Command::SaveState(SnapshotId::EndOf(k, Epoch(0))))
        .map(|(rank, _)| rank.0)
        .collect();
    assert_eq!(asked, [0, 1, 2]);
    let place = |found: &dyn Fn(&Effect) -> bool| {
        let mut places = effects.iter().enumerate().filter(|(_, effect)| found(effect));
        let place = places.next().expect("it happened").0;
        assert!(places.next().is_none(), "once");
        place
    };
    let begun = place(&|e| {
        *e == Effect::BeginSnapshot(SnapshotId::EndOf(k, Epoch(0)), SnapshotKind::State)
    });
    let first_asked =
        effects.iter().position(|e| matches!(e, Effect::Send(_, Command::SaveState(..))));
    assert!(Some(begun) < first_asked, "the folder is there before anyone writes into it");
    let kept = place(&|e| matches!(e, Effect::KeepSnapshot(..)));
    let Effect::KeepSnapshot(_, files) = &effects[kept] else { unreachable!() };
    let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["state-7.safetensors", "state-9.safetensors"], "whoever was first");
    assert!(matches!(
        effects[kept + 1],
        Effect::Commit { phase: CommittedPhase::Trained, epoch: Some(Epoch(0)), .. }
    ));
}

#[test]
fn a_file_that_two_ranks_wrote_is_no_snapshot() {
    let effects = first_epoch_saved(&|_| vec![file("state.safetensors")]);
    let Some(Effect::End(Outcome::Failed(why))) = effects.last() else {
        panic!("{:?}", effects.last());
    };
    assert!(why.contains("state.safetensors"), "{why}");
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::KeepSnapshot(..))));
}

#[test]
fn the_model_is_saved_by_rank_0_alone() {
    let mut machine = Machine::new(Duration::ZERO, shape(3), Resume::default());
    let effects = simulate(&mut machine, attach(3), &|_| false);
    let saved: Vec<_> = work(&effects)
        .into_iter()
        .filter(|(_, command)| matches!(command, Command::SaveModel(..)))
        .map(|(rank, command)| (rank.0, command))
        .collect();
    let model = |k, epoch| (0, Command::SaveModel(Iteration(k), Epoch(epoch)));
    assert_eq!(saved, [model(0, 2), model(1, 0), model(2, 0)]);
}

#[test]
fn a_resumed_epoch_loads_its_state_on_every_rank() {
    let resume = Resume {
        position: Position::Training(Iteration(0), Epoch(1)),
        pairs: pairs(),
        references: (0..13).map(|n| (PairId(n), START)).collect(),
        ..Resume::default()
    };
    let mut machine = Machine::new(Duration::ZERO, shape_with(3, 2), resume);
    let effects = simulate(&mut machine, attach(3), &|e| matches!(e, Effect::RecordStep { .. }));
    let loaded: Vec<_> = work(&effects)
        .into_iter()
        .filter(|(_, command)| {
            *command == Command::LoadState(SnapshotId::EndOf(Iteration(0), Epoch(0)))
        })
        .map(|(rank, _)| rank.0)
        .collect();
    assert_eq!(loaded, [0, 1, 2]);
}

#[test]
fn reductions_are_recorded_as_means_over_ranks() {
    let effects = scored_and_trained(2, 2);
    let recorded = effects.iter().find_map(|effect| match effect {
        Effect::RecordStep { reduction, .. } => Some(*reduction),
        _ => None,
    });
    assert_eq!(recorded, Some(ReductionSeconds { busy: 0.5, exposed: 0.25 }));
}

#[test]
fn each_concern_is_told_once_in_an_iteration() {
    // Both sides fall far, the rejected one further: no signal is left either.
    let fallen = |_: Rank, command: &Command| match answer(command) {
        Report::Stepped(mut outcomes) => {
            for pair in &mut outcomes.pairs {
                pair.logps = ReferenceLogps { chosen: -40.0, rejected: -120.0 };
            }
            Report::Stepped(outcomes)
        }
        other => other,
    };
    let mut machine = Machine::new(Duration::ZERO, shape(1), Resume::default());
    let effects = simulate_with(&mut machine, attach(1), &|_| false, &fallen);
    let told: Vec<_> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Warn(k, concern) => Some((k.0, concern.name())),
            _ => None,
        })
        .collect();
    // The warm start has fifteen steps; five, as an iteration has, are no trend.
    assert_eq!(told, [(0, ConcernName::SignalVanishes), (0, ConcernName::BothLogpsFall)]);
}
