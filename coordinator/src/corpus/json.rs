//! JSON files: arrays, lines, sequences, of any size.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::error::CorpusError;
use super::format::{Container, Format};
use super::rows::Rows;
use super::split::{Framing, Limits, Piece, Splitter};
use super::{ReadOptions, counts::Counts};

/// Bytes between two calls of the progress callback.
const PROGRESS: u64 = 1 << 20;
/// Records that are looked at to tell the shape.
const PROBED: usize = 100;

/// Tells how far a file is read.
struct Told<'p, R> {
    reader: R,
    read: u64,
    told: u64,
    progress: &'p mut dyn FnMut(u64),
}

impl<R: Read> Read for Told<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.reader.read(buffer)?;
        self.read += bytes as u64;
        if self.read - self.told >= PROGRESS || (bytes == 0 && self.read > self.told) {
            self.told = self.read;
            (self.progress)(self.read);
        }
        Ok(bytes)
    }
}

fn framing(container: Container) -> Framing {
    match container {
        Container::JsonLines => Framing::Lines,
        Container::JsonSequence => Framing::Sequence,
        Container::JsonArray | Container::Parquet => Framing::Array,
    }
}

/// Reads all records of an open file into `rows`.
pub(super) fn read(
    path: &Path,
    file: impl Read,
    container: Container,
    options: &ReadOptions,
    progress: &mut dyn FnMut(u64),
    rows: &mut Rows<'_>,
) -> Result<(), CorpusError> {
    let told = Told { reader: file, read: 0, told: 0, progress };
    let mut splitter = Splitter::new(told, framing(container), Limits::default());
    loop {
        let next = splitter.next().map_err(|source| read_error(path, source))?;
        let (place, problem, text) = match next {
            Piece::Value { place, bytes, last_line_is_open } => {
                let Err(problem) = row(rows, bytes, place.record) else {
                    rows.extractor.counts().records += 1;
                    continue;
                };
                if last_line_is_open && ends_early(bytes) {
                    let end = splitter.locate(place);
                    truncated(path, end, "the rest of the line", options, rows)?;
                    break;
                }
                (place, problem, excerpt(bytes))
            }
            Piece::Broken { place, problem, text } => (place, problem.to_owned(), excerpt(text)),
            Piece::Truncated { end, expected } => {
                let end = splitter.locate(end);
                truncated(path, end, expected, options, rows)?;
                break;
            }
            Piece::End => break,
        };
        rows.lose();
        let place = splitter.locate(place);
        rows.extractor.counts().skip(place, problem, &text);
    }
    rows.finish();
    Ok(())
}

fn read_error(path: &Path, source: io::Error) -> CorpusError {
    CorpusError::Io { file: path.to_owned(), doing: "read", source }
}

/// Enough of a malformed record for the report.
fn excerpt(text: &[u8]) -> Vec<u8> {
    text[..text.len().min(1024)].to_vec()
}

/// One row; if it is malformed and bears Python's `NaN`, once more without.
fn row(rows: &mut Rows<'_>, bytes: &[u8], record: u64) -> Result<(), String> {
    let problem = match rows.json(bytes, record) {
        Ok(()) => return Ok(()),
        Err(problem) => problem,
    };
    if memchr::memmem::find(bytes, b"NaN").is_none() {
        return Err(problem);
    }
    rows.json(&nan_to_null(bytes), record).map_err(|_| problem)
}

/// `json.dump` in Python writes a missing number or label as `NaN`, which is
/// not JSON. Outside strings it becomes `null`.
fn nan_to_null(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 16);
    let (mut in_string, mut at) = (false, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if in_string => {
                out.extend_from_slice(&bytes[at..(at + 2).min(bytes.len())]);
                at += 2;
                continue;
            }
            b'"' => in_string = !in_string,
            b'N' if !in_string && bytes[at..].starts_with(b"NaN") => {
                out.extend_from_slice(b"null");
                at += 3;
                continue;
            }
            _ => {}
        }
        out.push(bytes[at]);
        at += 1;
    }
    out
}

fn ends_early(bytes: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(bytes).is_err_and(|e| e.is_eof())
}

fn truncated(
    path: &Path,
    end: super::Place,
    expected: &'static str,
    options: &ReadOptions,
    rows: &mut Rows<'_>,
) -> Result<(), CorpusError> {
    let counts: &mut Counts = rows.extractor.counts();
    if !options.allow_truncated {
        return Err(CorpusError::Truncated {
            file: path.to_owned(),
            record: end.record,
            line: end.line.unwrap_or(0),
            byte: counts.bytes,
            expected,
            complete: counts.records,
        });
    }
    counts.truncated = Some(end);
    Ok(())
}

/// Keys of an object, its values skipped.
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeysVisitor;
        impl<'de> Visitor<'de> for KeysVisitor {
            type Value = Keys;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Vec::new();
                while let Some((key, IgnoredAny)) = map.next_entry()? {
                    keys.push(key);
                }
                Ok(Keys(keys))
            }
        }
        deserializer.deserialize_map(KeysVisitor)
    }
}

/// Tells the shape from the keys of the first records.
pub(super) fn probe(path: &Path, container: Container) -> Result<Format, CorpusError> {
    let file = File::open(path).map_err(|source| CorpusError::Io {
        file: path.to_owned(),
        doing: "open",
        source,
    })?;
    let mut splitter =
        Splitter::new(file, framing(container), Limits { chunk: 64 << 10, ..Limits::default() });
    let mut found = None;
    for _ in 0..PROBED {
        let bytes = match splitter.next().map_err(|source| read_error(path, source))? {
            Piece::Value { bytes, .. } => bytes,
            Piece::Broken { .. } => continue,
            Piece::End if found.is_none() => {
                return Err(CorpusError::Empty { file: path.to_owned() });
            }
            Piece::Truncated { .. } | Piece::End => break,
        };
        let keys = serde_json::from_slice::<Keys>(bytes)
            .or_else(|_| serde_json::from_slice::<Keys>(&nan_to_null(bytes)));
        match keys {
            Ok(Keys(keys)) => match Format::of_keys(&keys) {
                Some(format) => return Ok(format),
                None => {
                    found =
                        found.or(Some(format!("the first object has the keys {}", keys.join(", "))))
                }
            },
            Err(e) => {
                found = found.or_else(|| Some(format!("the first record is no JSON object ({e})")))
            }
        }
    }
    Err(CorpusError::Unrecognised {
        file: path.to_owned(),
        found: found.unwrap_or_else(|| "it holds no whole record".to_owned()),
        expected: Format::expected(),
    })
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
