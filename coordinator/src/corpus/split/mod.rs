//! Cuts a stream of JSON into its top-level values, without parsing them.
//!
//! A file of 1.6 GB is one array; a parser would have to swallow it whole, and
//! would give up at its first broken byte. The splitter only counts brackets
//! outside strings, holds one value at a time, and after a broken one looks for
//! the next that opens like its neighbours.

mod resync;
mod window;

use std::io::{self, Read};

use self::resync::Opening;
use self::window::Window;
use super::counts::Place;

/// How values are strung together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// `[value, value]`.
    Array,
    /// Values with white space between them.
    Sequence,
    /// One value a line.
    Lines,
}

/// Bounds of memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes asked of the reader at once.
    pub(super) chunk: usize,
    /// Bytes of the largest value.
    pub(super) value: usize,
    /// Bytes from which on an unfinished value is searched for its neighbour.
    pub(super) suspicious: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { chunk: 1 << 20, value: 64 << 20, suspicious: 256 << 10 }
    }
}

/// What comes next in the stream.
#[derive(Debug)]
pub(super) enum Piece<'b> {
    /// A value with balanced brackets: to be parsed.
    Value { place: Place, bytes: &'b [u8], last_line_is_open: bool },
    /// Bytes that are no value. Reading goes on behind them.
    Broken { place: Place, problem: &'static str, text: &'b [u8] },
    /// The stream ended too early. Nothing follows.
    Truncated { end: Place, expected: &'static str },
    /// The stream ended where it may. Nothing follows.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the array's `[`.
    Start,
    /// Where a value may begin.
    BeforeValue,
    /// Behind a value, where `,` or `]` may come.
    AfterValue,
    /// Behind the array's `]`.
    AfterArray,
    /// Behind something broken: look for a value that opens like the others.
    Lost,
    /// The end was told.
    Done,
}

/// Splits `reader` into values.
pub(super) struct Splitter<R> {
    window: Window<R>,
    framing: Framing,
    limits: Limits,
    state: State,
    record: u64,
    opening: Opening,
}

/// How the scan of one value ended.
enum Scan {
    /// Its last byte is before the window's cursor.
    Whole,
    /// The stream ended inside it.
    Ended,
    /// A second record opens inside it.
    Swallowed,
    /// A bracket closes one of the other kind.
    Mismatch,
    /// It passed the bound.
    TooLarge,
}

impl<R: Read> Splitter<R> {
    /// A splitter over a stream whose byte-order mark, if any, is still in it.
    pub(super) fn new(reader: R, framing: Framing, limits: Limits) -> Self {
        let state = if framing == Framing::Array { State::Start } else { State::BeforeValue };
        Self {
            window: Window::new(reader, limits.chunk),
            framing,
            limits,
            state,
            record: 0,
            opening: Opening::default(),
        }
    }

    /// The next piece. It borrows the buffer until the next call.
    pub(super) fn next(&mut self) -> io::Result<Piece<'_>> {
        if self.window.offset() == 0 {
            self.window.skip_bom()?;
        }
        if self.framing == Framing::Lines { self.next_line() } else { self.next_value() }
    }

    /// A place of the last piece, with its line. Counting line feeds for every
    /// value would cost more than it tells, so they are counted on demand.
    pub(super) fn locate(&self, place: Place) -> Place {
        Place { line: place.byte.map(|byte| self.window.line_of(byte)), ..place }
    }

    fn next_value(&mut self) -> io::Result<Piece<'_>> {
        loop {
            if self.state == State::Done {
                return Ok(Piece::End);
            }
            if self.state == State::Lost && !self.find_opening()? {
                return Ok(self.end());
            }
            let Some(byte) = self.skip_space()? else { return Ok(self.end()) };
            self.window.mark();
            match (self.state, byte) {
                (State::Start, b'[') => {
                    self.window.advance(1);
                    self.state = State::BeforeValue;
                }
                (State::AfterValue, b',') => {
                    self.window.advance(1);
                    self.state = State::BeforeValue;
                }
                // Also behind a trailing comma: no record is lost by it.
                (State::BeforeValue | State::AfterValue, b']')
                    if self.framing == Framing::Array =>
                {
                    self.window.advance(1);
                    self.state = State::AfterArray;
                }
                // A missing comma loses no record either.
                (State::AfterValue, b'{' | b'[') => self.state = State::BeforeValue,
                (State::BeforeValue, b',' | b':' | b']' | b'}') => {
                    return self.broken("expected a record");
                }
                (State::BeforeValue, first) => return self.value(first),
                (State::AfterArray, _) => {
                    return self.broken("expected the end of the file after the closing `]`");
                }
                _ => return self.broken("expected `,` and the next record, or the closing `]`"),
            }
        }
    }

    /// One value, the window's mark at its first byte.
    fn value(&mut self, first: u8) -> io::Result<Piece<'_>> {
        let start = self.window.place(self.record);
        let scan = match first {
            b'{' | b'[' | b'"' => self.scan_nested()?,
            _ => self.scan_scalar()?,
        };
        self.record += 1;
        match scan {
            Scan::Whole => {
                self.opening.learn(self.window.marked());
                self.state = if self.framing == Framing::Array {
                    State::AfterValue
                } else {
                    State::BeforeValue
                };
                Ok(Piece::Value {
                    place: start,
                    bytes: self.window.marked(),
                    last_line_is_open: false,
                })
            }
            Scan::Swallowed | Scan::Mismatch => {
                self.window.rewind(1);
                self.state = State::Lost;
                Ok(Piece::Broken {
                    place: start,
                    problem: "a bracket or quote in it is missing, or one too many",
                    text: self.window.ahead(),
                })
            }
            Scan::TooLarge => {
                self.state = State::Lost;
                Ok(Piece::Broken {
                    place: start,
                    problem: "larger than 64 MiB",
                    text: self.window.marked(),
                })
            }
            Scan::Ended => {
                self.state = State::Done;
                let end = self.window.end_place(self.record - 1);
                Ok(Piece::Truncated { end, expected: "the rest of the record" })
            }
        }
    }

    fn scan_nested(&mut self) -> io::Result<Scan> {
        let mut nesting = Nesting::default();
        let mut suspicious = self.limits.suspicious;
        loop {
            let scanned = self.window.marked().len();
            let (at, stop) = nesting.scan(self.window.marked_to_end(), scanned);
            self.window.advance(at - scanned);
            match stop {
                Stop::More => {}
                Stop::Whole => return Ok(Scan::Whole),
                Stop::Mismatch => return Ok(Scan::Mismatch),
            }
            let more = self.window.fill()?;
            let length = self.window.marked().len();
            if (!more || length >= suspicious) && self.opening.is_inside(self.window.marked()) {
                return Ok(Scan::Swallowed);
            }
            if !more {
                return Ok(Scan::Ended);
            }
            if length >= suspicious {
                suspicious = length * 2;
            }
            if length > self.limits.value {
                return Ok(Scan::TooLarge);
            }
        }
    }

    /// A number, `true`, `false`, `null`, or what looks like one.
    fn scan_scalar(&mut self) -> io::Result<Scan> {
        loop {
            let ahead = self.window.ahead();
            let ends = |byte: &u8| {
                matches!(byte, b',' | b']' | b'}' | b'{' | b'[' | b'"')
                    || byte.is_ascii_whitespace()
            };
            if let Some(length) = ahead.iter().position(ends) {
                self.window.advance(length);
                return Ok(Scan::Whole);
            }
            self.window.advance(ahead.len());
            if !self.window.fill()? {
                return Ok(if self.framing == Framing::Array { Scan::Ended } else { Scan::Whole });
            }
            if self.window.marked().len() > self.limits.value {
                return Ok(Scan::TooLarge);
            }
        }
    }

    fn next_line(&mut self) -> io::Result<Piece<'_>> {
        loop {
            if self.state == State::Lost {
                self.skip_line()?;
                self.state = State::BeforeValue;
            }
            self.window.mark();
            let place = self.window.place(self.record);
            let ended = self.scan_line()?;
            let empty = self.window.marked().trim_ascii().is_empty();
            match ended {
                Scan::TooLarge => {
                    self.record += 1;
                    self.state = State::Lost;
                    return Ok(Piece::Broken {
                        place,
                        problem: "larger than 64 MiB",
                        text: self.window.marked(),
                    });
                }
                Scan::Ended if empty => return Ok(Piece::End),
                _ => self.record += 1,
            }
            if !empty {
                let last_line_is_open = matches!(ended, Scan::Ended);
                return Ok(Piece::Value {
                    place,
                    bytes: self.window.marked().trim_ascii(),
                    last_line_is_open,
                });
            }
        }
    }

    /// Moves behind the next line feed.
    fn scan_line(&mut self) -> io::Result<Scan> {
        loop {
            let ahead = self.window.ahead();
            if let Some(length) = memchr::memchr(b'\n', ahead) {
                self.window.advance(length + 1);
                return Ok(Scan::Whole);
            }
            self.window.advance(ahead.len());
            if self.window.marked().len() > self.limits.value {
                return Ok(Scan::TooLarge);
            }
            if !self.window.fill()? {
                return Ok(Scan::Ended);
            }
        }
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            self.window.mark();
            match self.scan_line()? {
                Scan::TooLarge => {}
                _ => return Ok(()),
            }
        }
    }

    /// Bytes at the mark that are no value: told, and left behind.
    fn broken(&mut self, problem: &'static str) -> io::Result<Piece<'_>> {
        let place = self.window.place(self.record);
        self.record += 1;
        self.state = State::Lost;
        // The culprit may itself open a record (`[` of a second array).
        self.window.advance(1);
        self.window.fill_some()?;
        Ok(Piece::Broken { place, problem, text: self.window.marked_to_end() })
    }

    /// The first byte that is not white space, at the cursor.
    fn skip_space(&mut self) -> io::Result<Option<u8>> {
        loop {
            let ahead = self.window.ahead();
            if let Some(space) = ahead.iter().position(|byte| !byte.is_ascii_whitespace()) {
                let byte = ahead[space];
                self.window.advance(space);
                return Ok(Some(byte));
            }
            self.window.advance(ahead.len());
            self.window.mark();
            if !self.window.fill()? {
                return Ok(None);
            }
        }
    }

    /// Moves the cursor to where a record opens like the others.
    fn find_opening(&mut self) -> io::Result<bool> {
        self.state = State::BeforeValue;
        loop {
            self.window.mark();
            if let Some(at) = self.opening.find(self.window.ahead()) {
                self.window.advance(at);
                return Ok(true);
            }
            let overlap = self.opening.overlap().min(self.window.ahead().len());
            self.window.advance(self.window.ahead().len() - overlap);
            self.window.mark();
            if !self.window.fill()? {
                // Perhaps only the closing bracket was behind it.
                let closed = self.window.ahead().trim_ascii_end().ends_with(b"]");
                self.state = if closed { State::AfterArray } else { State::AfterValue };
                self.window.advance(self.window.ahead().len());
                return Ok(false);
            }
        }
    }

    fn end(&mut self) -> Piece<'static> {
        let state = std::mem::replace(&mut self.state, State::Done);
        if self.framing == Framing::Sequence || state == State::AfterArray || state == State::Done {
            return Piece::End;
        }
        let end = self.window.end_place(self.record);
        Piece::Truncated { end, expected: "the next record or the closing `]`" }
    }
}

