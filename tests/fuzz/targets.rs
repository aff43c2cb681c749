//! What is fed: each reader of something that others wrote.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use drift_coordinator::config::{Base, Layers, Settings};
use drift_coordinator::corpus::{self, ReadOptions};
use drift_coordinator::domain::{
    FinishReason, Iteration, Message, Origin, PairId, PairRow, PromptId, Role, Side, TokenPair,
};
use drift_coordinator::store::manifest::{MANIFEST, Manifest, Subject};
use drift_coordinator::store::pairs::{read_pairs, write_pairs};
use drift_proto::v1::{self as pb, coordinator_message::Body as Down, worker_message::Body as Up};
use drift_worker::model::Decoder;
use drift_worker::train::{
    Algorithm, EngineSettings, LARGEST_PIECE, Objective, OptimizerSettings, PreferenceLoss,
    Recompute, ReduceKind, Sharding, Trainer, TrainingSettings,
};
use prost::Message as _;
use safetensors::tensor::{Dtype, TensorView};
use tch::{Device, Kind};
use tempfile::TempDir;

/// All targets.
pub(crate) const NAMES: [&str; 8] =
    ["corpus", "parquet", "config", "manifest", "pairs", "model", "state", "wire"];

/// A reader.
pub(crate) trait Target {
    /// Valid inputs.
    fn seeds(&self) -> Vec<Vec<u8>>;
    /// Reads `bytes`; whether it refuses them does not matter.
    fn try_input(&mut self, bytes: &[u8]);
}

/// The target of this name.
pub(crate) fn target(name: &str) -> Result<Box<dyn Target>> {
    let folder = tempfile::Builder::new().prefix("drift-fuzz").tempdir_in(scratch())?;
    Ok(match name {
        "corpus" => Box::new(Corpus { folder, parquet: false }),
        "parquet" => Box::new(Corpus { folder, parquet: true }),
        "config" => Box::new(Config(folder)),
        "manifest" => Box::new(ManifestFile(folder)),
        "pairs" => Box::new(PairsFile(folder)),
        "model" => {
            write_model(folder.path())?;
            Box::new(Model(folder))
        }
        "state" => {
            write_model(folder.path())?;
            Box::new(State { trainer: trainer(folder.path())?, folder })
        }
        "wire" => Box::new(Wire),
        other => bail!("no target {other}"),
    })
}

/// A folder in memory where the machine has one: a disk would be what is measured.
fn scratch() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}

fn put(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).expect("write an input");
    path
}

/// Corpora, of every shape and framing.
struct Corpus {
    folder: TempDir,
    parquet: bool,
}

impl Target for Corpus {
    fn seeds(&self) -> Vec<Vec<u8>> {
        if self.parquet {
            return [1, 3].map(ultrafeedback).into_iter().collect();
        }
        let turn = |role: &str, text: &str| {
            format!("{{\"role\": \"{role}\", \"content\": \"{text}\", \"label\": \"DSAT\"}}")
        };
        let turns = [turn("user", "Hi \\u00e9"), turn("assistant", "No."), turn("user", "Shorter")];
        let messages = format!("{{\"conversation\": [{}], \"id\": 1}}", turns.join(", "));
        let dialogue = r#"{"prompt": [{"role": "user", "content": "q"}], "chosen": {"role": "assistant", "content": "a"}, "rejected": {"role": "assistant", "content": "b"}}"#;
        let ultra = r#"{"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], "score_chosen": 8.0, "score_rejected": 4.5}"#;
        let mut seeds: Vec<Vec<u8>> = [&messages, dialogue, ultra]
            .iter()
            .flat_map(|row| [format!("[{row}, {row}]"), format!("{row}\n{row}\n")])
            .map(String::into_bytes)
            .collect();
        // Two conversations of the demo, as WildFeedback has them.
        let demo = drift_coordinator::config::DEMO_CORPUS;
        if let Ok(serde_json::Value::Array(records)) = serde_json::from_slice(demo) {
            let two = serde_json::Value::Array(records.into_iter().take(2).collect());
            seeds.push(two.to_string().into_bytes());
        }
        for name in ["dsat_data.jsonl", "wildfeedback.json", "sat_dsat_annotation.json"] {
            seeds.extend(shared(name, 6 << 10));
        }
        seeds
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let path = put(self.folder.path(), "input", bytes);
        for allow_truncated in [false, true] {
            let options = ReadOptions { format: None, max_malformed: 1.0, allow_truncated };
            let _ = corpus::read(&path, &options, &mut |_| {}, &mut |_| {});
        }
    }
}

/// The first bytes of a shared file, where it is there.
fn shared(name: &str, bytes: usize) -> Option<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(name);
    let mut content = fs::read(path).ok()?;
    content.truncate(bytes);
    Some(content)
}

