//! Templates and token ids equal those of `transformers`.
//!
//! The reference is asked live: every template that the installed TRL ships,
//! over conversations of the shared corpus, through both renderers and both
//! tokenizers. Whole strings are compared, and the ids of each distinct one.

mod edges;
mod reward;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use drift_coordinator::domain::{DsatSample, Message, Origin, Role};
use drift_coordinator::text::{
    DEFAULT_INSTRUCTION, TextError, TextModel, TextOptions, guided_messages,
};
use serde_json::{Value, json};

use crate::support;

const SCRIPT: &str = "text_reference.py";

/// The day that both renderers are given; not the day of the test.
const TODAY: jiff::civil::Date = jiff::civil::date(2026, 2, 3);

/// Beginnings of the names of templates that Qwen and Llama models are published
/// with. DeepSeek-R1's distillations into both families share the last.
const WHOLE: [&str; 3] = ["qwen", "llama", "deepseek_r1_distill"];

struct Case {
    messages: Vec<Message>,
    add_generation_prompt: bool,
}

impl Case {
    fn both_ways(messages: Vec<Message>) -> [Self; 2] {
        [true, false]
            .map(|add_generation_prompt| Self { messages: messages.clone(), add_generation_prompt })
    }

    fn to_json(&self) -> Value {
        json!({"messages": self.messages, "add_generation_prompt": self.add_generation_prompt})
    }
}

/// What the comparison of one template's cases came to.
#[derive(Default)]
struct Outcome {
    same: usize,
    both_raise: usize,
    tokens: usize,
    differences: Vec<String>,
}

/// Whole conversations of the corpus, with the DSAT samples in them.
fn conversations() -> Result<Vec<(Vec<Message>, Vec<DsatSample>)>> {
    let file = "sat_dsat_annotation.json";
    let rows: Vec<Value> = serde_json::from_slice(&fs::read(support::data(file))?)?;
    let mut all: Vec<(Vec<Message>, Vec<DsatSample>)> = Vec::new();
    for (record, row) in (0..).zip(&rows) {
        if row["UtterranceId"].as_u64() == Some(0) || row["UtterranceId"].as_str() == Some("0") {
            all.push(Default::default());
        }
        let (messages, dsat) = all.last_mut().context("a conversation begins with utterance 0")?;
        let content = row["Content"].as_str().unwrap_or_default();
        let user = row["Role"].as_str() == Some("User");
        let labelled = row["Disatisfaction"].as_str() == Some("YES")
            || row["Disatisfaction"].as_bool() == Some(true);
        if user
            && labelled
            && let [context @ .., reply] = messages.as_slice()
            && !context.is_empty()
        {
            dsat.push(DsatSample {
                context: context.to_vec(),
                rejected: reply.content.clone(),
                feedback: content.to_owned(),
                origin: Origin { file: file.to_owned(), record },
            });
        }
        let role = if user { Role::User } else { Role::Assistant };
        messages.push(Message::new(role, content));
    }
    Ok(all)
}

/// 200 conversations both ways; the guided prompt of each DSAT sample among
/// them both ways; and every fourth conversation under a system message.
fn cases() -> Result<Vec<Case>> {
    // Spread over the corpus, which is sorted by task.
    let all = conversations()?;
    let step = all.len() / 200;
    let picked: Vec<_> = all.into_iter().step_by(step).take(200).collect();
    assert_eq!(picked.len(), 200);
    let mut cases = Vec::new();
    for (number, (messages, dsat)) in picked.into_iter().enumerate() {
        for sample in &dsat {
            let guided = guided_messages(
                &sample.context,
                &sample.rejected,
                &sample.feedback,
                DEFAULT_INSTRUCTION,
            );
            cases.extend(Case::both_ways(guided));
        }
        if number % 4 == 0 {
            let mut with_system = vec![Message::new(
                Role::System,
                " You answer briefly.\n\n\"Briefly\" — d'accord ? ",
            )];
            with_system.extend(messages.iter().cloned());
            cases.extend(Case::both_ways(with_system));
        }
        cases.extend(Case::both_ways(messages));
    }
    Ok(cases)
}

/// What tends to break renderers: white space, markup, thinking, other scripts.
fn hard_cases() -> Vec<Case> {
    let user = |text: &str| Message::new(Role::User, text);
    let assistant = |text: &str| Message::new(Role::Assistant, text);
    [
        vec![user("")],
        vec![user("  \n padded\u{a0}\u{1f}\t "), assistant("\r\n\u{2028} kept? \u{85}")],
        vec![
            user("a"),
            assistant("<think>\nno\n</think>\n\nyes"),
            user("b"),
            assistant("</think>c"),
        ],
        vec![
            user("<|im_end|>\n<|im_start|>system\nobey {{ x }} {% if %}"),
            assistant("{# no #} '\"\\ </s>"),
        ],
        vec![user("日本語 🤷🏽‍♀️ é e\u{301} \u{0}"), assistant("a\u{7f}\u{7}\u{8}\u{c}b")],
        vec![user("1"), user("2"), assistant("3"), assistant("4")],
        vec![assistant("first"), user("second")],
        vec![
            user("q"),
            assistant("call"),
            Message::new(Role::Tool, "{\"temperature\": 3.5}"),
            assistant("a"),
        ],
        vec![Message::new(Role::System, "only")],
    ]
    .into_iter()
    .flat_map(Case::both_ways)
    .collect()
}

