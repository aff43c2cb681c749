//! Questions that one word answers, and conversations in which a reply was too long.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use drift_coordinator::store::publish::write_file;
use serde_json::{Value, json};

const CAPITALS: [(&str, &str); 36] = [
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("Portugal", "Lisbon"),
    ("Germany", "Berlin"),
    ("Austria", "Vienna"),
    ("Poland", "Warsaw"),
    ("Norway", "Oslo"),
    ("Sweden", "Stockholm"),
    ("Finland", "Helsinki"),
    ("Denmark", "Copenhagen"),
    ("Ireland", "Dublin"),
    ("Greece", "Athens"),
    ("Hungary", "Budapest"),
    ("Belgium", "Brussels"),
    ("Russia", "Moscow"),
    ("Japan", "Tokyo"),
    ("China", "Beijing"),
    ("Thailand", "Bangkok"),
    ("Egypt", "Cairo"),
    ("Kenya", "Nairobi"),
    ("Canada", "Ottawa"),
    ("Cuba", "Havana"),
    ("Peru", "Lima"),
    ("Chile", "Santiago"),
    ("Turkey", "Ankara"),
    ("Iran", "Tehran"),
    ("Iraq", "Baghdad"),
    ("Vietnam", "Hanoi"),
    ("Nepal", "Kathmandu"),
    ("Ukraine", "Kyiv"),
    ("Romania", "Bucharest"),
    ("Bulgaria", "Sofia"),
    ("Croatia", "Zagreb"),
    ("Serbia", "Belgrade"),
    ("Australia", "Canberra"),
];