/// A Parquet file in the shape of ultrafeedback_binarized.
fn ultrafeedback(rows: usize) -> Vec<u8> {
    use std::sync::Arc;

    use arrow::array::{
        Array, ArrayRef, Float64Array, ListArray, RecordBatch, StringArray, StructArray,
    };
    use arrow::buffer::OffsetBuffer;
    use arrow::datatypes::{DataType, Field};

    let text = |what: &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values((0..rows).map(|row| format!("{what} {row}"))))
    };
    let turns = |what: &str| -> ArrayRef {
        let word = |row: usize| if row.is_multiple_of(2) { "user" } else { "assistant" };
        let roles = StringArray::from_iter_values((0..2 * rows).map(word));
        let contents =
            StringArray::from_iter_values((0..2 * rows).map(|row| format!("{what} {row}")));
        let field = |name: &str| Arc::new(Field::new(name, DataType::Utf8, false));
        let turns = StructArray::from(vec![
            (field("content"), Arc::new(contents) as ArrayRef),
            (field("role"), Arc::new(roles) as ArrayRef),
        ]);
        let item = Arc::new(Field::new("element", turns.data_type().clone(), true));
        let offsets = OffsetBuffer::from_lengths(vec![2; rows]);
        Arc::new(ListArray::new(item, offsets, Arc::new(turns), None))
    };
    let scores = |base: f64| -> ArrayRef {
        Arc::new(Float64Array::from_iter_values((0..rows).map(|row| base + row as f64)))
    };
    let batch = RecordBatch::try_from_iter([
        ("prompt", text("prompt")),
        ("chosen", turns("chosen")),
        ("rejected", turns("rejected")),
        ("score_chosen", scores(8.0)),
        ("score_rejected", scores(2.0)),
    ])
    .expect("columns of equal length");
    let mut bytes = Vec::new();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).expect("a schema");
    writer.write(&batch).expect("a batch");
    writer.close().expect("a file");
    bytes
}

/// Configuration files, and frozen ones.
struct Config(TempDir);

impl Target for Config {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let frozen = Layers { base: Base::Recipe, overrides: Vec::new(), ignore_environment: true };
        let all = frozen.load().ok().and_then(|settings| settings.to_toml().ok());
        let demo = drift_coordinator::config::DEMO_CONFIG.to_owned();
        all.into_iter().chain([demo]).map(String::into_bytes).collect()
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let path = put(self.0.path(), "input.toml", bytes);
        if let Ok(settings) = Settings::frozen(&path) {
            let _ = settings.check();
            let _ = settings.to_toml();
        }
        // As a flag's value.
        let value = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]);
        let overrides = vec![format!("training.beta={value}"), value.into_owned()];
        let _ = Layers { base: Base::Recipe, overrides, ignore_environment: true }.load();
    }
}

/// A checkpoint's manifest.
struct ManifestFile(TempDir);

impl Target for ManifestFile {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let folder = self.0.path();
        put(folder, "model.safetensors", b"weights");
        put(folder, "config.json", b"{}");
        let subject = Subject {
            run_id: "1f".to_owned(),
            drift_version: "0.1.0".to_owned(),
            iteration: Iteration(1),
            base_model: "models/a".to_owned(),
        };
        let manifest =
            Manifest::build(folder, subject, &Default::default(), &mut |_| ()).expect("a manifest");
        manifest.save(folder).expect("save a manifest");
        vec![fs::read(folder.join(MANIFEST)).expect("read a manifest")]
    }

    fn try_input(&mut self, bytes: &[u8]) {
        put(self.0.path(), MANIFEST, bytes);
        if let Ok(manifest) = Manifest::load(self.0.path()) {
            let _ = manifest.verify(self.0.path());
        }
    }
}

/// `pairs.parquet`, which is trained on.
struct PairsFile(TempDir);

impl Target for PairsFile {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let row = |id| PairRow {
            context: vec![Message::new(Role::User, "Why?")],
            chosen: "Because.".to_owned(),
            rejected: "No.".to_owned(),
            tokens: TokenPair {
                id: PairId(id),
                prompt: vec![1, 2, 3],
                chosen: vec![4, 5],
                rejected: vec![6],
            },
            chosen_from: Side::Sample {
                iteration: Iteration(1),
                prompt: PromptId(id),
                index: 0,
                finish: FinishReason::Stop,
            },
            rejected_from: Side::Corpus { origin: Origin { file: "a.json".into(), record: id } },
            held_out: id == 1,
        };
        let path = self.0.path().join("seed.parquet");
        let file = |rows: u64| {
            write_pairs(&path, &(0..rows).map(row).collect::<Vec<_>>()).expect("write pairs");
            fs::read(&path).expect("read pairs")
        };
        vec![file(1), file(3)]
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let _ = read_pairs(&put(self.0.path(), "pairs.parquet", bytes));
    }
}

