//! Methods × corpora × guidance: every side of every pair came from where the method's
//! table says, by the journal and by the raw files.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::{Array, AsArray};
use drift_coordinator::config::Settings;
use drift_coordinator::domain::{Iteration, PairRow, PromptId, Ratings, Sample, Side};
use drift_coordinator::run::driver::{Prepared, prepare};
use drift_coordinator::store::{Journal, pairs::read_pairs};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use crate::support::{
    coordinator, data, demo_model, ended, first_steps_are_ln_2, model::text, published, python,
    resume, signalled_at, small, small_model, succeeds,
};

const CONVERSATIONS: &str = "sat_dsat_annotation.json";
const PAIRS: &str = "ultrafeedback_binarized.parquet";
const ITERATIONS: u32 = 2;

/// A run of `method` with the small model on real rows.
fn run_of(
    run: &Path,
    model: &Path,
    method: &str,
    corpus: &str,
    guidance: &str,
) -> std::process::Command {
    let mut command = small(run, "1", model);
    command.args(["--corpus", data(corpus).to_str().unwrap()]);
    if corpus == CONVERSATIONS {
        command.args(["--seeds", data("wildfeedback.json").to_str().unwrap()]);
    }
    for setting in [
        &*format!("method={method}"),
        &*format!("sampling.guidance={guidance}"),
        &*format!("training.iterations={ITERATIONS}"),
        "data.seed_limit=8",
        "data.limit=10",
        "sampling.max_prompt_tokens=2048",
        "training.warm_start_epochs=1",
    ] {
        command.args(["--set", setting]);
    }
    command
}

/// A run of IterDPO whose samples `reward` rates.
fn rated_run_of(
    run: &Path,
    model: &Path,
    reward: &Path,
    corpus: &str,
    guidance: &str,
) -> std::process::Command {
    let mut command = run_of(run, model, "iter-dpo", corpus, guidance);
    command.args(["--set", &format!("reward.model={}", text(reward))]);
    command
}

/// A small DeBERTa and a small decoder that rate, beside `model`.
fn reward_models(folder: &Path, model: &Path) -> [PathBuf; 2] {
    let [pair, chat] = ["reward-pair", "reward-chat"].map(|name| folder.join(name));
    python("reward_text.py", &["pair", text(&pair), text(&data("wildfeedback.json"))]);
    python("reward_text.py", &["chat", text(&chat), text(model)]);
    [pair, chat]
}

/// What one side of a method's pairs must be.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expected {
    /// The sample of this index.
    Sample(u32),
    /// The corpus's reply.
    Corpus,
    /// Of two samples, the one that is rated higher.
    Better,
    /// The other one.
    Worse,
}
use Expected::{Better, Corpus, Sample as Drawn, Worse};

/// A raw file's replies by record: (last user turn of x, reply, user's answer to it, label).
struct Raw {
    question: String,
    reply: String,
    answer: Option<String>,
    label: &'static str,
}

fn raw_conversations() -> BTreeMap<u64, Raw> {
    let rows: Vec<Value> =
        serde_json::from_slice(&std::fs::read(data(CONVERSATIONS)).unwrap()).unwrap();
    let text = |row: &Value| row["Content"].as_str().unwrap_or_default().to_owned();
    let label = |row: &Value| match (&row["Satisfaction"], &row["Disatisfaction"]) {
        (Value::Bool(false), Value::Bool(true)) => Some("dsat"),
        (Value::Bool(true), Value::Bool(false)) => Some("sat"),
        _ => None,
    };
    (2..rows.len())
        .filter(|&at| rows[at]["Role"] == "User")
        .filter_map(|at| {
            let (question, reply) = (text(&rows[at - 2]), text(&rows[at - 1]));
            let answer = Some(text(&rows[at]));
            Some((at as u64, Raw { question, reply, answer, label: label(&rows[at])? }))
        })
        .collect()
}

/// The side of UltraFeedback's pairs that is called so.
fn raw_pairs(side: &'static str) -> BTreeMap<u64, Raw> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(data(PAIRS)).unwrap())
        .unwrap()
        .build()
        .unwrap();
    let mut raw = BTreeMap::new();
    for batch in reader {
        let batch = batch.unwrap();
        let turns = batch.column_by_name(side).unwrap().as_list::<i32>();
        for row in 0..turns.len() {
            let turns = turns.value(row);
            let words = turns.as_struct().column_by_name("content").unwrap();
            let words = words.as_string::<i32>();
            let (question, reply) = (words.value(0).to_owned(), words.value(1).to_owned());
            raw.insert(raw.len() as u64, Raw { question, reply, answer: None, label: side });
        }
    }
    raw
}

