//! Corpora, as people bring them.

use std::fs;
use std::path::Path;

use drift_coordinator::corpus::{self, ReadOptions};
use tempfile::TempDir;

use super::{Target, put};

/// Corpora, of every shape and framing.
pub(super) struct Corpus {
    pub(super) folder: TempDir,
    pub(super) parquet: bool,
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
