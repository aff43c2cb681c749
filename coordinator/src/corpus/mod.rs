//! Files of conversations in, DSAT samples, SAT samples and seed pairs out.
//!
//! [`read`] streams one file of any size in bounded memory, hands every sample
//! to a sink, and counts what became of every record. The file's shape and
//! framing are told by its content.
//!
//! | file | [`Format`] | gives |
//! |---|---|---|
//! | WildFeedback `sat_dsat_annotation` | [`Format::Utterances`] | DSAT, SAT, seed pairs |
//! | WildFeedback `wildfeedback`, `ultrafeedback_binarized` | [`Format::Pairs`] | seed pairs |
//! | the paper's `dsat_data.jsonl` | [`Format::Dsat`] | DSAT |
//! | own conversations with labels; WildChat | [`Format::Messages`] | DSAT, SAT, seed pairs; from WildChat, which has no labels, none |
//!
//! Each of them as a JSON array, JSON lines, JSON objects over several lines,
//! or Parquet.

mod counts;
mod error;
mod extract;
mod format;
mod json;
mod parquet;
mod rows;
mod split;
mod table;
mod turns;
mod utterances;

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

pub use counts::{Counts, DropReason, Kind, Labels, Malformed, Place};
pub use error::CorpusError;
pub use format::{Container, Format};
pub use table::Report;

use crate::domain::{DsatSample, SatSample, SeedPair};

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReadOptions {
    /// Shape of the records; told by content if absent.
    pub format: Option<Format>,
    /// Share of malformed records that is skipped and reported, from 0 to 1;
    /// beyond it the file is refused.
    pub max_malformed: f64,
    /// Take what a file holds that ends inside its array, and say so in
    /// [`Counts::truncated`], instead of refusing it.
    pub allow_truncated: bool,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { format: None, max_malformed: 0.01, allow_truncated: false }
    }
}

/// What a file gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A reply that disappointed.
    Dsat(DsatSample),
    /// A reply that satisfied.
    Sat(SatSample),
    /// A reply that disappointed, and the better one.
    Seed(SeedPair),
}

impl Record {
    /// Which of them.
    pub fn kind(&self) -> Kind {
        match self {
            Record::Dsat(_) => Kind::Dsat,
            Record::Sat(_) => Kind::Sat,
            Record::Seed(_) => Kind::Seed,
        }
    }
}

/// Bytes that are read to tell the container.
const HEAD: u64 = 64 << 10;

/// Reads one file as a stream. `progress` is told the bytes read so far, at
/// most once a MiB and at the end; `sink` is given every sample, in the file's
/// order.
///
/// A file without labels or pairs is no error: [`Counts::kept`] tells.
///
/// # Errors
/// A file that cannot be opened or decoded, is of no known shape, is cut off,
/// or has more malformed records than `options` bears. What the sink was given
/// until then should be thrown away.
pub fn read(
    path: &Path,
    options: &ReadOptions,
    progress: &mut dyn FnMut(u64),
    sink: &mut dyn FnMut(Record),
) -> Result<Counts, CorpusError> {
    let io = |doing| move |source| CorpusError::Io { file: path.to_owned(), doing, source };
    let mut file = File::open(path).map_err(io("open"))?;
    let bytes = file.metadata().map_err(io("read"))?.len();
    let mut head = Vec::new();
    file.by_ref().take(HEAD).read_to_end(&mut head).map_err(io("read"))?;
    file.rewind().map_err(io("read"))?;

    let container = container(path, &head)?;
    let format = match (options.format, container) {
        (Some(format), _) => format,
        (None, Container::Parquet) => parquet::probe(path, &file)?,
        (None, _) => json::probe(path, container)?,
    };
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let counts = Counts::new(name, format, container, bytes);
    let mut rows = rows::Rows::new(format, extract::Extractor::new(counts, sink));
    match container {
        Container::Parquet => parquet::read(path, file, progress, &mut rows)?,
        _ => json::read(path, file, container, options, progress, &mut rows)?,
    }
    judge(path, options, rows.extractor.into_counts())
}

/// Reads `paths` one after another for their counts alone.
///
/// `progress` is told the index of the file and the bytes read of it.
///
/// # Errors
/// The first file's that cannot be read, as [`read`] says.
pub fn report<P: AsRef<Path>>(
    paths: &[P],
    options: &ReadOptions,
    progress: &mut dyn FnMut(usize, u64),
) -> Result<Vec<Counts>, CorpusError> {
    let one = |(i, path): (usize, &P)| {
        read(path.as_ref(), options, &mut |bytes| progress(i, bytes), &mut |_| {})
    };
    paths.iter().enumerate().map(one).collect()
}

fn container(path: &Path, head: &[u8]) -> Result<Container, CorpusError> {
    let file = || path.to_owned();
    match format::head(head) {
        format::Head::Container(container) => Ok(container),
        format::Head::Empty => Err(CorpusError::Empty { file: file() }),
        format::Head::Encoded(found, remedy) => {
            Err(CorpusError::Encoded { file: file(), found, remedy })
        }
        format::Head::Unknown(byte) => Err(CorpusError::Unrecognised {
            file: file(),
            found: format!(
                "it begins with {:?}, not with `[`, `{{` or Parquet's PAR1",
                char::from(byte)
            ),
            expected: Format::expected(),
        }),
    }
}

/// Whether the file as a whole may be used.
fn judge(path: &Path, options: &ReadOptions, counts: Counts) -> Result<Counts, CorpusError> {
    let total = counts.records + counts.malformed;
    let first = || counts.examples.first().cloned().map(Box::new);
    if counts.records == 0 {
        let remedy = match (total, options.format) {
            (0, _) => "the file has no records: fetch it again",
            (_, Some(_)) => "check the format that is set by name, or leave it out",
            (_, None) => "repair the records",
        };
        return Err(CorpusError::NoRecords {
            file: path.to_owned(),
            format: counts.format,
            first: first(),
            remedy,
        });
    }
    match first() {
        Some(first) if counts.malformed as f64 > options.max_malformed * total as f64 => {
            Err(CorpusError::TooManyMalformed {
                file: path.to_owned(),
                count: counts.malformed,
                total,
                allowed: options.max_malformed,
                first,
            })
        }
        _ => Ok(counts),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The numbers that `configs/demo/README.md` gives.
    #[test]
    fn the_demo_holds_what_its_page_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo/corpus.json");
        let mut seeds = Vec::new();
        let counts = read(&path, &ReadOptions::default(), &mut |_| {}, &mut |record| {
            seeds.extend(if let Record::Seed(pair) = record { Some(pair) } else { None });
        })
        .unwrap();
        assert_eq!((counts.conversations, counts.utterances, counts.malformed), (65, 289, 0));
        assert_eq!((counts.labels.dsat, counts.labels.sat, counts.labels.mixed), (56, 31, 1));
        assert_eq!(counts.conversations_with_dsat, 56);
        assert_eq!([Kind::Dsat, Kind::Sat, Kind::Seed].map(|kind| counts.kept(kind)), [56, 31, 26]);
        assert_eq!(counts.dropped.values().map(|reasons| reasons.len()).sum::<usize>(), 0);
        assert!(seeds.iter().all(|pair| pair.chosen.split_whitespace().count() <= 80));
    }
}
