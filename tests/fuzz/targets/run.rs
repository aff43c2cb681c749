//! What a run's directory holds beside weights.

use std::fs;

use drift_coordinator::config::{Base, Layers, Settings};
use drift_coordinator::domain::{
    FinishReason, Iteration, Message, Origin, PairId, PairRow, PromptId, Role, Side, TokenPair,
};
use drift_coordinator::store::manifest::{MANIFEST, Manifest, Subject};
use drift_coordinator::store::pairs::{read_pairs, write_pairs};
use tempfile::TempDir;

use super::{Target, put};

/// Configuration files, and frozen ones.
pub(super) struct Config(pub(super) TempDir);

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
pub(super) struct ManifestFile(pub(super) TempDir);

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
pub(super) struct PairsFile(pub(super) TempDir);

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