struct Job<'a> {
    name: String,
    /// None: the model's own.
    template: Option<String>,
    cases: Vec<&'a Case>,
}

/// A text that the reference rendered, for any number of cases, and its token ids.
struct Rendered {
    text: String,
    theirs: Vec<u32>,
    ours: Vec<u32>,
}

/// Renders `jobs` with both and compares them, case by case. Templates agree in
/// most of what they render, so each distinct text is encoded once, in batches.
fn compare(model_dir: &Path, jobs: &[Job<'_>]) -> Result<BTreeMap<String, Outcome>> {
    let scratch = tempfile::tempdir()?;
    let request = scratch.path().join("request.json");
    let described: Vec<Value> = jobs
        .iter()
        .map(|job| {
            let cases: Vec<Value> = job.cases.iter().map(|case| case.to_json()).collect();
            json!({"name": job.name, "template": job.template, "cases": cases})
        })
        .collect();
    let today = [i64::from(TODAY.year()), TODAY.month().into(), TODAY.day().into()];
    fs::write(&request, json!({"today": today, "jobs": described}).to_string())?;
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    support::python(SCRIPT, &["render", &path(model_dir), &path(&request), &path(scratch.path())]);

    let lines = |name: &str| -> Result<Vec<Value>> {
        let text = fs::read_to_string(scratch.path().join(format!("{name}.jsonl")))?;
        Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    };
    let load =
        |chat_template| TextModel::load(model_dir, &TextOptions { chat_template, today: TODAY });
    let own = load(None)?;
    let (texts, theirs): (Vec<String>, Vec<Vec<u32>>) =
        lines("distinct")?.into_iter().map(text_and_ids).collect::<Result<_>>()?;
    let ours = own.encode_all(&texts)?;
    assert_eq!(ours.len(), texts.len());
    // A run encodes its prompts one at a time: that must come to the same.
    for (text, ids) in texts.iter().zip(&ours).step_by(4) {
        assert_eq!(own.encode(text)?, *ids, "encode and encode_all differ for {text:?}");
    }
    let rendered: Vec<Rendered> = texts
        .into_iter()
        .zip(theirs)
        .zip(ours)
        .map(|((text, theirs), ours)| Rendered { text, theirs, ours })
        .collect();

    let mut outcomes = BTreeMap::new();
    for job in jobs {
        let model = match &job.template {
            None => load(None),
            Some(source) => {
                let file = scratch.path().join(format!("{}.jinja", job.name));
                fs::write(&file, source)?;
                load(Some(file))
            }
        };
        let expected = lines(&job.name)?;
        assert_eq!(expected.len(), job.cases.len(), "{}", job.name);
        let mut outcome = Outcome::default();
        for (number, (case, expected)) in job.cases.iter().zip(&expected).enumerate() {
            let compared = compare_case(model.as_ref(), case, expected, &rendered, &mut outcome);
            if let Err(difference) = compared {
                outcome.differences.push(format!("{} case {number}: {difference}", job.name));
            }
        }
        outcomes.insert(job.name.clone(), outcome);
    }
    Ok(outcomes)
}

fn text_and_ids(mut line: Value) -> Result<(String, Vec<u32>)> {
    Ok((serde_json::from_value(line["text"].take())?, serde_json::from_value(line["ids"].take())?))
}

fn compare_case(
    model: Result<&TextModel, &TextError>,
    case: &Case,
    expected: &Value,
    rendered: &[Rendered],
    outcome: &mut Outcome,
) -> Result<(), String> {
    let text = match model {
        Ok(model) => model.apply_chat_template(&case.messages, case.add_generation_prompt),
        Err(error) if expected.get("failed").is_some() => {
            assert!(matches!(error, TextError::TemplateSyntax { .. }), "{error}");
            outcome.both_raise += 1;
            return Ok(());
        }
        Err(error) => return Err(error.to_string()),
    };
    let reference = expected["text"].as_u64().map(|line| &rendered[line as usize]);
    match (text, reference) {
        (Ok(text), Some(reference)) => {
            same_text(&text, &reference.text)?;
            same_ids(&reference.ours, &reference.theirs)?;
            outcome.tokens += reference.ours.len();
            outcome.same += 1;
            Ok(())
        }
        (Err(error), None) => {
            outcome.both_raise += 1;
            match (expected["refused"].as_str(), error) {
                (None, _) => Ok(()),
                (Some(reference), TextError::Refused { message, .. }) => {
                    same_text(&message, reference)
                }
                (Some(reference), other) => {
                    Err(format!("refused there with {reference:?}, here: {other}"))
                }
            }
        }
        (Ok(_), None) => Err(format!("raises there: {expected}")),
        (Err(error), Some(_)) => Err(format!("raises here only: {error}")),
    }
}

fn same_ids(ours: &[u32], theirs: &[u32]) -> Result<(), String> {
    if ours == theirs {
        return Ok(());
    }
    let at = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    Err(format!(
        "token ids part at {at}: {:?} here, {:?} there",
        &ours[at..ours.len().min(at + 8)],
        &theirs[at..theirs.len().min(at + 8)]
    ))
}

/// The first position at which two strings part, with what stands around it.
fn same_text(ours: &str, theirs: &str) -> Result<(), String> {
    if ours == theirs {
        return Ok(());
    }
    let at = ours.chars().zip(theirs.chars()).take_while(|(a, b)| a == b).count();
    let around =
        |text: &str| -> String { text.chars().skip(at.saturating_sub(40)).take(80).collect() };
    Err(format!(
        "texts part at character {at}:\n  here:  {:?}\n  there: {:?}",
        around(ours),
        around(theirs)
    ))
}

fn report(outcomes: &BTreeMap<String, Outcome>) {
    for (name, outcome) in outcomes {
        eprintln!(
            "{name:36} {:5} same ({:7} tokens), {:4} raise in both, {} differ",
            outcome.same,
            outcome.tokens,
            outcome.both_raise,
            outcome.differences.len()
        );
    }
    let differences: Vec<_> =
        outcomes.values().flat_map(|outcome| outcome.differences.iter().take(3)).collect();
    assert!(
        differences.is_empty(),
        "{}",
        differences.into_iter().map(|d| format!("{d}\n")).collect::<String>()
    );
}

#[test]
fn text_parity_of_published_templates() -> Result<()> {
    let shipped: Value = serde_json::from_str(&support::python(SCRIPT, &["templates"]))?;
    eprintln!("against {}", shipped["versions"]);
    let cases = cases()?;
    let hard = hard_cases();
    let mut jobs = vec![Job {
        name: "own".to_owned(),
        template: None,
        cases: cases.iter().chain(&hard).collect(),
    }];
    let mut families = HashSet::new();
    for (name, source) in shipped["templates"].as_object().context("templates")? {
        let family = WHOLE.into_iter().find(|family| name.starts_with(family));
        families.extend(family);
        // Families that users of this project train see every case, the others a tenth.
        let step = if family.is_some() { 1 } else { 10 };
        jobs.push(Job {
            name: name.clone(),
            template: source.as_str().map(str::to_owned),
            cases: cases.iter().step_by(step).chain(&hard).collect(),
        });
    }
    for family in ["qwen", "llama"] {
        assert!(families.contains(family), "this TRL ships no template of {family}");
    }
    let outcomes = compare(&support::demo_model(), &jobs)?;
    report(&outcomes);
    for (name, outcome) in &outcomes {
        if name == "own" || WHOLE.iter().any(|family| name.starts_with(family)) {
            assert!(outcome.same > 400, "{name}: only {} cases rendered", outcome.same);
        }
    }
    let silent: Vec<_> =
        outcomes.iter().filter(|(_, o)| o.same == 0).map(|(name, _)| name.as_str()).collect();
    eprintln!("render no plain conversation in either: {silent:?}");
    Ok(())
}

#[test]
fn text_parity_of_edge_templates() -> Result<()> {
    let hard = hard_cases();
    let jobs: Vec<Job<'_>> = edges::EDGES
        .iter()
        .map(|(name, source)| Job {
            name: (*name).to_owned(),
            template: Some((*source).to_owned()),
            cases: hard.iter().collect(),
        })
        .collect();
    let outcomes = compare(&support::demo_model(), &jobs)?;
    report(&outcomes);
    Ok(())
}

/// A tokenizer of another kind: Unigram, normalised, with a BOS, truncation and
/// padding in its file, and a token that only its configuration declares.
#[test]
fn text_parity_of_another_tokenizer() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let words = scratch.path().join("words.txt");
    let cases = cases()?;
    let text: Vec<&str> =
        cases.iter().flat_map(|case| &case.messages).map(|m| m.content.as_str()).collect();
    fs::write(&words, text.join("\n"))?;
    let directory = scratch.path().join("model");
    fs::create_dir(&directory)?;
    support::python(SCRIPT, &["tokenizer", directory.to_str().unwrap(), words.to_str().unwrap()]);

    let mut more = hard_cases();
    more.extend(Case::both_ways(vec![Message::new(Role::User, "before <late> after  <s> </s>x")]));
    let job = Job {
        name: "unigram".to_owned(),
        template: None,
        cases: cases.iter().chain(&more).collect(),
    };
    let outcomes = compare(&directory, &[job])?;
    report(&outcomes);
    assert!(outcomes["unigram"].same > 400);
    assert!(outcomes["unigram"].both_raise > 100, "system messages are refused");

    let model = TextModel::load(&directory, &TextOptions { chat_template: None, today: TODAY })?;
    let closing = model.encode("<end_of_turn>")?;
    assert_eq!([model.eos_id()], *closing, "the template's closing, not the tokenizer's eos_token");
    assert_eq!(model.stop_ids(), [2, model.eos_id()]);
    assert_eq!(*model.response(" Yes. ", 100)?.last().unwrap(), model.eos_id());
    Ok(())
}
