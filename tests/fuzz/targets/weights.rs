//! Models and training state, as safetensors.

use std::fs;
use std::path::Path;

use anyhow::Result;
use drift_worker::model::Decoder;
use drift_worker::reward::RewardModel;
use drift_worker::train::{
    Algorithm, EngineSettings, LARGEST_PIECE, Objective, OptimizerSettings, PreferenceLoss,
    Recompute, ReduceKind, Sharding, Trainer, TrainingSettings,
};
use safetensors::tensor::{Dtype, TensorView};
use tch::Device;
use tempfile::TempDir;

use super::{Target, put};

const DECODER: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "head_dim": 8,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": true,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "hidden_act": "silu", "torch_dtype": "float32"}"#;
const ENCODER: &str = r#"{"model_type": "deberta-v2",
    "architectures": ["DebertaV2ForSequenceClassification"], "id2label": {"0": "LABEL_0"},
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "layer_norm_eps": 1e-7,
    "max_relative_positions": -1, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p", "position_biased_input": false, "relative_attention": true,
    "share_att_key": true, "pooler_hidden_act": "gelu", "hidden_act": "gelu"}"#;
const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";

/// A model of which there is a valid one.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// One that writes.
    Decoder,
    /// One that rates.
    Encoder,
}

impl Kind {
    fn config(self) -> &'static str {
        match self {
            Self::Decoder => DECODER,
            Self::Encoder => ENCODER,
        }
    }

    /// Names and shapes of its weights.
    fn shapes(self) -> Vec<(String, Vec<usize>)> {
        let named = |prefix: &str, shapes: &[(&str, &[usize])]| -> Vec<_> {
            shapes.iter().map(|(name, shape)| (format!("{prefix}{name}"), shape.to_vec())).collect()
        };
        match self {
            Self::Decoder => [
                named("model.", &[("embed_tokens.weight", &[61, 16]), ("norm.weight", &[16])]),
                named(
                    "model.layers.0.",
                    &[
                        ("self_attn.q_proj.weight", &[16, 16]),
                        ("self_attn.k_proj.weight", &[8, 16]),
                        ("self_attn.v_proj.weight", &[8, 16]),
                        ("self_attn.o_proj.weight", &[16, 16]),
                        ("mlp.gate_proj.weight", &[24, 16]),
                        ("mlp.up_proj.weight", &[24, 16]),
                        ("mlp.down_proj.weight", &[16, 24]),
                        ("input_layernorm.weight", &[16]),
                        ("post_attention_layernorm.weight", &[16]),
                    ],
                ),
            ]
            .concat(),
            Self::Encoder => {
                let mut shapes = named(
                    "deberta.",
                    &[
                        ("embeddings.word_embeddings.weight", &[61, 16]),
                        ("encoder.rel_embeddings.weight", &[16, 16]),
                    ],
                );
                for (name, rows, columns) in [
                    ("deberta.embeddings.LayerNorm", 16, None),
                    ("deberta.encoder.LayerNorm", 16, None),
                    ("deberta.encoder.layer.0.attention.self.query_proj", 16, Some(16)),
                    ("deberta.encoder.layer.0.attention.self.key_proj", 16, Some(16)),
                    ("deberta.encoder.layer.0.attention.self.value_proj", 16, Some(16)),
                    ("deberta.encoder.layer.0.attention.output.dense", 16, Some(16)),
                    ("deberta.encoder.layer.0.attention.output.LayerNorm", 16, None),
                    ("deberta.encoder.layer.0.intermediate.dense", 24, Some(16)),
                    ("deberta.encoder.layer.0.output.dense", 16, Some(24)),
                    ("deberta.encoder.layer.0.output.LayerNorm", 16, None),
                    ("pooler.dense", 16, Some(16)),
                    ("classifier", 1, Some(16)),
                ] {
                    let weight = [Some(rows), columns].into_iter().flatten().collect();
                    shapes.push((format!("{name}.weight"), weight));
                    shapes.push((format!("{name}.bias"), vec![rows]));
                }
                shapes
            }
        }
    }

    fn load(self, folder: &Path) -> Result<()> {
        match self {
            Self::Decoder => drop(Decoder::load(folder, tch::Kind::Float, Device::Cpu)?),
            Self::Encoder => drop(RewardModel::load(folder, tch::Kind::Float, Device::Cpu)?),
        }
        Ok(())
    }
}

/// A model that takes microseconds.
fn write_model(folder: &Path, of: Kind) -> Result<()> {
    let zeros = vec![0; 61 * 16 * 4];
    let shapes = of.shapes();
    let tensors = shapes
        .iter()
        .map(|(name, shape)| {
            let bytes = &zeros[..shape.iter().product::<usize>() * 4];
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>>>()?;
    fs::write(folder.join(WEIGHTS), safetensors::serialize(tensors, None)?)?;
    fs::write(folder.join("config.json"), of.config())?;
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
pub(super) struct Model {
    pub(super) folder: TempDir,
    pub(super) of: Kind,
}

impl Target for Model {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let folder = self.folder.path();
        write_model(folder, self.of).expect("write a model");
        self.of.load(folder).expect("a valid model");
        let weights = fs::read(folder.join(WEIGHTS)).expect("read weights");
        let index = r#"{"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}"#;
        let with = |mode: u8, bytes: &[u8]| [&[mode], bytes].concat();
        vec![
            with(0, &weights),
            with(1, parts(&weights).0),
            with(2, self.of.config().as_bytes()),
            with(3, index.as_bytes()),
        ]
    }

    fn try_input(&mut self, bytes: &[u8]) {
        let Some((mode, changed)) = bytes.split_first() else { return };
        let folder = self.folder.path();
        write_model(folder, self.of).expect("write a model");
        let _ = fs::remove_file(folder.join(INDEX));
        match mode % 4 {
            2 => drop(put(folder, "config.json", changed)),
            3 => drop(put(folder, INDEX, changed)),
            mode => {
                let whole = fs::read(folder.join(WEIGHTS)).expect("read weights");
                put(folder, WEIGHTS, &safetensors_file(&whole, mode == 1, changed));
            }
        }
        let _ = self.of.load(folder);
    }
}

fn trainer(folder: &Path) -> Result<Trainer> {
    let mut trainer = Trainer::new(Decoder::load(folder, tch::Kind::Float, Device::Cpu)?);
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
pub(super) struct State {
    trainer: Trainer,
    folder: TempDir,
}

impl State {
    pub(super) fn new(folder: TempDir) -> Result<Self> {
        write_model(folder.path(), Kind::Decoder)?;
        Ok(Self { trainer: trainer(folder.path())?, folder })
    }

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