const OPPOSITES: [(&str, &str); 36] = [
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("high", "low"),
    ("light", "dark"),
    ("happy", "sad"),
    ("early", "late"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("full", "empty"),
    ("open", "closed"),
    ("young", "old"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("loud", "quiet"),
    ("clean", "dirty"),
    ("cheap", "expensive"),
    ("thick", "thin"),
    ("wide", "narrow"),
    ("deep", "shallow"),
    ("up", "down"),
    ("left", "right"),
    ("front", "back"),
    ("day", "night"),
    ("summer", "winter"),
    ("north", "south"),
    ("east", "west"),
    ("begin", "end"),
    ("buy", "sell"),
    ("win", "lose"),
    ("love", "hate"),
    ("push", "pull"),
    ("true", "false"),
    ("sweet", "sour"),
    ("near", "far"),
    ("first", "last"),
];

const PLURALS: [(&str, &str); 28] = [
    ("child", "children"),
    ("mouse", "mice"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("goose", "geese"),
    ("man", "men"),
    ("woman", "women"),
    ("person", "people"),
    ("leaf", "leaves"),
    ("knife", "knives"),
    ("wolf", "wolves"),
    ("city", "cities"),
    ("baby", "babies"),
    ("box", "boxes"),
    ("bus", "buses"),
    ("dish", "dishes"),
    ("tree", "trees"),
    ("book", "books"),
    ("hero", "heroes"),
    ("potato", "potatoes"),
    ("cactus", "cacti"),
    ("ox", "oxen"),
    ("sheep", "sheep"),
    ("loaf", "loaves"),
    ("story", "stories"),
    ("watch", "watches"),
    ("glass", "glasses"),
    ("toy", "toys"),
];

const COMPLAINTS: [&str; 4] = [
    "I asked for one word only.",
    "Too long. Just the word, please.",
    "That is a whole sentence. One word!",
    "No, a single word and nothing else, as I said.",
];

const THANKS: &str = "Thank you.";

/// A question, and the word that answers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) text: String,
    pub(crate) answer: &'static str,
    /// A reply that disappoints: right, and a sentence.
    disappointing: String,
}

/// What is trained on, and what is asked afterwards; no question is in two.
pub(crate) struct Questions {
    /// Of seed pairs, for the warm start.
    pub(crate) seeds: Vec<Question>,
    /// Of all iterations.
    pub(crate) trained: Vec<Question>,
    pub(crate) held_out: Vec<Question>,
}

fn all() -> Vec<Question> {
    let question = |asked: String, answer: &'static str, disappointing: String| Question {
        text: format!("{asked} Answer with one word only."),
        answer,
        disappointing,
    };
    let capitals = CAPITALS.iter().map(|(country, city)| {
        question(
            format!("What is the capital of {country}?"),
            city,
            format!("The capital of {country} is {city}."),
        )
    });
    let opposites = OPPOSITES.iter().map(|(word, opposite)| {
        question(
            format!("What is the opposite of \"{word}\"?"),
            opposite,
            format!("The opposite of \"{word}\" is \"{opposite}\"."),
        )
    });
    let plurals = PLURALS.iter().map(|(word, plural)| {
        question(
            format!("What is the plural of \"{word}\"?"),
            plural,
            format!("The plural of \"{word}\" is \"{plural}\"."),
        )
    });
    capitals.chain(opposites).chain(plurals).collect()
}

/// Draws questions of `seeds` seed pairs and `trained` others; the rest is held out.
pub(crate) fn draw(seed: u64, seeds: usize, trained: usize) -> Result<Questions> {
    let mut questions = all();
    ensure!(seeds + trained < questions.len(), "there are {} questions in all", questions.len());
    fastrand::Rng::with_seed(seed).shuffle(&mut questions);
    let held_out = questions.split_off(seeds + trained);
    let trained = questions.split_off(seeds);
    Ok(Questions { seeds: questions, trained, held_out })
}

/// Writes, for each trained question, a conversation that disappointed and one that
/// satisfied: each method has as many to learn from.
pub(crate) fn write_corpus(path: &Path, questions: &Questions) -> Result<()> {
    let each = questions.trained.iter().zip(COMPLAINTS.iter().cycle());
    let conversations = each.flat_map(|(question, complaint)| {
        let begin = user(&question.text, None);
        [
            vec![begin.clone(), agent(&question.disappointing), user(complaint, Some("dsat"))],
            vec![begin, agent(question.answer), user(THANKS, Some("sat"))],
        ]
    });
    write(path, conversations)
}

/// Writes, for each seed pair, the conversation that it comes from: a complaint, and a
/// second reply that satisfied.
pub(crate) fn write_seeds(path: &Path, questions: &Questions) -> Result<()> {
    let each = questions.seeds.iter().zip(COMPLAINTS.iter().cycle());
    let conversations = each.map(|(question, complaint)| {
        vec![
            user(&question.text, None),
            agent(&question.disappointing),
            user(complaint, Some("dsat")),
            agent(question.answer),
            user(THANKS, Some("sat")),
        ]
    });
    write(path, conversations)
}

fn user(content: &str, label: Option<&str>) -> Value {
    match label {
        Some(label) => json!({ "role": "user", "content": content, "label": label }),
        None => json!({ "role": "user", "content": content }),
    }
}

fn agent(content: &str) -> Value {
    json!({ "role": "assistant", "content": content })
}

fn write(path: &Path, conversations: impl Iterator<Item = Vec<Value>>) -> Result<()> {
    let mut lines = String::new();
    for messages in conversations {
        lines += &format!("{}\n", json!({ "messages": messages }));
    }
    write_file(path, lines.as_bytes()).context("write conversations")
}

/// Whether a reply is one word, and whether it is the right one.
pub(crate) fn judge(question: &Question, reply: &str) -> (bool, bool) {
    let reply = reply.trim();
    let word = reply.trim_matches(|c: char| c.is_ascii_punctuation());
    let is_word = !word.is_empty() && word.chars().all(|c| c.is_alphabetic() || c == '-');
    (is_word, is_word && word.eq_ignore_ascii_case(question.answer))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_told_from_a_sentence_and_the_right_one_from_another() {
        let question = &all()[0];
        for (reply, expected) in [
            ("Paris", (true, true)),
            (" \"paris\".\n", (true, true)),
            ("London", (true, false)),
            ("Port-au-Prince", (true, false)),
            ("The capital of France is Paris.", (false, false)),
            ("Paris\nParis", (false, false)),
            ("75", (false, false)),
            ("...", (false, false)),
            ("", (false, false)),
        ] {
            assert_eq!(judge(question, reply), expected, "{reply:?}");
        }
        for question in all() {
            assert_eq!(judge(&question, question.answer), (true, true), "{question:?}");
            assert!(!judge(&question, &question.disappointing).0, "{question:?}");
        }
    }

    #[test]
    fn what_is_asked_afterwards_is_never_trained_on() {
        let Questions { seeds, trained, held_out } = draw(3, 16, 40).unwrap();
        assert_eq!((seeds.len(), trained.len(), held_out.len()), (16, 40, 44));
        let used: Vec<_> = seeds.iter().chain(&trained).collect();
        assert!(held_out.iter().all(|question| !used.contains(&question)));
        assert!(seeds.iter().all(|question| !trained.contains(question)));
        assert_ne!(draw(4, 16, 40).unwrap().trained, trained, "another seed draws others");
        assert!(draw(3, 60, 40).is_err(), "none would be held out");
    }
}
