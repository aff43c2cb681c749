#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use arrow::array::{Int64Array, LargeStringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{Field, Fields};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

use super::*;
use crate::corpus::{Container, Counts, DropReason, Kind, ReadOptions, Record};

type Named = (&'static str, ArrayRef);

/// Writes `columns` in row groups of two rows, and reads them.
fn read_columns(
    columns: Vec<Named>,
    options: &ReadOptions,
) -> Result<(Counts, Vec<Record>), CorpusError> {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(2)).build();
    let mut writer =
        ArrowWriter::try_new(file.reopen().unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let mut records = Vec::new();
    let counts =
        crate::corpus::read(file.path(), options, &mut |_| {}, &mut |record| records.push(record))?;
    Ok((counts, records))
}

fn text(values: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

/// Rows of messages, with a column that nobody asks for.
fn conversations(rows: &[&[(&str, Option<&str>)]]) -> ArrayRef {
    let flat: Vec<_> = rows.iter().flat_map(|row| row.iter().copied()).collect();
    let (roles, contents): (Vec<_>, Vec<_>) =
        flat.iter().map(|(role, content)| (Some(*role), *content)).unzip();
    let fields: Fields = vec![
        Field::new("content", DataType::Utf8, true),
        Field::new("role", DataType::Utf8, true),
        Field::new("hashed_ip", DataType::Utf8, true),
    ]
    .into();
    let ips = vec![Some("ip"); flat.len()];
    let messages =
        StructArray::new(fields.clone(), vec![text(&contents), text(&roles), text(&ips)], None);
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| row.len()));
    let item = Arc::new(Field::new("element", DataType::Struct(fields), true));
    Arc::new(ListArray::new(item, offsets, Arc::new(messages), None))
}

#[test]
fn wildchat_is_counted_and_a_bad_role_told() {
    let list = conversations(&[
        &[("user", Some("x")), ("assistant", Some("y"))],
        &[("user", Some("x")), ("assistant", None), ("user", Some("z"))],
        &[("narrator", Some("x"))],
    ]);
    let hashes = text(&[Some("a"), Some("b"), Some("c")]);
    let options = ReadOptions { max_malformed: 0.5, ..ReadOptions::default() };
    let (counts, records) =
        read_columns(vec![("conversation_hash", hashes), ("conversation", list)], &options)
            .unwrap();
    assert_eq!((counts.container, counts.format), (Container::Parquet, Format::Messages));
    assert_eq!((counts.conversations, counts.utterances, counts.records), (2, 5, 2));
    assert_eq!((counts.malformed, counts.examples[0].place.record, records.len()), (1, 2, 0));
    assert!(counts.examples[0].problem.contains("unknown role `narrator`"));
}

#[test]
fn ultrafeedback_gives_pairs() {
    let side = |reply: &'static str| -> Vec<(&'static str, Option<&'static str>)> {
        vec![("user", Some("x")), ("assistant", Some(reply))]
    };
    let (good, bad) = (side("good"), side("bad"));
    let columns = vec![
        ("prompt", text(&[Some("x"), Some("x"), Some("x")])),
        ("chosen", conversations(&[&good, &good, &good])),
        ("rejected", conversations(&[&bad, &good, &bad])),
        ("messages", conversations(&[&good, &good, &good])),
    ];
    let (counts, records) = read_columns(columns, &ReadOptions::default()).unwrap();
    let Record::Seed(pair) = &records[0] else { panic!() };
    assert_eq!(
        (pair.chosen.as_str(), pair.rejected.as_str(), pair.context.len()),
        ("good", "bad", 1)
    );
    assert_eq!(records.len(), 1);
    assert_eq!(counts.dropped_for(Kind::Seed, DropReason::SameReplies), 1);
    assert_eq!(counts.dropped_for(Kind::Seed, DropReason::Duplicate), 1);
}

#[test]
fn utterances_as_a_hub_converts_them() {
    // Large strings, nullable labels: what datasets' converter writes.
    let contents =
        LargeStringArray::from(vec![Some("x"), Some("y"), Some("no"), Some("x"), None, Some("no")]);
    let columns: Vec<Named> = vec![
        ("UtterranceId", Arc::new(Int64Array::from(vec![0, 1, 2, 0, 1, 2]))),
        ("Role", text(&["User", "Agent", "User", "User", "Agent", "User"].map(Some))),
        ("Content", Arc::new(contents)),
        ("Satisfaction", Arc::new(BooleanArray::from(vec![None; 6]))),
        (
            "Disatisfaction",
            Arc::new(BooleanArray::from(vec![
                None,
                Some(true),
                Some(true),
                None,
                None,
                Some(true),
            ])),
        ),
    ];
    let (counts, records) = read_columns(columns.clone(), &ReadOptions::default()).unwrap();
    let Record::Dsat(sample) = &records[0] else { panic!() };
    assert_eq!(
        (sample.rejected.as_str(), sample.feedback.as_str(), sample.origin.record),
        ("y", "no", 2)
    );
    assert_eq!((records.len(), counts.conversations), (1, 2));
    assert_eq!(counts.dropped_for(Kind::Dsat, DropReason::EmptyReply), 1);

    let options = ReadOptions { format: Some(Format::Utterances), ..ReadOptions::default() };
    let error = read_columns(columns[1..].to_vec(), &options).unwrap_err().to_string();
    assert!(error.contains("column `UtterranceId` is absent, expected a whole number"), "{error}");
}

#[test]
fn a_cut_parquet_file_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"PAR1 and then the connection broke").unwrap();
    let error = crate::corpus::read(file.path(), &ReadOptions::default(), &mut |_| {}, &mut |_| {})
        .unwrap_err();
    assert!(error.to_string().contains("fetch the file again"), "{error}");
}
