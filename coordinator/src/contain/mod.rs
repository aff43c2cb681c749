//! What a library's decoder does with a damaged file, made an error.
//!
//! Parquet's refuse most damage by errors, and some by a panic, or by reading on behind the
//! file's end for hours (found by `make fuzz`). Nothing of ours belongs in here: a panic of
//! our own is a bug to be seen.

mod footer;

use std::cell::Cell;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::file::reader::{ChunkReader, Length};

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body`, and gives its error, or its panic's words, as text. What `body` borrows is
/// not to be used again after an error.
pub(crate) fn contained<R, E: Display>(body: impl FnOnce() -> Result<R, E>) -> Result<R, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let others = take_hook();
        set_hook(Box::new(move |panic| {
            if !CONTAINED.get() {
                others(panic);
            }
        }));
    });
    CONTAINED.set(true);
    let ended = catch_unwind(AssertUnwindSafe(body));
    CONTAINED.set(false);
    match ended {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("its decoder gave up: {}", text.unwrap_or("it did not say why")))
        }
    }
}

/// The items of `iterator`, each made by [`contained`]; none after the first error.
pub(crate) fn items<T, E: Display>(
    iterator: impl Iterator<Item = Result<T, E>>,
) -> impl Iterator<Item = Result<T, String>> {
    let mut left = Some(iterator);
    std::iter::from_fn(move || {
        let iterator = left.as_mut()?;
        let item = contained(|| iterator.next().transpose());
        if item.is_err() {
            left = None;
        }
        item.transpose()
    })
}

/// A reader of the Parquet file's rows, once its footer is seen to be whole.
pub(crate) fn parquet(
    file: File,
    options: ArrowReaderOptions,
) -> Result<ParquetRecordBatchReaderBuilder<Ended>, String> {
    footer::check(&file)?;
    contained(|| ParquetRecordBatchReaderBuilder::try_new_with_options(Ended(file), options))
}

/// A Parquet file, behind whose end nothing can be read: the decoder skips what a damaged
/// header says is there, entry by entry, and takes the end for an empty entry.
pub(crate) struct Ended(File);

/// A part of it, in order.
pub(crate) struct Part(File);

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 if !buffer.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            read => Ok(read),
        }
    }
}

impl Length for Ended {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Ended {
    type T = BufReader<Part>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let mut file = self.0.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(BufReader::new(Part(file)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let end = start.checked_add(length as u64);
        if end.is_none_or(|end| end > self.len()) {
            return Err(parquet::errors::ParquetError::EOF(format!(
                "{length} bytes from {start} are not in a file of {}",
                self.len()
            )));
        }
        self.0.get_bytes(start, length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_behind_the_end() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"0123456789").unwrap();
        let file = Ended(file);
        let mut text = Vec::new();
        let error = file.get_read(7).unwrap().read_to_end(&mut text).unwrap_err();
        assert_eq!((error.kind(), text.as_slice()), (io::ErrorKind::UnexpectedEof, &b"789"[..]));
        assert_eq!(&file.get_bytes(7, 3).unwrap()[..], b"789");
        for (start, length) in [(7, 4), (11, 0), (u64::MAX, 1)] {
            assert!(file.get_bytes(start, length).is_err(), "{start} {length}");
        }
    }

    #[test]
    fn a_panic_is_an_error_and_the_end() {
        let numbers = [4_u32, 0, 2].into_iter().map(|n| Ok::<_, String>(8_u32.div_euclid(n)));
        let items: Vec<_> = items(numbers).collect();
        assert_eq!(items.len(), 2);
        assert_eq!(items[0], Ok(2));
        assert!(matches!(&items[1], Err(words) if words.contains("divide by zero")), "{items:?}");
        assert_eq!(contained(|| Err::<(), _>("torn")), Err("torn".to_owned()));
    }
}
