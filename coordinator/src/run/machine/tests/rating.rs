//! Samples that a reward model rates: each batch once, by whoever is free.

use super::*;

fn rated_shape(workers: u32) -> RunShape {
    RunShape { is_rated: true, ..shape(workers) }
}

fn at_rating(workers: u32) -> Machine {
    let resume = Resume { position: Position::Rating(Iteration(1)), ..Resume::default() };
    Machine::new(Duration::ZERO, rated_shape(workers), resume)
}

fn rated(effects: &[Effect]) -> Vec<u64> {
    let mut rated: Vec<_> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::RecordRatings(Iteration(1), batch, _) => Some(*batch),
            _ => None,
        })
        .collect();
    rated.sort_unstable();
    rated
}

#[test]
fn it_stands_between_sampling_and_pairing_and_nothing_is_rated_in_the_warm_start() {
    for workers in [1, 2, 5] {
        let mut machine = Machine::new(Duration::ZERO, rated_shape(workers), Resume::default());
        let effects = simulate(&mut machine, attach(workers), &|_| false);
        assert_eq!(effects.last(), Some(&Effect::End(Outcome::Finished)));
        let of = |k| {
            let of_k = commits(&effects).into_iter().filter(|commit| commit.0 == k);
            of_k.map(|(_, phase, _)| phase).take(3).collect::<Vec<_>>()
        };
        use CommittedPhase::{Paired, Prepared, Rated, Sampled, Scored};
        assert_eq!(of(0), [Prepared, Paired, Scored]);
        assert_eq!(of(1), [Sampled, Rated, Paired]);
        assert_eq!(rated(&effects), (0..7).collect::<Vec<_>>());
        let began = effects.iter().find_map(|effect| match effect {
            Effect::Began(_, PhaseName::Rating, None, total, 0) => Some(*total),
            _ => None,
        });
        assert_eq!(began, Some(26));
    }
}

#[test]
fn whoever_is_lost_its_batch_goes_to_another_and_the_successor_loads_the_policy() {
    let mut machine = at_rating(2);
    let is_last = |e: &Effect| matches!(e, Effect::Send(Rank(1), Command::Rate { .. }));
    let before = simulate(&mut machine, attach(2), &is_last);
    let held = |rank| {
        let is_it = |(of, command): &(Rank, Command)| {
            *of == rank && matches!(command, Command::Rate { .. })
        };
        work(&before).into_iter().find(is_it).expect("a batch").1
    };
    let lost = held(Rank(1));
    let effects = machine.step(Duration::ZERO, Event::Lost(Rank(1), "killed".into()));
    assert!(effects.contains(&Effect::Start(Rank(1))), "{effects:?}");
    assert!(!effects.contains(&Effect::Rewind), "the other goes on: {effects:?}");
    let told = Event::Told(Rank(0), answer(&held(Rank(0))));
    let effects = machine.step(Duration::ZERO, told);
    assert!(effects.contains(&Effect::Send(Rank(0), lost)), "before all others: {effects:?}");
    let effects = machine.step(Duration::ZERO, Event::Attached(Rank(1)));
    let policy = Command::LoadModel(ModelSource::Checkpoint(Iteration(0)));
    assert_eq!(effects, [Effect::Send(Rank(1), policy)]);
}

#[test]
fn a_worker_that_comes_before_the_plan_waits_for_it() {
    let mut machine = at_rating(1);
    let effects = simulate(&mut machine, attach(1), &|e| matches!(e, Effect::PlanRating(_)));
    assert_eq!(effects.last(), Some(&Effect::PlanRating(Iteration(1))));
    assert_eq!(machine.commands(), (0, 0));
    let effects = machine.step(Duration::ZERO, Event::RatingPlanned(vec![2]));
    assert!(effects.contains(&Effect::Send(Rank(0), Command::Rate { batch: 0 })), "{effects:?}");
    // A second plan is of nobody's asking.
    assert_eq!(machine.step(Duration::ZERO, Event::RatingPlanned(vec![3])), []);
}

#[test]
fn with_nothing_to_rate_it_goes_on_to_pairs() {
    let mut machine = at_rating(1);
    simulate(&mut machine, attach(1), &|e| matches!(e, Effect::PlanRating(_)));
    let effects = machine.step(Duration::ZERO, Event::RatingPlanned(Vec::new()));
    assert!(effects.contains(&Effect::BuildPairs(Iteration(1))), "{effects:?}");
}

#[test]
fn too_few_ratings_end_the_run() {
    let mut machine = at_rating(1);
    let is_asked = |e: &Effect| matches!(e, Effect::Send(_, Command::Rate { .. }));
    simulate(&mut machine, attach(1), &is_asked);
    let report = Report::Rated { batch: 0, ratings: vec![0.5; 3] };
    let effects = machine.step(Duration::ZERO, Event::Told(Rank(0), report));
    assert!(
        matches!(effects.last(), Some(Effect::End(Outcome::Failed(why))) if why.contains("number of ratings")),
        "{effects:?}"
    );
}

#[test]
fn asked_to_leave_it_rates_to_the_end_and_stops_behind_the_commit() {
    let mut machine = at_rating(2);
    let is_asked = |e: &Effect| matches!(e, Effect::Send(Rank(1), Command::Rate { .. }));
    let before = simulate(&mut machine, attach(2), &is_asked);
    let in_hand = work(&before).into_iter().filter(|(_, c)| matches!(c, Command::Rate { .. }));
    let answers = in_hand.map(|(rank, command)| Event::Told(rank, answer(&command)));
    let events = std::iter::once(Event::LeaveRequested).chain(answers).collect();
    let effects = simulate(&mut machine, events, &|_| false);
    assert_eq!(rated(&effects), (0..7).collect::<Vec<_>>());
    assert_eq!(commits(&effects), [(1, CommittedPhase::Rated, None)]);
    assert_eq!(effects.last(), Some(&Effect::End(Outcome::Stopped)));
}
