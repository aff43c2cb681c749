//! A growing, sliding view of a stream: `[mark .. cursor .. end]`.

use std::io::{self, Read};

use crate::corpus::counts::Place;
use crate::corpus::format::BOM;

/// Bytes from the mark on are held; those before it are forgotten at need.
pub(super) struct Window<R> {
    reader: R,
    buffer: Vec<u8>,
    chunk: usize,
    mark: usize,
    cursor: usize,
    end: usize,
    /// Bytes and line feeds of the stream before the buffer's first byte.
    forgotten: u64,
    forgotten_lines: u64,
}

impl<R: Read> Window<R> {
    pub(super) fn new(reader: R, chunk: usize) -> Self {
        let buffer = vec![0; chunk.max(1) * 2];
        let chunk = chunk.max(1);
        Self { reader, buffer, chunk, mark: 0, cursor: 0, end: 0, forgotten: 0, forgotten_lines: 0 }
    }

    /// Bytes of the stream before the cursor.
    pub(super) fn offset(&self) -> u64 {
        self.forgotten + self.cursor as u64
    }

    /// Forgets what is before the cursor, when room is needed.
    pub(super) fn mark(&mut self) {
        self.mark = self.cursor;
    }

    pub(super) fn advance(&mut self, bytes: usize) {
        self.cursor += bytes;
        debug_assert!(self.cursor <= self.end);
    }

    /// Puts mark and cursor `bytes` behind the mark.
    pub(super) fn rewind(&mut self, bytes: usize) {
        self.mark += bytes;
        self.cursor = self.mark;
    }

    /// From the mark to the cursor.
    pub(super) fn marked(&self) -> &[u8] {
        &self.buffer[self.mark..self.cursor]
    }

    /// From the mark to all that is read.
    pub(super) fn marked_to_end(&self) -> &[u8] {
        &self.buffer[self.mark..self.end]
    }

    /// From the cursor to all that is read.
    pub(super) fn ahead(&self) -> &[u8] {
        &self.buffer[self.cursor..self.end]
    }

    /// Reads on behind what is read; false at the end of the stream.
    pub(super) fn fill(&mut self) -> io::Result<bool> {
        if self.buffer.len() - self.end < self.chunk {
            self.make_room();
        }
        let until = self.end + self.chunk;
        loop {
            match self.reader.read(&mut self.buffer[self.end..until]) {
                Ok(0) => return Ok(false),
                Ok(bytes) => {
                    self.end += bytes;
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads on only if nothing is ahead.
    pub(super) fn fill_some(&mut self) -> io::Result<()> {
        if self.ahead().is_empty() {
            self.fill()?;
        }
        Ok(())
    }

    fn make_room(&mut self) {
        let line_feeds = memchr::memchr_iter(b'\n', &self.buffer[..self.mark]).count();
        self.forgotten += self.mark as u64;
        self.forgotten_lines += line_feeds as u64;
        self.buffer.copy_within(self.mark..self.end, 0);
        self.cursor -= self.mark;
        self.end -= self.mark;
        self.mark = 0;
        if self.buffer.len() - self.end < self.chunk {
            // Doubling keeps the copies of a large value linear in its size.
            let length = (self.buffer.len() * 2).max(self.end + self.chunk);
            self.buffer.resize(length, 0);
        }
    }

    pub(super) fn skip_bom(&mut self) -> io::Result<()> {
        while self.end < BOM.len() && self.fill()? {}
        if self.ahead().starts_with(BOM) {
            self.advance(BOM.len());
        }
        Ok(())
    }

    /// Bytes of memory held.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.buffer.len()
    }

    /// The mark, as record `record`.
    pub(super) fn place(&self, record: u64) -> Place {
        self.place_at(record, self.mark)
    }

    /// The end of what is read, as record `record`.
    pub(super) fn end_place(&self, record: u64) -> Place {
        self.place_at(record, self.end)
    }

    fn place_at(&self, record: u64, at: usize) -> Place {
        Place { record, byte: Some(self.forgotten + at as u64), line: None }
    }

    /// Line of a byte that is still held, from 1.
    pub(super) fn line_of(&self, byte: u64) -> u64 {
        let at = usize::try_from(byte.saturating_sub(self.forgotten))
            .unwrap_or(usize::MAX)
            .min(self.end);
        self.forgotten_lines + memchr::memchr_iter(b'\n', &self.buffer[..at]).count() as u64 + 1
    }
}
