use super::super::fixture::{ASSISTANT, END, EOS, USER, model, word, words};
use super::*;
use crate::domain::{FinishReason, PromptId, Role};

const LENGTHS: Lengths = cut_to(2_048, 1_024);

const fn cut_to(max_length: usize, max_prompt: usize) -> Lengths {
    Lengths { max_length, max_prompt, overlong: Overlong::Cut }
}

fn origin(record: u64) -> Origin {
    Origin { file: "corpus.json".to_owned(), record }
}

fn seed(record: u64, prompt: &str, chosen: &str, rejected: &str) -> SeedPair {
    SeedPair {
        context: vec![Message::new(Role::User, prompt)],
        chosen: chosen.to_owned(),
        rejected: rejected.to_owned(),
        origin: origin(record),
    }
}

fn none() -> HeldOutSet {
    HeldOutSet::default()
}

#[test]
fn a_long_pair_is_cut_as_the_recipe_says() {
    let pairs = [seed(0, &words(1_500), &words(1_100), "w1")];
    let (rows, counts) = seed_pairs(&model(), &pairs, LENGTHS, &none()).unwrap();
    let tokens = &rows[0].tokens;
    assert_eq!(tokens.prompt.len(), 1_024);
    assert_eq!(tokens.prompt[..1], [word(477)]);
    assert_eq!(tokens.prompt[1_022..], [word(1_499), ASSISTANT]);
    assert_eq!(tokens.chosen, (0..1_024).map(word).collect::<Vec<_>>());
    assert_eq!(tokens.rejected, [word(1), END]);
    assert_eq!((counts.prompts_cut, counts.chosen_cut, counts.rejected_cut), (1, 1, 0));
    assert_eq!(rows[0].chosen, words(1_100), "people see the whole reply");
}

#[test]
fn a_short_prompt_leaves_its_room_to_the_replies() {
    let lengths = cut_to(10, 5);
    let pairs = [seed(0, "w1", &words(20), &words(7).replace("w0", "w1"))];
    let (rows, _) = seed_pairs(&model(), &pairs, lengths, &none()).unwrap();
    assert_eq!(rows[0].tokens.prompt, [USER, word(1), ASSISTANT]);
    assert_eq!(rows[0].tokens.chosen.len(), 7);
    // Seven words fill the room: the end-of-sequence id no longer fits.
    assert_eq!(rows[0].tokens.rejected.len(), 7);
    assert_ne!(rows[0].tokens.rejected.last(), Some(&END));
}

#[test]
fn drops_are_counted_by_reason_and_ids_stay_dense() {
    let mut system = seed(5, "w1", "w2", "w3");
    system.context.insert(0, Message::new(Role::System, "w0"));
    let pairs = [
        seed(0, "w1", " \n", "w2"),
        seed(1, "w1", "w2", ""),
        seed(2, "w1", "w2", "w3"),
        seed(3, "w1", "w2\n", " w2"),
        system,
        seed(6, "w4", "w5", "w6"),
    ];
    let (rows, counts) = seed_pairs(&model(), &pairs, LENGTHS, &none()).unwrap();
    let ids: Vec<_> = rows.iter().map(|row| row.tokens.id).collect();
    assert_eq!(ids, [PairId(0), PairId(1)]);
    assert_eq!(rows[1].chosen_from, Side::Corpus { origin: origin(6) });
    assert_eq!(counts.candidates, 6);
    let dropped: Vec<_> = counts.dropped.iter().map(|(reason, n)| (*reason, *n)).collect();
    let expected = [
        (DropReason::EmptyChosen, 1),
        (DropReason::EmptyRejected, 1),
        (DropReason::EqualSides, 1),
        (DropReason::TemplateRefused, 1),
    ];
    assert_eq!(dropped, expected);
    assert_eq!(
        counts.to_string(),
        "2 pairs of 6 candidates, 0 held out; 1 dropped: chosen reply empty; \
         1 dropped: rejected reply empty; 1 dropped: both replies the same; \
         1 dropped: refused by the chat template; first refusal: no system role here"
    );
    let json = serde_json::to_string(&counts).unwrap();
    assert_eq!(serde_json::from_str::<PairCounts>(&json).unwrap(), counts);
}

