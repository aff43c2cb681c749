//! The write-ahead log beside the journal, as SQLite's file format has it: whether
//! it ends where it was left.
//!
//! SQLite reads the log up to the first frame that does not check, and says
//! nothing. So bits that flipped in the middle take the commits behind them away
//! in silence; this says so.
//!
//! ```text
//! header  magic, format, page size, checkpoint number, salts (8 bytes), checksum (8)
//! frame   page number, pages after a commit, salts, checksum, one page;  then the next
//! ```
//!
//! A frame's checksum goes on from the one before it. Frames with other salts are
//! left over from before the log was last begun anew.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use super::StoreError;

const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
/// The lowest bit says in which byte order checksums are taken.
const MAGIC: u32 = 0x377f_0682;

/// The byte from which the log at `path` holds what its own checksums refute:
/// it was cut or changed there, or a transaction was being written when its
/// process died. `None` where it ends well, or is not there.
///
/// # Errors
/// The operation that failed.
pub fn torn_at(path: &Path) -> Result<Option<u64>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StoreError::io("open", path)(e)),
    };
    scan(BufReader::with_capacity(1 << 20, file)).map_err(StoreError::io("read", path))
}

fn scan(mut file: impl Read) -> io::Result<Option<u64>> {
    let mut header = [0; HEADER];
    match fill(&mut file, &mut header)? {
        0 => return Ok(None),
        HEADER => {}
        _ => return Ok(Some(0)),
    }
    let word = |at: usize| be_word(&header[at..]);
    let big_endian = word(0) & 1 == 1;
    let mut sum = checksum(big_endian, [0, 0], &header[..24]);
    let page = word(8) as usize;
    if word(0) & !1 != MAGIC || sum != [word(24), word(28)] || !(512..=65536).contains(&page) {
        return Ok(Some(0));
    }
    let salts = [word(16), word(20)];
    let mut frame = vec![0; FRAME_HEADER + page];
    let mut at = HEADER as u64;
    let mut leftovers_from = None;
    loop {
        let read = fill(&mut file, &mut frame)?;
        if read == 0 {
            return Ok(None);
        }
        let found = [be_word(&frame[8..]), be_word(&frame[12..])];
        if let Some(first) = leftovers_from {
            if read == frame.len() && found == salts {
                return Ok(Some(first));
            }
        } else {
            if read < frame.len() {
                return Ok(Some(at));
            }
            let with_header = checksum(big_endian, sum, &frame[..8]);
            sum = checksum(big_endian, with_header, &frame[FRAME_HEADER..]);
            if found != salts || sum != [be_word(&frame[16..]), be_word(&frame[20..])] {
                // Half of today's salts are not those of another day.
                if found[0] == salts[0] || found[1] == salts[1] {
                    return Ok(Some(at));
                }
                leftovers_from = Some(at);
            }
        }
        at += read as u64;
    }
}

/// SQLite's running sum over pairs of words; `bytes` are a multiple of eight.
fn checksum(big_endian: bool, mut sum: [u32; 2], bytes: &[u8]) -> [u32; 2] {
    let (pairs, _) = bytes.as_chunks::<8>();
    for &[a, b, c, d, e, f, g, h] in pairs {
        let (first, second) = ([a, b, c, d], [e, f, g, h]);
        let [first, second] = [first, second]
            .map(|w| if big_endian { u32::from_be_bytes(w) } else { u32::from_le_bytes(w) });
        sum[0] = sum[0].wrapping_add(first).wrapping_add(sum[1]);
        sum[1] = sum[1].wrapping_add(second).wrapping_add(sum[0]);
    }
    sum
}

fn be_word(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |word| u32::from_be_bytes(*word))
}

/// Reads until `buffer` is full or the file ends; how much it was.
fn fill(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::super::tests::{commit, journal};
    use super::super::{CommittedPhase, Journal};
    use super::*;

    /// A log of SQLite's own, with some commits in it.
    fn log() -> Vec<u8> {
        let (dir, mut journal) = journal();
        for k in 0..6 {
            journal.commit(&commit(k, CommittedPhase::Prepared, None)).unwrap();
        }
        fs::read(dir.path().join("journal.sqlite-wal")).unwrap()
    }

    #[test]
    fn a_log_as_sqlite_writes_it_ends_well() {
        assert_eq!(torn_at(Path::new("/nonexistent/journal.sqlite-wal")).unwrap(), None);
        assert_eq!(scan(&[][..]).unwrap(), None);
        let log = log();
        assert!(log.len() > 6 * 4096);
        assert_eq!(scan(&log[..]).unwrap(), None);
    }

    #[test]
    fn each_flipped_bit_and_each_cut_inside_a_frame_are_placed() {
        let log = log();
        let frame = FRAME_HEADER + 4096;
        assert_eq!((log.len() - HEADER) % frame, 0);
        // Odd steps, so that every field of header and frames has its turn.
        for at in (0..log.len()).step_by(13) {
            let mut flipped = log.clone();
            flipped[at] ^= 1 << (at % 8);
            let begins = if at < HEADER { 0 } else { at - (at - HEADER) % frame };
            assert_eq!(scan(&flipped[..]).unwrap(), Some(begins as u64), "bit of byte {at}");
            let whole = at >= HEADER && (at - HEADER).is_multiple_of(frame);
            let cut = (!whole && at > 0).then_some(begins as u64);
            assert_eq!(scan(&log[..at]).unwrap(), cut, "cut at byte {at}");
        }
    }

    #[test]
    fn what_was_left_over_when_the_log_began_anew_is_no_damage() {
        let (dir, mut journal) = journal();
        for k in 0..6 {
            journal.commit(&commit(k, CommittedPhase::Prepared, None)).unwrap();
        }
        // Moves all pages into the database; the next commit begins the log anew.
        journal.connection.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(())).unwrap();
        journal.commit(&commit(7, CommittedPhase::Prepared, None)).unwrap();
        let path = dir.path().join("journal.sqlite-wal");
        assert_eq!(torn_at(&path).unwrap(), None);
        // All its frames are of today but the leftovers, so a flip in the first is told.
        let mut log = fs::read(&path).unwrap();
        log[HEADER + 200] ^= 4;
        assert_eq!(scan(&log[..]).unwrap(), Some(HEADER as u64));
        drop(journal);
        Journal::open(&dir.path().join("journal.sqlite")).unwrap();
    }
}
