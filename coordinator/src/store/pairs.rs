//! `pairs.parquet`: what an iteration trains on, for people and for workers.
//!
//! | column | type | |
//! |---|---|---|
//! | `prompt` | list of {role, content} | x as messages |
//! | `chosen`, `rejected` | string | y⁺ and y⁻ as text |
//! | `prompt_ids`, `chosen_ids`, `rejected_ids` | list of uint32 | the same as token ids, cut to length: what is computed on |
//! | `chosen_from`, `rejected_from` | string | JSON: which record of the corpus, or which sample |
//! | `held_out` | bool | kept from training, for evaluation |
//!
//! The row's number is the pair's id. Equal rows give equal bytes: no times,
//! no program's version, row groups of fixed size.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, ListArray, RecordBatch, StringArray, StructArray,
    UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, UInt32Type};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use sha2::{Digest, Sha256};

use super::error::StoreError;
use super::manifest::FileEntry;
use super::publish;
use crate::contain::{self, contained};
use crate::domain::{Message, PairId, PairRow, Role, Side, TokenPair};

/// Says what wrote the file; raised with its columns, not with the program.
const CREATED_BY: &str = "drift version 2 (build pairs)";
/// Rows in a row group: what is in memory at once while reading and writing.
const GROUP_ROWS: usize = 1024;
const REMEDY: &str = "restore it from a backup, or start again in a new --run-dir";

/// Publishes `rows` at `path` and returns the file's length and hash.
///
/// # Errors
/// A row whose `tokens.id` is not its number, or the operation that failed.
pub fn write_pairs(path: &Path, rows: &[PairRow]) -> Result<FileEntry, StoreError> {
    publish::write_file_with(path, |file| write_to(path, file, rows))
}

/// Length and hash of the file that [`write_pairs`] would publish.
///
/// # Errors
/// A row whose `tokens.id` is not its number, or rows that Parquet cannot hold.
pub fn measure_pairs(path: &Path, rows: &[PairRow]) -> Result<FileEntry, StoreError> {
    write_to(path, io::sink(), rows)
}

fn write_to(path: &Path, to: impl Write + Send, rows: &[PairRow]) -> Result<FileEntry, StoreError> {
    for (number, row) in (0..).zip(rows) {
        if row.tokens.id != PairId(number) {
            let problem = format!("row {number} was given pair id {}", row.tokens.id);
            return Err(StoreError::malformed(path, problem, "report this as a bug"));
        }
    }
    let mut hashing = Hashing { inner: to, digest: Sha256::new(), bytes: 0 };
    write_groups(&mut hashing, rows).map_err(|e| write_error(path, e))?;
    Ok(FileEntry::new(hashing.bytes, &hashing.digest.finalize().into()))
}

fn write_groups(to: &mut (impl Write + Send), rows: &[PairRow]) -> Result<(), ParquetError> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_created_by(CREATED_BY.to_owned())
        .build();
    let options =
        ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
    let mut writer = ArrowWriter::try_new_with_options(to, Arc::new(schema()), options)?;
    for group in rows.chunks(GROUP_ROWS) {
        writer.write(&to_batch(group)?)?;
    }
    writer.close()?;
    Ok(())
}

/// Reads the pairs at `path`, in order. Whether they are the ones that were
/// written is for [`FileEntry::verify`] to say, with what [`write_pairs`]
/// returned.
///
/// # Errors
/// A file that is not Parquet, a column that is missing or of another type, a
/// value that is none of ours, with its row; or the operation that failed.
pub fn read_pairs(path: &Path) -> Result<Vec<PairRow>, StoreError> {
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    let damaged = |problem: String| StoreError::malformed(path, problem, REMEDY);
    let builder = contain::parquet(file, ArrowReaderOptions::new())
        .map_err(|e| damaged(format!("not a whole Parquet file: {e}")))?;
    for expected in schema().fields() {
        let found = builder
            .schema()
            .field_with_name(expected.name())
            .map_err(|_| damaged(format!("column {:?} is missing", expected.name())))?;
        if found.data_type() != expected.data_type() || found.is_nullable() {
            return Err(damaged(format!(
                "column {:?} is {}, expected {}",
                found.name(),
                found.data_type(),
                expected.data_type()
            )));
        }
    }
    let reader = contained(|| builder.with_batch_size(GROUP_ROWS).build())
        .map_err(|e| damaged(format!("its rows cannot be read: {e}")))?;
    let mut rows = Vec::new();
    for batch in contain::items(reader) {
        let batch = batch.map_err(|e| damaged(format!("after row {}: {e}", rows.len())))?;
        from_batch(&batch, &mut rows)
            .map_err(|problem| damaged(format!("row {}: {problem}", rows.len())))?;
    }
    Ok(rows)
}

fn element(of: DataType) -> FieldRef {
    Arc::new(Field::new("element", of, false))
}

fn message_fields() -> Fields {
    let text = |name| Field::new(name, DataType::Utf8, false);
    Fields::from(vec![text("role"), text("content")])
}

fn schema() -> Schema {
    let text = |name| Field::new(name, DataType::Utf8, false);
    let ids = |name| Field::new(name, DataType::List(element(DataType::UInt32)), false);
    let messages = DataType::List(element(DataType::Struct(message_fields())));
    Schema::new(vec![
        Field::new("prompt", messages, false),
        text("chosen"),
        text("rejected"),
        ids("prompt_ids"),
        ids("chosen_ids"),
        ids("rejected_ids"),
        text("chosen_from"),
        text("rejected_from"),
        Field::new("held_out", DataType::Boolean, false),
    ])
}

