//! Parquet files: a batch of rows at a time, and only the columns that matter.

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, ListArray, RecordBatch, StringArray, UInt64Array,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt64Type};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use super::counts::Place;
use super::error::CorpusError;
use super::format::Format;
use super::rows::Rows;
use super::turns::{Flag, Label, Text, Turn, Turns, role};
use super::utterances::{Id, Utterance};
use crate::contain::{self, Ended, contained};

/// Rows that are decoded at once.
const BATCH: usize = 1024;
/// Fields of a message; what else a message has is never decoded.
const MESSAGE: [&str; 5] = ["role", "from", "content", "value", "label"];
/// Names of the list of messages.
const LISTS: [&str; 3] = ["messages", "conversation", "conversations"];
/// Names of the column that numbers utterances, as published and as spelt right.
const ID: [&str; 2] = ["UtterranceId", "UtteranceId"];
/// Names of the dissatisfaction column, as published and as spelt right.
const DISSATISFIED: [&str; 2] = ["Disatisfaction", "Dissatisfaction"];

const TURNS: &str = "a string, a message {role, content}, or a list of messages";

fn open(path: &Path, file: File) -> Result<ParquetRecordBatchReaderBuilder<Ended>, CorpusError> {
    // Without the writer's arrow types every text is plain Utf8 and every list a List.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    contain::parquet(file, options).map_err(|problem| broken(path, 0, problem))
}

fn broken(path: &Path, row: u64, problem: String) -> CorpusError {
    CorpusError::Parquet { file: path.to_owned(), row, problem }
}

/// Tells the shape from the names of the columns.
pub(super) fn probe(path: &Path, file: &File) -> Result<Format, CorpusError> {
    let io = |source| CorpusError::Io { file: path.to_owned(), doing: "read", source };
    let builder = open(path, file.try_clone().map_err(io)?)?;
    let names: Vec<&str> =
        builder.schema().fields().iter().map(|field| field.name().as_str()).collect();
    Format::of_keys(&names).ok_or_else(|| CorpusError::Unrecognised {
        file: path.to_owned(),
        found: format!("it has the columns {}", names.join(", ")),
        expected: Format::expected(),
    })
}

/// Reads all rows into `rows`.
pub(super) fn read(
    path: &Path,
    file: File,
    progress: &mut dyn FnMut(u64),
    rows: &mut Rows<'_>,
) -> Result<(), CorpusError> {
    let builder = open(path, file)?;
    let total = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    let bytes = rows.extractor.counts().bytes;
    let wanted = wanted(rows.format);
    let leaves = builder.parquet_schema().columns().iter().enumerate().filter(|(_, column)| {
        let parts = column.path().parts();
        let nested = parts.len() > 1;
        wanted.contains(&parts[0].as_str())
            && (!nested || MESSAGE.contains(&parts[parts.len() - 1].as_str()))
    });
    let leaves: Vec<usize> = leaves.map(|(leaf, _)| leaf).collect();
    let mask = ProjectionMask::leaves(builder.parquet_schema(), leaves);
    let reader = contained(|| builder.with_projection(mask).with_batch_size(BATCH).build())
        .map_err(|problem| broken(path, 0, problem))?;

    let (mut row, mut told) = (0, 0);
    for batch in contain::items(reader) {
        let batch = batch.map_err(|problem| broken(path, row, problem))?;
        take(path, &batch, row, rows)?;
        row += batch.num_rows() as u64;
        let read = (u128::from(bytes) * u128::from(row) / u128::from(total.max(1))) as u64;
        if read - told >= 1 << 20 || row == total {
            told = read;
            progress(read);
        }
    }
    rows.finish();
    Ok(())
}

fn wanted(format: Format) -> &'static [&'static str] {
    match format {
        Format::Utterances => {
            &[ID[0], ID[1], "Role", "Content", "Satisfaction", DISSATISFIED[0], DISSATISFIED[1]]
        }
        Format::Dsat => &["prompt", "rejected", "user_preference"],
        Format::Pairs => &["prompt", "conversations", "chosen", "rejected"],
        Format::Messages => &LISTS,
    }
}

