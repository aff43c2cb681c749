use super::*;
use crate::corpus::Kind;
use crate::domain::{
    DsatSample, FinishReason, Iteration, PromptId, Ratings, Role, Sample, SatSample,
};
use crate::text::{
    Candidate, DropReason, HeldOut, HeldOutSet, PromptKey, Reply, TextError, hold_out,
};

const METHODS: [Method; 3] = [Method::Drift, Method::Spin, Method::IterDpo];

fn origin(record: u64) -> Origin {
    Origin { file: "corpus.json".to_owned(), record }
}

fn context(n: u64) -> Vec<Message> {
    vec![Message::new(Role::User, format!("question {n}"))]
}

fn records(n: u64) -> [Record; 3] {
    let (context, origin) = (context(n), origin(n));
    let (good, bad) = ("good".to_owned(), "bad".to_owned());
    [
        Record::Dsat(DsatSample {
            context: context.clone(),
            rejected: bad.clone(),
            feedback: "wrong".into(),
            origin: origin.clone(),
        }),
        Record::Sat(SatSample {
            context: context.clone(),
            chosen: good.clone(),
            origin: origin.clone(),
        }),
        Record::Seed(SeedPair { context, chosen: good, rejected: bad, origin }),
    ]
}

fn cases(method: Method, count: u64) -> Vec<Case> {
    let of = |n| records(n).iter().find_map(|record| super::of(method).of_conversation(record));
    (0..count).map(|n| of(n).unwrap()).collect()
}

fn drawn(prompt: u64, index: u32) -> Sample {
    let tokens = vec![prompt as u32, index];
    Sample { prompt: PromptId(prompt), index, tokens, finish: FinishReason::Stop }
}

fn of(iteration: u32, samples: Vec<Sample>) -> Drawn {
    Drawn { iteration: Iteration(iteration), samples, ratings: Ratings::new() }
}

/// Of guided samples.
fn made<'a>(
    method: Method,
    cases: &'a [Case],
    drawn: &'a [Drawn],
    held_out: &HeldOutSet,
) -> Result<Vec<Candidate<'a>>, TextError> {
    candidates(super::of(method), Guidance::On, cases, drawn, held_out)
}

fn none() -> HeldOutSet {
    HeldOutSet::default()
}

/// A side as `(from, index)`, or the corpus's words.
fn told(reply: Reply<'_>) -> String {
    match reply {
        Reply::Corpus { text, .. } => text.to_owned(),
        Reply::Drawn { iteration, sample } => {
            format!("{iteration}/{}/{}", sample.prompt, sample.index)
        }
    }
}

