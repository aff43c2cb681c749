//! What can be wrong with a file of conversations, and what to do about it.

use std::path::PathBuf;

use super::counts::Malformed;

/// Why a corpus could not be read. Every message names the file, the place,
/// what was expected, and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// The operating system said no.
    #[error(
        "cannot {doing} {file}: {source}; check that the path exists and that this user may read it"
    )]
    Io {
        /// The file.
        file: PathBuf,
        /// What was being done: `open`, `read`.
        doing: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nothing but white space.
    #[error(
        "{file} holds no records; expected a JSON array, JSON lines or Parquet with some: fetch the file again"
    )]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// A compressed or otherwise encoded file.
    #[error("{file} is {found}, expected plain UTF-8 JSON or Parquet; {remedy}")]
    Encoded {
        /// The file.
        file: PathBuf,
        /// What its first bytes say it is.
        found: &'static str,
        /// The command that helps.
        remedy: &'static str,
    },
    /// No shape fits the first records.
    #[error(
        "{file} holds no shape of record that is known: {found}; expected one of: {expected}. \
         Set the format by name if the records are of one of these shapes"
    )]
    Unrecognised {
        /// The file.
        file: PathBuf,
        /// What the first records look like.
        found: String,
        /// The shapes and the keys that tell them.
        expected: String,
    },
    /// A Parquet file whose columns do not fit the shape.
    #[error(
        "{file}: column `{column}` is {found}, expected {expected}; export it again with that column"
    )]
    Column {
        /// The file.
        file: PathBuf,
        /// The column.
        column: String,
        /// Its type, or that it is absent.
        found: String,
        /// What the shape needs.
        expected: &'static str,
    },
    /// A Parquet file that cannot be decoded.
    #[error(
        "{file}: broken Parquet near row {row}: {problem}; fetch the file again and compare its size"
    )]
    Parquet {
        /// The file.
        file: PathBuf,
        /// Rows that were decoded before.
        row: u64,
        /// What the decoder said.
        problem: String,
    },
    /// The file ends before its array does: most often an interrupted download.
    #[error(
        "{file} is cut off: it ends at byte {byte} (line {line}) inside record {record}, expected {expected}; \
         {complete} records before it are whole: fetch the file again, or set allow_truncated to train on these"
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The record in which it ends, from 0.
        record: u64,
        /// Line of the end, from 1.
        line: u64,
        /// Bytes in the file.
        byte: u64,
        /// What was to come.
        expected: &'static str,
        /// Well-formed records before the end.
        complete: u64,
    },
    /// More malformed records than the settings bear.
    #[error(
        "{file}: {count} of {total} records are malformed ({:.2} %, at most {:.2} % allowed), the first at {first}; \
         repair them, or raise max_malformed",
        *.count as f64 / *.total as f64 * 100.0, *.allowed * 100.0
    )]
    TooManyMalformed {
        /// The file.
        file: PathBuf,
        /// Malformed records.
        count: u64,
        /// All records.
        total: u64,
        /// The set share, from 0 to 1.
        allowed: f64,
        /// The first of them.
        first: Box<Malformed>,
    },
    /// Not one well-formed record.
    #[error("{file} holds no well-formed record of the format {format}{}; {remedy}", first_of(.first))]
    NoRecords {
        /// The file.
        file: PathBuf,
        /// The format it was read as.
        format: super::Format,
        /// The first malformed record, if there is any record.
        first: Option<Box<Malformed>>,
        /// What helps.
        remedy: &'static str,
    },
}

fn first_of(first: &Option<Box<Malformed>>) -> String {
    first.as_ref().map(|m| format!(": the first is at {m}")).unwrap_or_default()
}
