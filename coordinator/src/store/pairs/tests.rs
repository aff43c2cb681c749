use std::fs;
use std::process::Command;

use super::*;
use crate::domain::{FinishReason, Iteration, Origin, PromptId};

/// Rows over more than one row group, with what breaks careless writers: empty
/// texts and lists, quotes, other scripts, a zero byte, the largest id.
fn rows(count: u64) -> Vec<PairRow> {
    (0..count)
        .map(|n| PairRow {
            context: (0..n % 4)
                .map(|turn| {
                    let role = [Role::System, Role::User, Role::Assistant, Role::Tool];
                    Message::new(role[(turn % 4) as usize], format!("turn {turn}\n\"é\" 字 \0 🙂"))
                })
                .collect(),
            chosen: if n % 7 == 0 { String::new() } else { format!("good {n}") },
            rejected: format!("bad {n} \\ \u{2028}"),
            tokens: TokenPair {
                id: PairId(n),
                prompt: (0..n as u32 % 50).collect(),
                chosen: vec![u32::MAX, n as u32],
                rejected: if n % 5 == 0 { vec![] } else { vec![7; n as usize % 9] },
            },
            chosen_from: Side::Sample {
                iteration: Iteration(3),
                prompt: PromptId(n),
                index: 2,
                finish: if n % 2 == 0 { FinishReason::Stop } else { FinishReason::Length },
            },
            rejected_from: Side::Corpus {
                origin: Origin { file: "dsat \"x\".jsonl".into(), record: n },
            },
            held_out: n % 3 == 0,
        })
        .collect()
}

#[test]
fn rows_come_back_as_they_went() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.parquet");
    for count in [0, 1, 2500] {
        let written = write_pairs(&path, &rows(count)).unwrap();
        assert_eq!(read_pairs(&path).unwrap(), rows(count));
        assert_eq!(written, FileEntry::of_file(&path, &mut |_| ()).unwrap());
    }
}

#[test]
fn equal_rows_give_equal_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.parquet"), dir.path().join("b.parquet"));
    write_pairs(&a, &rows(2500)).unwrap();
    write_pairs(&b, &rows(2500)).unwrap();
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    let mut other = rows(2500);
    other[2000].held_out ^= true;
    write_pairs(&b, &other).unwrap();
    assert!(fs::read(&a).unwrap() != fs::read(&b).unwrap());
}

#[test]
fn a_row_under_another_id_is_refused_and_the_old_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.parquet");
    write_pairs(&path, &rows(3)).unwrap();
    let mut shifted = rows(3);
    shifted.swap(0, 1);
    let message = write_pairs(&path, &shifted).unwrap_err().to_string();
    assert!(message.contains("row 0 was given pair id 1"), "{message}");
    assert_eq!(read_pairs(&path).unwrap().len(), 3);
}

#[test]
fn a_torn_file_and_a_foreign_file_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.parquet");
    let entry = write_pairs(&path, &rows(50)).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let message = read_pairs(&path).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: not a whole Parquet", path.display())), "{message}");
    let message = entry.verify(&path).unwrap_err().to_string();
    assert!(message.contains(&format!("expected {}", whole.len())), "{message}");

    let foreign = RecordBatch::try_from_iter([(
        "prompt",
        Arc::new(StringArray::from(vec!["hello"])) as ArrayRef,
    )])
    .unwrap();
    let mut writer =
        ArrowWriter::try_new(File::create(&path).unwrap(), foreign.schema(), None).unwrap();
    writer.write(&foreign).unwrap();
    writer.close().unwrap();
    let message = read_pairs(&path).unwrap_err().to_string();
    assert!(message.contains("column \"prompt\" is Utf8, expected List"), "{message}");
}

/// People's tools must read the columns as documented.
#[test]
#[ignore = "needs pandas, from `make setup`; run with --ignored"]
fn pandas_reads_the_columns_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.parquet");
    write_pairs(&path, &rows(1500)).unwrap();
    let script = r#"
import json, sys, pandas, pyarrow.parquet as pq
schema = pq.read_schema(sys.argv[1])
assert str(schema.field("prompt").type) == "list<element: struct<role: string not null, content: string not null> not null>", schema
assert str(schema.field("prompt_ids").type) == "list<element: uint32 not null>", schema
t = pandas.read_parquet(sys.argv[1])
assert list(t.columns) == "prompt chosen rejected prompt_ids chosen_ids rejected_ids chosen_from rejected_from held_out".split()
assert len(t) == 1500 and t.held_out.sum() == 500
row = t.iloc[1203]
assert row.prompt[2]["role"] == "assistant" and row.prompt[2]["content"] == "turn 2\n\"é\" 字 \0 🙂"
assert list(row.prompt_ids) == [0, 1, 2] and list(row.chosen_ids) == [2**32 - 1, 1203]
assert json.loads(row.chosen_from) == {"from": "sample", "iteration": 3, "prompt": 1203, "index": 2, "finish": "length"}
assert json.loads(row.rejected_from)["origin"] == {"file": "dsat \"x\".jsonl", "record": 1203}
"#;
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    let read = Command::new(python).args(["-c", script]).arg(&path).output().unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
}