fn sides(candidates: &[Candidate<'_>]) -> Vec<(String, String)> {
    candidates.iter().map(|pair| (told(pair.chosen), told(pair.rejected))).collect()
}

#[test]
fn each_method_takes_the_sides_and_prompts_that_its_table_says() {
    let expect = [
        (Method::Drift, Kind::Dsat, ("1/0/0", "bad"), 1),
        (Method::Spin, Kind::Sat, ("good", "1/0/0"), 1),
        (Method::IterDpo, Kind::Dsat, ("1/0/0", "1/0/1"), 2),
    ];
    for (method, kind, (chosen, rejected), replies) in expect {
        let rules = super::of(method);
        for record in records(0) {
            let case = rules.of_conversation(&record);
            assert_eq!(case.is_some(), record.kind() == kind, "{method} of {:?}", record.kind());
        }
        let cases = cases(method, 1);
        let samples: Vec<_> = (0..replies).map(|index| drawn(0, index)).collect();
        let of_one = [of(1, samples)];
        let made = made(method, &cases, &of_one, &none()).unwrap();
        assert_eq!(sides(&made), [(chosen.to_owned(), rejected.to_owned())], "{method}");
        assert_eq!(made[0].context, context(0), "{method} trains on x");
        assert_eq!(rules.prompts(Guidance::On).len(), replies as usize);
        assert_eq!(rules.prompts(Guidance::Off).len(), replies as usize);
    }
}

#[test]
fn guided_prompts_show_the_complaint_and_bare_ones_do_not() {
    let shown = |method, guidance| -> Vec<usize> {
        let case = &cases(method, 1)[0];
        let prompts = super::of(method).prompts(guidance).iter();
        prompts.map(|prompt| case.messages(*prompt, "again").len()).collect()
    };
    assert_eq!(shown(Method::Drift, Guidance::On), [3]);
    assert_eq!(shown(Method::Drift, Guidance::Off), [1]);
    assert_eq!(shown(Method::Spin, Guidance::On), [1]);
    assert_eq!(shown(Method::IterDpo, Guidance::On), [3, 1]);
    assert_eq!(shown(Method::IterDpo, Guidance::Off), [1, 1]);
    let guided = cases(Method::Drift, 1)[0].messages(Prompt::Guided, "again");
    assert_eq!(guided[1].content, "bad");
    assert_eq!(guided[2].content, "wrong\n\nagain");
}

#[test]
fn a_pair_gives_the_original_that_the_method_trains_on_and_no_complaint() {
    let [_, _, Record::Seed(pair)] = records(7) else { panic!("the third is a pair") };
    let case = |method| super::of(method).of_pair(&pair);
    assert_eq!(case(Method::Drift).reply, "bad");
    assert_eq!(case(Method::Spin).reply, "good");
    for method in METHODS {
        assert_eq!(case(method).messages(Prompt::Guided, "again"), context(7), "{method}");
    }
}

#[test]
fn order_of_arrival_does_not_matter_and_strays_are_errors() {
    for method in METHODS {
        let rules = super::of(method);
        let cases = cases(method, 20);
        let replies = rules.prompts(Guidance::On).len() as u32;
        let samples: Vec<_> =
            (0..20).flat_map(|case| (0..replies).map(move |index| drawn(case, index))).collect();
        let mut reversed = samples.clone();
        reversed.reverse();
        let (forward, backward) = ([of(1, samples)], [of(1, reversed)]);
        let told = |drawn| sides(&made(method, &cases, drawn, &none()).unwrap());
        assert_eq!(told(&forward).len(), 20);
        assert_eq!(told(&forward), told(&backward));

        let refused =
            |samples: Vec<Sample>| made(method, &cases, &[of(1, samples)], &none()).unwrap_err();
        let stray = refused(vec![drawn(20, 0)]);
        assert!(matches!(stray, TextError::UnknownPrompt { prompt: PromptId(20), .. }), "{stray}");
        let twice = refused(vec![drawn(3, 0), drawn(3, 0)]);
        assert!(matches!(twice, TextError::DuplicateSample { .. }), "{twice}");
    }
}

#[test]
fn a_case_that_lacks_a_sample_makes_no_pair() {
    let cases = cases(Method::IterDpo, 2);
    let drawn = [of(1, vec![drawn(0, 0), drawn(1, 0), drawn(1, 1)])];
    let made = made(Method::IterDpo, &cases, &drawn, &none()).unwrap();
    assert_eq!(sides(&made), [("1/1/0".to_owned(), "1/1/1".to_owned())]);
}

#[test]
fn the_iteration_before_adds_its_pairs_but_for_those_held_out() {
    let cases = cases(Method::Spin, 10);
    let keys: Vec<_> = cases.iter().map(|case| PromptKey::of(&case.context)).collect();
    let held_out = hold_out(&[&keys], HeldOut::Pairs(2), 42);
    let samples = || (0..10).map(|case| drawn(case, 0)).collect::<Vec<_>>();
    let drawn = [of(1, samples()), of(2, samples())];
    let made = made(Method::Spin, &cases, &drawn, &held_out).unwrap();
    let of_iteration = |k: &str| made.iter().filter(|c| told(c.rejected).starts_with(k)).count();
    assert_eq!((of_iteration("1/"), of_iteration("2/")), (8, 10));
    let old = made.iter().take(8);
    assert!(old.into_iter().all(|pair| !held_out.contains(pair.context)));
}

#[test]
fn of_two_unguided_samples_the_one_that_is_rated_higher_is_chosen() {
    let rules = super::of(Method::IterDpo);
    assert!(rules.is_rated(Guidance::Off) && !rules.is_rated(Guidance::On));
    for method in [Method::Drift, Method::Spin] {
        assert!(!super::of(method).is_rated(Guidance::Off), "{method}");
    }
    let cases = cases(Method::IterDpo, 5);
    let samples = (0..5).flat_map(|case| [drawn(case, 0), drawn(case, 1)]).collect();
    // The last case's second sample has no rating.
    let rated = [[0.5, -1.0], [-1.0, 0.5], [0.0, -0.0], [-3.0, -2.0]];
    let mut ratings: Ratings = (0..)
        .map(PromptId)
        .zip(rated)
        .flat_map(|(prompt, [a, b])| [((prompt, 0), a), ((prompt, 1), b)])
        .collect();
    ratings.insert((PromptId(4), 0), 1.0);
    let drawn = [Drawn { ratings, ..of(1, samples) }];
    let made = candidates(rules, Guidance::Off, &cases, &drawn, &none()).unwrap();
    let chosen: Vec<_> = made.iter().map(|pair| told(pair.chosen)).collect();
    assert_eq!(chosen, ["1/0/0", "1/1/1", "1/2/0", "1/3/1", "1/4/0"]);
    let rejected: Vec<_> = made.iter().map(|pair| told(pair.rejected)).collect();
    assert_eq!(rejected, ["1/0/1", "1/1/0", "1/2/1", "1/3/0", "1/4/1"]);
    let flaws: Vec<_> = made.iter().map(|pair| pair.flaw).collect();
    let (equal, lacking) = (Some(DropReason::EqualRatings), Some(DropReason::NotRated));
    assert_eq!(flaws, [None, None, equal, None, lacking]);
    // Guided, no rating is asked for.
    let made = candidates(rules, Guidance::On, &cases, &drawn, &none()).unwrap();
    assert!(made.iter().all(|pair| pair.flaw.is_none()));
}