#[test]
fn sides_that_cutting_makes_equal_are_dropped() {
    let lengths = cut_to(6, 3);
    let pairs = [seed(0, "w1", "w1 w2 w3 w4", "w1 w2 w3 w5"), seed(1, "w1", "w1", "w2")];
    let (rows, counts) = seed_pairs(&model(), &pairs, lengths, &none()).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(counts.dropped[&DropReason::EqualSides], 1);
    let no_room = cut_to(3, 3);
    let (rows, counts) = seed_pairs(&model(), &pairs, no_room, &none()).unwrap();
    assert!(rows.is_empty());
    assert_eq!(counts.dropped[&DropReason::NoRoom], 2);
}

#[test]
fn samples_keep_their_ids_and_answer_x() {
    let (context, words) = ([Message::new(Role::User, "w1")], origin(1));
    let samples = [
        (vec![word(2), EOS], FinishReason::Stop),
        (vec![word(3)], FinishReason::Length),
        (vec![EOS], FinishReason::Stop),
    ]
    .map(|(tokens, finish)| Sample { prompt: PromptId(1), index: 0, tokens, finish });
    let candidate = |sample| Candidate {
        context: &context,
        chosen: Reply::Drawn { iteration: Iteration(2), sample },
        rejected: Reply::Corpus { text: "w9", origin: &words },
        flaw: None,
    };
    let candidates = samples.each_ref().map(candidate);
    let (rows, counts) = build_pairs(&model(), &candidates, LENGTHS, &none()).unwrap();
    assert_eq!(counts.dropped[&DropReason::EmptyChosen], 1);
    assert_eq!(rows[0].tokens.prompt, [USER, word(1), ASSISTANT]);
    assert_eq!(rows[0].tokens.chosen, [word(2), END]);
    assert_eq!(rows[0].tokens.rejected, [word(9), END]);
    assert_eq!((rows[0].chosen.as_str(), rows[0].rejected.as_str()), ("w2", "w9"));
    assert_eq!(rows[1].tokens.chosen, [word(3)]);
    let finish = FinishReason::Stop;
    let from = Side::Sample { iteration: Iteration(2), prompt: PromptId(1), index: 0, finish };
    assert_eq!(rows[0].chosen_from, from);
    assert_eq!(rows[0].rejected_from, Side::Corpus { origin: origin(1) });
}

#[test]
fn what_is_not_to_be_cut_is_dropped_by_the_side_that_is_too_long() {
    let lengths = Lengths { overlong: Overlong::Drop, ..cut_to(10, 5) };
    let pairs = [
        seed(0, &words(9), "w1", "w2"),
        seed(1, "w1", &words(20), "w2"),
        seed(2, "w1", "w2", &words(20)),
        seed(3, "w1", "w2", "w3"),
    ];
    let (rows, counts) = seed_pairs(&model(), &pairs, lengths, &none()).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].chosen_from, Side::Corpus { origin: origin(3) });
    let dropped: Vec<_> = counts.dropped.keys().copied().collect();
    let reasons =
        [DropReason::OverlongPrompt, DropReason::OverlongChosen, DropReason::OverlongRejected];
    assert_eq!(dropped, reasons);
}

#[test]
fn a_flaw_of_the_pair_counts_where_its_sides_have_none() {
    let (context, words) = ([Message::new(Role::User, "w1")], origin(1));
    let sides = [("w2", "w3"), ("w2", "w2"), ("w4", "w5")];
    let flaws = [Some(DropReason::EqualRatings), Some(DropReason::EqualRatings), None];
    let candidates: Vec<_> = sides
        .iter()
        .zip(flaws)
        .map(|((chosen, rejected), flaw)| Candidate {
            context: &context,
            chosen: Reply::Corpus { text: chosen, origin: &words },
            rejected: Reply::Corpus { text: rejected, origin: &words },
            flaw,
        })
        .collect();
    let (rows, counts) = build_pairs(&model(), &candidates, LENGTHS, &none()).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].chosen.as_str(), rows[0].tokens.id), ("w4", PairId(0)));
    let dropped: Vec<_> = counts.dropped.into_iter().collect();
    assert_eq!(dropped, [(DropReason::EqualSides, 1), (DropReason::EqualRatings, 1)]);
}