/// A finished run, as its directory has it.
struct Left {
    prepared: Prepared,
    samples: BTreeMap<(u32, u64, u32), Sample>,
    ratings: BTreeMap<u32, Ratings>,
    rows: BTreeMap<u32, Vec<PairRow>>,
}

fn look(run: &Path, model: &Path, reward: Option<&Path>) -> Left {
    let settings = Settings::frozen(&run.join("config.toml")).unwrap();
    let prepared = prepare(&settings, model, reward, &mut |_, _, _| {}).unwrap();
    let (journal, _) = Journal::open(&run.join("journal.sqlite")).unwrap();
    let mut left = Left {
        prepared,
        samples: BTreeMap::new(),
        ratings: BTreeMap::new(),
        rows: BTreeMap::new(),
    };
    for k in 1..=ITERATIONS {
        left.ratings.insert(k, journal.ratings(Iteration(k)).unwrap());
        for sample in journal.samples(Iteration(k)).unwrap() {
            left.samples.insert((k, sample.prompt.0, sample.index), sample);
        }
        let rows = read_pairs(&run.join(format!("iterations/{k:02}/pairs.parquet"))).unwrap();
        left.rows.insert(k, rows);
    }
    left
}

impl Left {
    /// The case whose sample or record one of the sides is.
    fn case(&self, row: &PairRow) -> PromptId {
        let of = |side: &Side| match side {
            Side::Sample { prompt, .. } => Some(*prompt),
            Side::Corpus { .. } => None,
        };
        of(&row.chosen_from).or_else(|| of(&row.rejected_from)).expect("one side was drawn")
    }

    fn check_side(&self, row: &PairRow, side: &Side, chosen: bool, is: Expected, raw: &Raw) {
        let (ids, text) = match chosen {
            true => (&row.tokens.chosen, &row.chosen),
            false => (&row.tokens.rejected, &row.rejected),
        };
        match (side, is) {
            (Side::Sample { iteration, prompt, index, .. }, Drawn(_) | Better | Worse) => {
                let rating = |index| self.ratings[&iteration.0][&(*prompt, index)];
                let is_as_expected = match is {
                    Drawn(expected) => *index == expected,
                    Better => rating(*index) > rating(1 - *index),
                    _ => rating(*index) < rating(1 - *index),
                };
                assert!(is_as_expected, "sample {index} of {prompt} where {is:?} belongs");
                let sample = &self.samples[&(iteration.0, prompt.0, *index)];
                let whole = self.prepared.text.sampled_response(sample, usize::MAX);
                assert!(whole.starts_with(ids), "the ids are those in the journal");
                assert_eq!(*text, self.prepared.text.decode(&whole).unwrap());
            }
            (Side::Corpus { origin }, Corpus) => {
                let case = &self.prepared.cases[self.case(row).0 as usize];
                assert_eq!(*origin, case.origin);
                assert_eq!(*text, raw.reply, "the reply is the file's own");
            }
            (found, expected) => panic!("{found:?} where {expected:?} belongs"),
        }
    }
}