const CONFIG: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "head_dim": 8,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": true,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "hidden_act": "silu", "torch_dtype": "float32"}"#;
const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";

/// A model that takes microseconds.
fn write_model(folder: &Path) -> Result<()> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![61, 16]),
        ("model.norm.weight".to_owned(), vec![16]),
    ];
    for (name, shape) in [
        ("self_attn.q_proj", vec![16, 16]),
        ("self_attn.k_proj", vec![8, 16]),
        ("self_attn.v_proj", vec![8, 16]),
        ("self_attn.o_proj", vec![16, 16]),
        ("mlp.gate_proj", vec![24, 16]),
        ("mlp.up_proj", vec![24, 16]),
        ("mlp.down_proj", vec![16, 24]),
        ("input_layernorm", vec![16]),
        ("post_attention_layernorm", vec![16]),
    ] {
        shapes.push((format!("model.layers.0.{name}.weight"), shape));
    }
    let zeros = vec![0; 61 * 16 * 4];
    let tensors = shapes
        .iter()
        .map(|(name, shape)| {
            let bytes = &zeros[..shape.iter().product::<usize>() * 4];
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>>>()?;
    fs::write(folder.join(WEIGHTS), safetensors::serialize(tensors, None)?)?;
    fs::write(folder.join("config.json"), CONFIG)?;
    Ok(())
}

/// A safetensors file's header, and its data behind it.
fn parts(file: &[u8]) -> (&[u8], &[u8]) {
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    file[8..].split_at(length)
}

/// A safetensors file from a mode and what was changed: the whole file, or the header
/// alone, with the right length before it, which a change would else hardly pass.
fn safetensors_file(whole: &[u8], header_alone: bool, changed: &[u8]) -> Vec<u8> {
    if !header_alone {
        return changed.to_vec();
    }
    let mut file = (changed.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(changed);
    file.extend_from_slice(parts(whole).1);
    file
}

/// A model's folder: its first byte says which of its files an input is.
struct Model(TempDir);

impl Target for Model {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let weights = fs::read(self.0.path().join(WEIGHTS)).expect("read weights");
        let index = r#"{"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}"#;
        let with = |mode: u8, bytes: &[u8]| [&[mode], bytes].concat();
        vec![
            with(0, &weights),
            with(1, parts(&weights).0),
            with(2, CONFIG.as_bytes()),
            with(3, index.as_bytes()),
        ]
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let Some((mode, changed)) = bytes.split_first() else { return };
        let folder = self.0.path();
        write_model(folder).expect("write a model");
        let _ = fs::remove_file(folder.join(INDEX));
        match mode % 4 {
            2 => drop(put(folder, "config.json", changed)),
            3 => drop(put(folder, INDEX, changed)),
            mode => {
                let whole = fs::read(folder.join(WEIGHTS)).expect("read weights");
                put(folder, WEIGHTS, &safetensors_file(&whole, mode == 1, changed));
            }
        }
        let _ = Decoder::load(folder, Kind::Float, Device::Cpu);
    }
}

fn trainer(folder: &Path) -> Result<Trainer> {
    let mut trainer = Trainer::new(Decoder::load(folder, Kind::Float, Device::Cpu)?);
    let settings = TrainingSettings {
        objective: Objective { loss: PreferenceLoss::Sigmoid, beta: 0.1, rpo_alpha: 0.0 },
        optimizer: OptimizerSettings {
            algorithm: Algorithm::RmsProp { alpha: 0.99, epsilon: 1e-8 },
            max_grad_norm: 1.0,
        },
        engine: EngineSettings {
            sharding: Sharding::None,
            recompute: Recompute::None,
            reduce: ReduceKind::Float,
            largest_piece: LARGEST_PIECE,
        },
    };
    trainer.begin(settings, None)?;
    Ok(trainer)
}

/// A snapshot's training state; the first byte says whether an input is the header alone.
struct State {
    trainer: Trainer,
    folder: TempDir,
}

impl State {
    /// The state as it is saved, and the name of its file.
    fn saved(&self) -> (Vec<u8>, String) {
        let folder = self.folder.path().join("saved");
        fs::create_dir_all(&folder).expect("make a folder");
        let files = self.trainer.save_state(&folder).expect("save state");
        let name = files[0].name.clone();
        (fs::read(folder.join(&name)).expect("read state"), name)
    }
}

impl Target for State {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let (file, _) = self.saved();
        vec![[&[0], &file[..]].concat(), [&[1], parts(&file).0].concat()]
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let Some((mode, changed)) = bytes.split_first() else { return };
        let (whole, name) = self.saved();
        let folder = self.folder.path().join("tried");
        fs::create_dir_all(&folder).expect("make a folder");
        put(&folder, &name, &safetensors_file(&whole, mode % 2 == 1, changed));
        let _ = self.trainer.load_state(&folder);
    }
}