fn to_batch(rows: &[PairRow]) -> Result<RecordBatch, ArrowError> {
    let text = |of: fn(&PairRow) -> &String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(of)))
    };
    let ids = |of: fn(&TokenPair) -> &Vec<u32>| -> Result<ArrayRef, ArrowError> {
        let lists = || rows.iter().map(|row| of(&row.tokens));
        let values = UInt32Array::from_iter_values(lists().flatten().copied());
        list(DataType::UInt32, lists().map(Vec::len), Arc::new(values))
    };
    let from = |of: fn(&PairRow) -> &Side| -> Result<ArrayRef, ArrowError> {
        let json = rows.iter().map(|row| serde_json::to_string(of(row)));
        let json = json.collect::<Result<Vec<_>, _>>();
        let json = json.map_err(|e| ArrowError::ExternalError(Box::new(e)))?;
        Ok(Arc::new(StringArray::from_iter_values(json)))
    };
    let messages = || rows.iter().flat_map(|row| &row.context);
    let roles = StringArray::from_iter_values(messages().map(|m| role_str(m.role)));
    let contents = StringArray::from_iter_values(messages().map(|m| &m.content));
    let messages =
        StructArray::try_new(message_fields(), vec![Arc::new(roles), Arc::new(contents)], None)?;
    let prompt = list(
        messages.data_type().clone(),
        rows.iter().map(|row| row.context.len()),
        Arc::new(messages),
    )?;
    let held_out = BooleanArray::from_iter(rows.iter().map(|row| Some(row.held_out)));
    RecordBatch::try_new(
        Arc::new(schema()),
        vec![
            prompt,
            text(|row| &row.chosen),
            text(|row| &row.rejected),
            ids(|tokens| &tokens.prompt)?,
            ids(|tokens| &tokens.chosen)?,
            ids(|tokens| &tokens.rejected)?,
            from(|row| &row.chosen_from)?,
            from(|row| &row.rejected_from)?,
            Arc::new(held_out),
        ],
    )
}

fn list(
    of: DataType,
    lengths: impl IntoIterator<Item = usize>,
    values: ArrayRef,
) -> Result<ArrayRef, ArrowError> {
    let offsets = OffsetBuffer::from_lengths(lengths);
    Ok(Arc::new(ListArray::try_new(element(of), offsets, values, None)?))
}

/// Appends the rows of a batch whose columns have the types of [`schema`].
fn from_batch(batch: &RecordBatch, rows: &mut Vec<PairRow>) -> Result<(), String> {
    let column = |name: &str| {
        batch.column_by_name(name).ok_or_else(|| format!("column {name:?} is missing"))
    };
    let text = |name, row: usize| -> Result<String, String> {
        Ok(column(name)?.as_string::<i32>().value(row).to_owned())
    };
    let ids = |name, row: usize| -> Result<Vec<u32>, String> {
        let list = column(name)?.as_list::<i32>().value(row);
        Ok(list.as_primitive::<UInt32Type>().values().to_vec())
    };
    let from = |name, row: usize| -> Result<Side, String> {
        serde_json::from_str(&text(name, row)?).map_err(|e| format!("{name}: {e}"))
    };
    for row in 0..batch.num_rows() {
        let tokens = TokenPair {
            id: PairId(rows.len() as u64),
            prompt: ids("prompt_ids", row)?,
            chosen: ids("chosen_ids", row)?,
            rejected: ids("rejected_ids", row)?,
        };
        rows.push(PairRow {
            context: messages(&column("prompt")?.as_list::<i32>().value(row))?,
            chosen: text("chosen", row)?,
            rejected: text("rejected", row)?,
            tokens,
            chosen_from: from("chosen_from", row)?,
            rejected_from: from("rejected_from", row)?,
            held_out: column("held_out")?.as_boolean().value(row),
        });
    }
    Ok(())
}

fn messages(list: &ArrayRef) -> Result<Vec<Message>, String> {
    let list = list.as_struct();
    let (roles, contents) = (list.column(0).as_string::<i32>(), list.column(1).as_string::<i32>());
    (0..list.len())
        .map(|i| {
            let role = parse_role(roles.value(i))
                .ok_or_else(|| format!("prompt: unknown role {:?}", roles.value(i)))?;
            Ok(Message::new(role, contents.value(i)))
        })
        .collect()
}

fn role_str(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

fn parse_role(text: &str) -> Option<Role> {
    [Role::System, Role::User, Role::Assistant, Role::Tool]
        .into_iter()
        .find(|role| role_str(*role) == text)
}

/// A full disk comes wrapped by the Parquet writer.
fn write_error(path: &Path, error: ParquetError) -> StoreError {
    match error {
        ParquetError::External(inner) => match inner.downcast::<io::Error>() {
            Ok(cause) => StoreError::io("write", path)(*cause),
            Err(other) => StoreError::io("write", path)(io::Error::other(other)),
        },
        other => StoreError::io("write", path)(io::Error::other(other)),
    }
}

struct Hashing<W> {
    inner: W,
    digest: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.digest.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