/// Brackets that are open, and whether the scan stands in a string.
#[derive(Default)]
struct Nesting {
    depth: u32,
    /// Kinds of the open brackets, the innermost in the lowest bit: 1 for `{`.
    kinds: u128,
    /// Deeper than `kinds` can tell, and than the parser goes: not checked.
    deep: bool,
    in_string: bool,
}

/// Why a scan stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// At the end of what is read.
    More,
    /// Behind the value's last byte.
    Whole,
    /// Behind a bracket that closes another kind.
    Mismatch,
}

impl Nesting {
    /// Scans `value` on from byte `at`; returns where it stopped, and why.
    /// `value` begins at the value's first byte, so a quote can look back at
    /// the backslashes before it.
    fn scan(&mut self, value: &[u8], mut at: usize) -> (usize, Stop) {
        while at < value.len() {
            if self.in_string {
                let Some(quote) = memchr::memchr(b'"', &value[at..]) else {
                    return (value.len(), Stop::More);
                };
                let quote = at + quote;
                let escapes =
                    value[..quote].iter().rev().take_while(|&&byte| byte == b'\\').count();
                at = quote + 1;
                if escapes % 2 == 0 {
                    self.in_string = false;
                    if self.depth == 0 {
                        return (at, Stop::Whole);
                    }
                }
                continue;
            }
            match value[at] {
                b'"' => self.in_string = true,
                b'{' => self.open(1),
                b'[' => self.open(0),
                b'}' | b']' => {
                    if !self.close(u128::from(value[at] == b'}')) {
                        return (at + 1, Stop::Mismatch);
                    }
                    if self.depth == 0 {
                        return (at + 1, Stop::Whole);
                    }
                }
                _ => {}
            }
            at += 1;
        }
        (at, Stop::More)
    }

    fn open(&mut self, kind: u128) {
        self.deep |= self.depth >= u128::BITS;
        self.depth = self.depth.saturating_add(1);
        self.kinds = self.kinds << 1 | kind;
    }

    fn close(&mut self, kind: u128) -> bool {
        let matches = self.deep || self.kinds & 1 == kind;
        self.depth -= 1;
        self.kinds >>= 1;
        matches
    }
}

#[cfg(test)]
mod tests;