/// Messages both ways; the first byte says which.
struct Wire;

impl Target for Wire {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let up = |body| {
            let message = pb::WorkerMessage { generation: 3, body: Some(body) };
            [&[0], &message.encode_to_vec()[..]].concat()
        };
        let down = |body| {
            let message = pb::CoordinatorMessage { body: Some(body) };
            [&[1], &message.encode_to_vec()[..]].concat()
        };
        let file = || pb::File { name: "a.safetensors".to_owned(), bytes: 9, sha256: vec![7; 32] };
        let pair = || pb::TokenPair {
            pair: 4,
            prompt: vec![1, 2, 3],
            chosen: vec![4, 500, 70_000],
            rejected: vec![6],
            reference_chosen: Some(-1.5),
            reference_rejected: Some(-2.5),
        };
        let batches = || vec![pb::MicroBatch { pairs: vec![pair(), pair()] }];
        let outcome = pb::PairOutcome { pair: 4, loss: 0.69, ..Default::default() };
        let sample = pb::Sample { prompt: 1, index: 2, tokens: vec![3, 4, 5], finish: 1 };
        vec![
            up(Up::StoreListening(pb::StoreListening { address: "127.0.0.1:9".to_owned() })),
            up(Up::SampleResult(pb::SampleResult {
                shard: 1,
                samples: vec![sample.clone(), sample],
                seconds: 0.5,
            })),
            up(Up::ScoreResult(pb::ScoreResult {
                batch: 1,
                pairs: vec![pb::PairLogps { pair: 1, chosen: -3.0, rejected: -4.0 }],
            })),
            up(Up::StepResult(pb::StepResult {
                step: 2,
                pairs: vec![outcome],
                ..Default::default()
            })),
            up(Up::StateSaved(pb::StateSaved { files: vec![file(), file()] })),
            up(Up::SnapshotWritten(pb::SnapshotWritten {
                step: 7,
                files: vec![file()],
                ..Default::default()
            })),
            down(Down::OpenGroup(pb::OpenGroup {
                store_address: "127.0.0.1:9".to_owned(),
                timeout_seconds: 60.0,
                number: 2,
            })),
            down(Down::LoadModel(pb::LoadModel { directory: "/model".to_owned(), dtype: 1 })),
            down(Down::Sample(pb::SampleShard {
                shard: 1,
                seed: 2,
                iteration: 3,
                params: Some(pb::SamplingParams {
                    temperature: 0.7,
                    top_p: 0.9,
                    max_new_tokens: 64,
                    stop_ids: vec![2],
                    ..Default::default()
                }),
                prompts: vec![pb::SamplePrompt { prompt: 1, index: 0, tokens: vec![1, 2, 3] }],
                engine: Some(pb::SamplingEngine {
                    max_rows: 8,
                    cache_bytes: 1 << 20,
                    drafting: true,
                }),
            })),
            down(Down::Score(pb::ScoreBatch { batch: 1, micro_batches: batches() })),
            down(Down::BeginTraining(pb::BeginTraining {
                objective: Some(pb::Objective { beta: 0.1, loss: 1, ..Default::default() }),
                optimizer: Some(pb::Optimizer {
                    max_grad_norm: 1.0,
                    algorithm: Some(pb::optimizer::Algorithm::RmsProp(pb::RmsProp {
                        alpha: 0.99,
                        epsilon: 1e-8,
                    })),
                }),
                engine: Some(pb::Engine {
                    sharding: 1,
                    recompute: 1,
                    reduce: 1,
                    ..Default::default()
                }),
            })),
            down(Down::TrainStep(pb::TrainStep {
                step: 1,
                learning_rate: 5e-7,
                global_pairs: 2,
                micro_batches: batches(),
            })),
        ]
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let Some((way, message)) = bytes.split_first() else { return };
        if way % 2 == 0 {
            if let Ok(message) = pb::WorkerMessage::decode(message) {
                let _ = drift_coordinator::server::decode(message);
            }
        } else if let Ok(pb::CoordinatorMessage { body: Some(body) }) =
            pb::CoordinatorMessage::decode(message)
        {
            let _ = drift_worker::agent::decode(body);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What once broke a target, in files named after it, breaks it no more; nor does what
    /// inputs are made from.
    #[test]
    fn nothing_that_was_found_breaks_anything_again() {
        let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/found");
        let found: Vec<PathBuf> =
            found.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!found.is_empty());
        for name in NAMES {
            let mut target = target(name).unwrap();
            let of_it = |path: &&PathBuf| {
                path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}-"))
            };
            for seed in target.seeds() {
                target.try_input(&seed);
            }
            for path in found.iter().filter(of_it) {
                target.try_input(&fs::read(path).unwrap());
            }
        }
    }
}
