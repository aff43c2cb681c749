//! Questions that want one short sentence, and who is content with which reply.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use drift_coordinator::store::publish::write_file;
use serde_json::{Value, json};

/// A reply with more words is too long.
const WORDS: usize = 15;

const THINGS: &str = "\
    a hammer, an umbrella, a bicycle, a library, a volcano, a compass, a lighthouse, a kettle, \
    a bridge, a mirror, a candle, a ladder, a piano, a drum, a river, a desert, an island, a \
    forest, a glacier, a museum, a hospital, a bakery, a school, a farm, a market, a castle, a \
    tunnel, a harbor, an airport, a train, a truck, a canoe, a helicopter, a submarine, a \
    tractor, a rocket, a satellite, a telescope, a microscope, a thermometer, a clock, a \
    calendar, a map, a dictionary, a newspaper, a letter, a stamp, a pencil, an eraser, a \
    notebook, a ruler, a saw, a needle, a button, a zipper, a blanket, a pillow, a sofa, a \
    table, a lamp, a fridge, an oven, a spoon, a fork, a bottle, a teapot, a sandwich, a \
    pizza, a salad, a soup, an apple, a banana, a carrot, a mushroom, a potato, an onion, a \
    tomato, a cookie, a cat, a dog, a horse, a cow, a sheep, a goat, a rabbit, a fox, a wolf, \
    a bear, a lion, a tiger, an elephant, a giraffe, a whale, a dolphin, a shark, an octopus, \
    a frog, a turtle, a snake, a spider, a bee, a butterfly, an ant, an owl, an eagle, a \
    penguin, a swan, a parrot, a teacher, a doctor, a farmer, a pilot, a sailor, a painter, a \
    plumber, a chef, a lawyer, a judge, a violin, a guitar, a trumpet, a flute, a camera, a \
    radio, a computer, a robot, a battery, a magnet, a rainbow, a thunderstorm, an earthquake, \
    a planet";

/// They ask again themselves: a model this small only talks about longer instructions.
const COMPLAINTS: [&str; 3] = [
    "Too long. What is it, in one short sentence?",
    "That is too long. Answer in one short sentence.",
    "Too long. I asked for one short sentence.",
];
const THANKS: &str = "Thank you.";

/// Something that is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) text: String,
    /// What it asks about, in one word.
    thing: &'static str,
}

/// A question, and two replies that the model gave before any training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Judged {
    question: Question,
    disappointing: String,
    satisfying: String,
}

/// What is trained on, and what is asked afterwards; no question is in two.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Questions {
    /// Of seed pairs, for the warm start.
    pub(crate) seeds: Vec<Judged>,
    /// Of all iterations.
    pub(crate) trained: Vec<Judged>,
    pub(crate) held_out: Vec<Question>,
}

/// All questions.
pub(crate) fn all() -> Vec<Question> {
    let question = |thing: &'static str| Question {
        text: format!("What is {thing}? Answer in one short sentence."),
        thing: thing.rsplit(' ').next().unwrap_or(thing),
    };
    THINGS.split(", ").map(question).collect()
}

/// Draws which of `all` are held out, and of the rest questions for `seeds` seed pairs and
/// `trained` others: questions with some reply of each kind among `replies`, the model's.
pub(crate) fn draw(
    seed: u64,
    [seeds, trained, held_out]: [usize; 3],
    replies: &[Vec<String>],
) -> Result<Questions> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut asked: Vec<_> = all().into_iter().zip(replies).collect();
    random.shuffle(&mut asked);
    let rest = asked.split_off(held_out.min(asked.len()));
    let mut judged: Vec<Judged> = Vec::new();
    for (question, replies) in rest {
        let mut of = |satisfies| {
            let some: Vec<&String> =
                replies.iter().filter(|reply| judge(&question, reply) == satisfies).collect();
            random.choice(some).cloned()
        };
        if let (Some(disappointing), Some(satisfying)) = (of(false), of(true)) {
            judged.push(Judged { question, disappointing, satisfying });
        }
    }
    let usable = judged.len();
    ensure!(
        usable >= seeds + trained,
        "{usable} questions have replies of both kinds; {seeds} + {trained} are needed"
    );
    judged.truncate(seeds + trained);
    let trained = judged.split_off(seeds);
    let held_out = asked.into_iter().map(|(question, _)| question).collect();
    Ok(Questions { seeds: judged, trained, held_out })
}