/// Takes the rows of one batch, the first of which is row `first`.
fn take(
    path: &Path,
    batch: &RecordBatch,
    first: u64,
    rows: &mut Rows<'_>,
) -> Result<(), CorpusError> {
    let columns = Columns { path, batch };
    match rows.format {
        Format::Utterances => {
            let ids = columns.needed(&ID, "a whole number")?;
            let ids = cast(ids, &DataType::UInt64)
                .map_err(|_| columns.wrong(ID[0], ids.data_type().to_string(), "a whole number"))?;
            let ids: &UInt64Array = ids.as_primitive::<UInt64Type>();
            let roles = columns.text("Role")?;
            let contents = columns.text("Content")?;
            let satisfied = columns.flags(&["Satisfaction"])?;
            let dissatisfied = columns.flags(&DISSATISFIED)?;
            each(batch, first, rows, |row, rows, record| {
                let id =
                    ids.is_valid(row).then(|| ids.value(row)).ok_or("`UtterranceId` is null")?;
                let role = text_at(roles, row).ok_or("`Role` is null")?;
                let row = Utterance {
                    id: Id(id),
                    role: Text(Cow::Borrowed(role)),
                    content: text_at(contents, row).map(|text| Text(Cow::Borrowed(text))),
                    satisfied: satisfied.at(row)?,
                    dissatisfied: dissatisfied.at(row)?,
                };
                rows.utterance(&row, record)
            });
        }
        Format::Messages => {
            let list = columns.turns(&LISTS)?;
            let list = list.ok_or_else(|| columns.wrong("messages", "absent".to_owned(), TURNS))?;
            each(batch, first, rows, |row, rows, record| rows.messages(list.at(row)?, record));
        }
        Format::Dsat => {
            let [prompt, rejected, user] = [
                columns.sure("prompt")?,
                columns.sure("rejected")?,
                columns.sure("user_preference")?,
            ];
            each(batch, first, rows, |row, rows, record| {
                rows.dsat(prompt.at(row)?, rejected.at(row)?, user.at(row)?, record)
            });
        }
        Format::Pairs => {
            let context = columns.turns(&["conversations", "prompt"])?;
            let [chosen, rejected] = [columns.sure("chosen")?, columns.sure("rejected")?];
            each(batch, first, rows, |row, rows, record| {
                let context = context.as_ref().map(|column| column.at(row)).transpose()?;
                rows.pair(context, chosen.at(row)?, rejected.at(row)?, record)
            });
        }
    }
    Ok(())
}

/// Takes every row of the batch, counting those that are malformed.
fn each(
    batch: &RecordBatch,
    first: u64,
    rows: &mut Rows<'_>,
    mut one: impl FnMut(usize, &mut Rows<'_>, u64) -> Result<(), String>,
) {
    for row in 0..batch.num_rows() {
        let record = first + row as u64;
        match one(row, rows, record) {
            Ok(()) => rows.extractor.counts().records += 1,
            Err(problem) => {
                rows.lose();
                let place = Place { record, byte: None, line: None };
                rows.extractor.counts().skip(place, problem, b"");
            }
        }
    }
}

fn text_at(column: &StringArray, row: usize) -> Option<&str> {
    column.is_valid(row).then(|| column.value(row))
}

struct Columns<'b> {
    path: &'b Path,
    batch: &'b RecordBatch,
}

impl<'b> Columns<'b> {
    fn wrong(&self, column: &str, found: String, expected: &'static str) -> CorpusError {
        CorpusError::Column {
            file: self.path.to_owned(),
            column: column.to_owned(),
            found,
            expected,
        }
    }

    /// The first of `names`, the published one first, that is there.
    fn needed(&self, names: &[&str], expected: &'static str) -> Result<&'b ArrayRef, CorpusError> {
        let found = names.iter().find_map(|name| self.batch.column_by_name(name));
        found.ok_or_else(|| self.wrong(names[0], "absent".to_owned(), expected))
    }

    fn text(&self, name: &str) -> Result<&'b StringArray, CorpusError> {
        let column = self.needed(&[name], "text")?;
        column
            .as_string_opt()
            .ok_or_else(|| self.wrong(name, column.data_type().to_string(), "text"))
    }