#[test]
fn every_side_came_from_where_the_method_says() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small_model::write(&demo_model(), &model).unwrap();
    let [pair_reward, chat_reward] = reward_models(folder.path(), &model);
    let conversations = raw_conversations();
    let (originals, worse) = (raw_pairs("chosen"), raw_pairs("rejected"));
    let cells = [
        ("drift", CONVERSATIONS, Drawn(0), Corpus, "dsat", &conversations),
        ("spin", CONVERSATIONS, Corpus, Drawn(0), "sat", &conversations),
        ("iter-dpo", CONVERSATIONS, Drawn(0), Drawn(1), "dsat", &conversations),
        ("drift", PAIRS, Drawn(0), Corpus, "rejected", &worse),
        ("spin", PAIRS, Corpus, Drawn(0), "chosen", &originals),
        ("iter-dpo", PAIRS, Better, Worse, "rejected", &worse),
    ];
    for (method, corpus, chosen, rejected, label, raw) in cells {
        for guidance in ["on", "off"] {
            let is_rated = method == "iter-dpo" && (corpus == PAIRS || guidance == "off");
            let (chosen, rejected) = if is_rated { (Better, Worse) } else { (chosen, rejected) };
            // Either kind of reward model serves either corpus.
            let reward = if corpus == PAIRS { &pair_reward } else { &chat_reward };
            let name = format!("{method} on {corpus}, guidance {guidance}");
            let run = folder.path().join(name.replace(' ', "-"));
            let ended = succeeds(match is_rated {
                true => rated_run_of(&run, &model, reward, corpus, guidance),
                false => run_of(&run, &model, method, corpus, guidance),
            });
            assert!(ended.stdout.starts_with(&format!("{method} from ")), "{}", ended.stdout);
            first_steps_are_ln_2(&run, ITERATIONS);

            let left = look(&run, &model, is_rated.then_some(reward));
            let rated: usize = left.ratings.values().map(BTreeMap::len).sum();
            assert_eq!(rated, if is_rated { left.samples.len() } else { 0 }, "{name}");
            let is_guided = |index: usize| {
                corpus == CONVERSATIONS
                    && match method {
                        "drift" => guidance == "on",
                        "iter-dpo" => guidance == "on" && index == 0,
                        _ => false,
                    }
            };
            let prompts = &left.prepared.prompts;
            for (id, case) in (0..).map(PromptId).zip(&left.prepared.cases) {
                let raw = &raw[&case.origin.record];
                assert_eq!(raw.label, label, "{name}");
                for index in 0..prompts.samples() {
                    let shown = left.prepared.text.decode(&prompts.of(id, index)).unwrap();
                    assert!(shown.contains(&raw.question), "{name}: {shown}");
                    if let Some(answer) = &raw.answer {
                        let complains = shown.contains(answer) && shown.contains(&raw.reply);
                        assert_eq!(complains, is_guided(index), "{name}, sample {index}: {shown}");
                    }
                }
            }
            let mut pairs = 0;
            for (k, rows) in &left.rows {
                for row in rows {
                    let case = &left.prepared.cases[left.case(row).0 as usize];
                    let raw = &raw[&case.origin.record];
                    assert_eq!(row.context, case.context, "{name}: the pair's prompt is x");
                    assert_eq!(row.context.last().unwrap().content, raw.question, "{name}");
                    for side in [&row.chosen_from, &row.rejected_from] {
                        let Side::Sample { iteration, .. } = side else { continue };
                        assert_eq!(iteration.0, *k, "{name}");
                    }
                    left.check_side(row, &row.chosen_from, true, chosen, raw);
                    left.check_side(row, &row.rejected_from, false, rejected, raw);
                    pairs += 1;
                }
            }
            eprintln!("{name}: {pairs} pairs, {} samples", left.samples.len());
            assert!(pairs >= 10, "{name}: {pairs} pairs of 20 candidates");
        }
    }
}

#[test]
fn what_needs_a_reward_model_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let run = folder.path().join("run");
    let is_refused = |command, code, words: &[&str]| {
        let ended = ended(command);
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{word:?} is not in: {}", ended.stderr);
        }
        assert!(!run.exists());
    };
    for (corpus, guidance, code, words) in [
        (CONVERSATIONS, "off", 2, "reward.model, sampling.guidance"),
        (PAIRS, "off", 2, "reward.model, sampling.guidance"),
        (PAIRS, "on", 1, PAIRS),
    ] {
        let command = run_of(&run, &model, "iter-dpo", corpus, guidance);
        is_refused(command, code, &[words, "reward model", "reward-model-deberta-v3-large-v2"]);
    }
    let unused = rated_run_of(&run, &model, &model, CONVERSATIONS, "on");
    is_refused(unused, 1, &["reward.model is set, and nothing would be rated", CONVERSATIONS]);
    let other = rated_run_of(&run, &model, &model, PAIRS, "on");
    is_refused(other, 1, &["LlamaForCausalLM", "ForSequenceClassification", text(&model)]);
    let missing = rated_run_of(&run, &model, Path::new("/nowhere/at/all"), PAIRS, "on");
    is_refused(missing, 1, &["/nowhere/at/all: no such folder"]);
    let contented = ended(run_of(&run, &model, "spin", "dsat_data.jsonl", "on"));
    assert_eq!(contented.code, Some(1));
    assert!(contented.stderr.contains("no SAT turn"), "{}", contented.stderr);
}