/// Writes, for each trained question, a conversation that disappointed and one that
/// satisfied: each method has as many to learn from.
pub(crate) fn write_corpus(path: &Path, questions: &Questions) -> Result<()> {
    let each = questions.trained.iter().zip(COMPLAINTS.iter().cycle());
    let conversations =
        each.flat_map(|(Judged { question, disappointing, satisfying }, complaint)| {
            let begin = user(&question.text, None);
            [
                vec![begin.clone(), agent(disappointing), user(complaint, Some("dsat"))],
                vec![begin, agent(satisfying), user(THANKS, Some("sat"))],
            ]
        });
    write(path, conversations)
}

/// Writes, for each seed pair, the conversation that it comes from: a complaint, and a
/// second reply that satisfied.
pub(crate) fn write_seeds(path: &Path, questions: &Questions) -> Result<()> {
    let each = questions.seeds.iter().zip(COMPLAINTS.iter().cycle());
    let conversations = each.map(|(Judged { question, disappointing, satisfying }, complaint)| {
        vec![
            user(&question.text, None),
            agent(disappointing),
            user(complaint, Some("dsat")),
            agent(satisfying),
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

/// Whether a reply satisfies: one sentence of at most [`WORDS`] words that names the thing.
pub(crate) fn judge(question: &Question, reply: &str) -> bool {
    let reply = reply.trim();
    let ends = |word: &str| word.trim_end_matches(['"', '\'', ')']).ends_with(['.', '!', '?']);
    let mut words = reply.split_whitespace().rev();
    let is_sentence = words.next().is_some_and(ends) && !words.any(ends);
    let is_short = !reply.contains('\n') && reply.split_whitespace().count() <= WORDS;
    is_sentence && is_short && reply.to_lowercase().contains(question.thing)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SHORT: &str = "A hammer is a tool.";
    const LONG: &str = "A hammer is a tool. It drives nails.";

    #[test]
    fn one_short_sentence_about_the_thing_satisfies() {
        let question = &all()[0];
        let long = "A hammer is a tool that has a heavy head and that one drives nails with.";
        for (reply, satisfies) in [
            (SHORT, true),
            (" \"A hammer drives nails!\"\n", true),
            (LONG, false),
            (long, false),
            ("A hammer is a tool\nof old.", false),
            ("A hammer is a tool", false),
            ("It is a tool.", false),
            ("", false),
        ] {
            assert_eq!(judge(question, reply), satisfies, "{reply:?}");
        }
    }

    /// Replies to each question: both kinds, but for every tenth.
    fn replies() -> Vec<Vec<String>> {
        let of = |(n, question): (usize, Question)| {
            let short = SHORT.replace("hammer", question.thing);
            if n % 10 == 0 { vec![short] } else { vec![LONG.to_owned(), short] }
        };
        all().into_iter().enumerate().map(of).collect()
    }

    #[test]
    fn what_is_asked_afterwards_is_never_trained_on() {
        let drawn = draw(3, [16, 40, 44], &replies()).unwrap();
        let Questions { seeds, trained, held_out } = &drawn;
        assert_eq!((seeds.len(), trained.len(), held_out.len()), (16, 40, 44));
        for judged in seeds.iter().chain(trained) {
            assert!(!held_out.contains(&judged.question));
            assert!(!judge(&judged.question, &judged.disappointing), "{judged:?}");
            assert!(judge(&judged.question, &judged.satisfying), "{judged:?}");
        }
        assert!(seeds.iter().all(|seed| !trained.contains(seed)));
        assert_ne!(draw(4, [16, 40, 44], &replies()).unwrap(), drawn, "another seed draws others");
        let error = draw(3, [40, 60, 44], &replies()).unwrap_err().to_string();
        assert!(error.contains("40 + 60 are needed"), "{error}");
    }
}