    /// The first of `names` that is there.
    fn flags(&self, names: &[&str]) -> Result<Flags<'b>, CorpusError> {
        let Some((name, column)) =
            names.iter().find_map(|name| Some((name, self.batch.column_by_name(name)?)))
        else {
            return Ok(Flags::Absent);
        };
        match column.data_type() {
            DataType::Boolean => Ok(Flags::Boolean(column.as_boolean())),
            DataType::Utf8 => Ok(Flags::Text(column.as_string())),
            DataType::Null => Ok(Flags::Absent),
            other => Err(self.wrong(name, other.to_string(), "true, false or null")),
        }
    }

    fn sure(&self, name: &str) -> Result<TurnsColumn<'b>, CorpusError> {
        self.turns(&[name])?.ok_or_else(|| self.wrong(name, "absent".to_owned(), TURNS))
    }

    /// The first of `names` that is there.
    fn turns(&self, names: &[&str]) -> Result<Option<TurnsColumn<'b>>, CorpusError> {
        let Some((name, column)) =
            names.iter().find_map(|name| Some((name, self.batch.column_by_name(name)?)))
        else {
            return Ok(None);
        };
        TurnsColumn::of(column)
            .map(Some)
            .ok_or_else(|| self.wrong(name, column.data_type().to_string(), TURNS))
    }
}

enum Flags<'b> {
    Absent,
    Boolean(&'b BooleanArray),
    Text(&'b StringArray),
}

impl Flags<'_> {
    fn at(&self, row: usize) -> Result<Flag, String> {
        match self {
            Flags::Absent => Ok(Flag(None)),
            Flags::Boolean(column) => Ok(Flag(column.is_valid(row).then(|| column.value(row)))),
            Flags::Text(column) => text_at(column, row).map_or(Ok(Flag(None)), Flag::parse),
        }
    }
}

/// A column of messages: bare text, one struct a row, or a list of structs.
enum TurnsColumn<'b> {
    Text(&'b StringArray),
    One(Messages<'b>),
    Many(&'b ListArray, Messages<'b>),
}

struct Messages<'b> {
    role: &'b StringArray,
    content: &'b StringArray,
    label: Option<&'b StringArray>,
}

impl<'b> Messages<'b> {
    fn of(column: &'b ArrayRef) -> Option<Self> {
        let message = column.as_struct_opt()?;
        let field = |names: [&str; 2]| names.iter().find_map(|name| message.column_by_name(name));
        Some(Self {
            role: field(["role", "from"])?.as_string_opt()?,
            content: field(["content", "value"])?.as_string_opt()?,
            label: message.column_by_name("label").and_then(|label| label.as_string_opt()),
        })
    }

    fn at(&self, at: usize) -> Result<Turn<'b>, String> {
        let role = role(text_at(self.role, at).ok_or("a message has no role")?)?;
        let label = self
            .label
            .and_then(|label| text_at(label, at))
            .map_or(Ok(Label::Missing), Label::named)?;
        Ok(Turn { label, ..Turn::new(role, text_at(self.content, at).unwrap_or("")) })
    }
}

impl<'b> TurnsColumn<'b> {
    fn of(column: &'b ArrayRef) -> Option<Self> {
        match column.data_type() {
            DataType::Utf8 => Some(Self::Text(column.as_string())),
            DataType::Struct(_) => Messages::of(column).map(Self::One),
            DataType::List(_) => {
                let list = column.as_list();
                Messages::of(list.values()).map(|messages| Self::Many(list, messages))
            }
            _ => None,
        }
    }

    fn at(&self, row: usize) -> Result<Turns<'b>, String> {
        match self {
            Self::Text(column) => {
                Ok(Turns::Text(Cow::Borrowed(text_at(column, row).unwrap_or(""))))
            }
            Self::One(messages) => Ok(Turns::Messages(vec![messages.at(row)?])),
            Self::Many(list, _) if list.is_null(row) => Ok(Turns::Messages(Vec::new())),
            Self::Many(list, messages) => {
                let offsets = list.value_offsets();
                let range = offsets[row] as usize..offsets[row + 1] as usize;
                range.map(|at| messages.at(at)).collect::<Result<_, _>>().map(Turns::Messages)
            }
        }
    }
}

#[cfg(test)]
#[path = "parquet_tests.rs"]
mod tests;