/// Two samples a prompt, two workers, and a kill: the same bytes.
#[test]
fn iter_dpo_killed_while_it_samples_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small_model::write(&demo_model(), &model).unwrap();
    let runs = ["calm", "killed"].map(|name| folder.path().join(name));
    let command = |run: &Path| {
        let mut command = run_of(run, &model, "iter-dpo", CONVERSATIONS, "on");
        command.args(["--set", "workers=2", "--set", "launch.threads=1"]);
        command
    };
    let mut calm = command(&runs[0]);
    calm.args(["--set", "training.iterations=1"]);
    succeeds(calm);
    let mut killed = command(&runs[1]);
    killed.args(["--set", "training.iterations=1"]);
    let line = " begin iteration=1 phase=Sampling";
    let ended = signalled_at(killed, line, "KILL").expect(line);
    assert_eq!(ended.signal, Some(9), "{}", ended.stderr);
    succeeds(resume(&runs[1]));
    assert_eq!(published(&runs[0]), published(&runs[1]));
}

/// Killed while replies are rated, and behind the commit that says they are; stopped so too.
#[test]
fn a_rated_run_that_is_cut_short_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small_model::write(&demo_model(), &model).unwrap();
    let [reward, _] = reward_models(folder.path(), &model);
    let command = |run: &Path| {
        let mut command = rated_run_of(run, &model, &reward, PAIRS, "on");
        for setting in ["workers=2", "launch.threads=1", "training.iterations=1", "reward.batch=3"]
        {
            command.args(["--set", setting]);
        }
        command
    };
    let calm = folder.path().join("calm");
    succeeds(command(&calm));
    let log = |run: &Path| std::fs::read_to_string(run.join("logs/coordinator.log")).unwrap();
    for (line, signal, code) in [
        (" begin iteration=1 phase=Rating", "KILL", None),
        (" committed iteration=1 phase=rated", "KILL", None),
        (" begin iteration=1 phase=Rating", "TERM", Some(143)),
        (" begin iteration=1 phase=Rating", "USR1", Some(138)),
    ] {
        let run = folder.path().join(format!("{signal}{}", line.len()));
        let ended = signalled_at(command(&run), line, signal).expect(line);
        assert_eq!(ended.code, code, "{line}, {signal}: {}", ended.stderr);
        let is_rated = ended.stderr.contains(" committed iteration=1 phase=rated");
        if signal == "USR1" {
            assert!(is_rated, "it leaves behind the phase: {}", ended.stderr);
        }
        succeeds(resume(&run));
        let rated = log(&run).matches(" begin iteration=1 phase=Rating").count();
        assert_eq!(rated, if is_rated { 1 } else { 2 }, "{line}, {signal}");
        assert_eq!(published(&calm), published(&run), "{line}, {signal}");
        let verified = coordinator(&["verify", text(&run)]);
        let verified = succeeds(verified).stdout;
        assert!(verified.contains(" ratings, "), "{verified}");
    }
}

/// As SPIN's authors train: on the pairs of the iteration before too.
#[test]
fn spin_takes_the_last_two_iterations_pairs() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small_model::write(&demo_model(), &model).unwrap();
    let run = folder.path().join("run");
    let mut command = run_of(&run, &model, "spin", CONVERSATIONS, "on");
    command.args(["--set", "training.pair_iterations=2"]);
    succeeds(command);
    let left = look(&run, &model, None);
    let of = |k: u32, from: u32, held_out: bool| {
        let is_from = |side: &Side| matches!(side, Side::Sample { iteration, .. } if *iteration == Iteration(from));
        let rows = left.rows[&k].iter();
        rows.filter(|row| is_from(&row.rejected_from) && row.held_out == held_out).count()
    };
    assert!(of(1, 1, false) > 0 && of(1, 1, true) > 0);
    assert_eq!(of(2, 1, false), of(1, 1, false), "all that trained before train again");
    assert_eq!(of(2, 1, true), 0, "only fresh replies are evaluated");
    assert!(of(2, 2, false) > 0 && of(2, 2, true) > 0);
}
