//! Finds the next record behind a broken one.

/// How records open: `{`, white space, and the key that the first record has
/// first. Writers keep the order of keys, so its neighbours open likewise; and
/// in a well-formed string a quote is escaped, so no text opens like this.
#[derive(Debug, Default)]
pub(super) struct Opening {
    /// The key with its quotes; `"` alone as long as no record was whole.
    quoted_key: Vec<u8>,
    learned: bool,
}

/// White space that is borne between `{` and the key, across reads.
const SPACE: usize = 256;

impl Opening {
    /// Takes the key from the first whole value that is a plain object.
    pub(super) fn learn(&mut self, value: &[u8]) {
        if self.learned {
            return;
        }
        let Some(inside) = value.strip_prefix(b"{") else { return };
        let inside = inside.trim_ascii_start();
        if !inside.starts_with(b"\"") {
            return;
        }
        let Some(length) = memchr::memchr(b'"', &inside[1..]) else { return };
        let candidate = Opening { quoted_key: inside[..length + 2].to_vec(), learned: true };
        // A record whose parts open like itself tells nothing.
        if !candidate.is_inside(value) {
            *self = candidate;
        }
    }

    /// Whether another record opens inside an unfinished one.
    pub(super) fn is_inside(&self, value: &[u8]) -> bool {
        self.learned && value.len() > 1 && self.find(&value[1..]).is_some()
    }

    /// The first place at which a record opens.
    pub(super) fn find(&self, bytes: &[u8]) -> Option<usize> {
        let key: &[u8] = if self.learned { &self.quoted_key } else { b"\"" };
        memchr::memmem::find_iter(bytes, key).find_map(|at| {
            let before = bytes[..at].trim_ascii_end();
            before.ends_with(b"{").then(|| before.len() - 1)
        })
    }

    /// Bytes at the end of a searched stretch in which an opening may begin.
    pub(super) fn overlap(&self) -> usize {
        self.quoted_key.len() + SPACE
    }
}
