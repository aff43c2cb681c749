//! What a file holds, told from its first bytes and records, never its name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Shape of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// One utterance a record, as WildFeedback's `sat_dsat_annotation`:
    /// `UtterranceId` (0 opens a conversation), `Role`, `Content`,
    /// `Satisfaction`, `Disatisfaction`. Gives DSAT and SAT samples and seed
    /// pairs.
    Utterances,
    /// One pair a record: `chosen` and `rejected`, each a reply, or the whole
    /// conversation up to it, and their context in `conversations` or
    /// `prompt`. WildFeedback's `wildfeedback`, `ultrafeedback_binarized`.
    /// Gives seed pairs.
    Pairs,
    /// One dissatisfying reply a record, as the paper's `dsat_data.jsonl`:
    /// `prompt`, `rejected`, `user_preference`. Gives DSAT samples.
    Dsat,
    /// One conversation a record:
    /// `{"messages": [{"role", "content", "label": "dsat" | "sat" | "mixed" | null}]}`,
    /// the label on user turns, judging the reply before it. The list may also
    /// be called `conversation` (WildChat, which has no labels) or
    /// `conversations`. Gives DSAT and SAT samples and seed pairs.
    Messages,
}

impl Format {
    /// All of them, in the order in which they are tried.
    pub const ALL: [Format; 4] =
        [Format::Utterances, Format::Dsat, Format::Pairs, Format::Messages];

    /// The name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Format::Utterances => "utterances",
            Format::Pairs => "pairs",
            Format::Dsat => "dsat",
            Format::Messages => "messages",
        }
    }

    /// Each of these groups needs one key for a record to be of this shape.
    fn keys(self) -> &'static [&'static [&'static str]] {
        match self {
            Format::Utterances => &[&["UtterranceId", "UtteranceId"], &["Role"], &["Content"]],
            Format::Dsat => &[&["prompt"], &["rejected"], &["user_preference"]],
            Format::Pairs => &[&["chosen"], &["rejected"]],
            Format::Messages => &[&["messages", "conversation", "conversations"]],
        }
    }

    /// The shape of a record with these keys, if it is a known one.
    pub(super) fn of_keys<S: AsRef<str>>(keys: &[S]) -> Option<Format> {
        let has = |key: &&str| keys.iter().any(|k| k.as_ref() == *key);
        Format::ALL.into_iter().find(|format| format.keys().iter().all(|any| any.iter().any(has)))
    }

    /// All shapes and the keys that tell them, for messages.
    pub(super) fn expected() -> String {
        let one = |format: Format| {
            let keys: Vec<String> = format.keys().iter().map(|any| any.join(" or ")).collect();
            format!("{} ({})", format.name(), keys.join(", "))
        };
        Format::ALL.map(one).join("; ")
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Format::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            format!(
                "unknown corpus format `{name}`, expected one of: {}",
                Format::ALL.map(Format::name).join(", ")
            )
        })
    }
}

/// How records are framed in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Container {
    /// One JSON array, pretty-printed or compact.
    JsonArray,
    /// One JSON object a line.
    JsonLines,
    /// JSON objects one after another, each over several lines.
    JsonSequence,
    /// Parquet.
    Parquet,
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Container::JsonArray => "JSON array",
            Container::JsonLines => "JSON lines",
            Container::JsonSequence => "JSON objects",
            Container::Parquet => "Parquet",
        })
    }
}

/// What the first bytes of a file say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    Container(Container),
    Empty,
    /// A known encoding that is not read, and the command that undoes it.
    Encoded(&'static str, &'static str),
    /// Something else, which begins with this byte.
    Unknown(u8),
}

/// Byte-order mark of UTF-8.
pub(super) const BOM: &[u8] = b"\xef\xbb\xbf";

/// Reads the container off the file's first bytes (some KiB, or all of it).
pub(super) fn head(bytes: &[u8]) -> Head {
    match bytes {
        [b'P', b'A', b'R', b'1', ..] => return Head::Container(Container::Parquet),
        [0x1f, 0x8b, ..] => return Head::Encoded("compressed with gzip", "unpack it with gunzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            return Head::Encoded("compressed with zstd", "unpack it with unzstd");
        }
        [b'P', b'K', 3, 4, ..] => return Head::Encoded("a ZIP archive", "unpack it with unzip"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            return Head::Encoded("UTF-16", "convert it with iconv -f UTF-16 -t UTF-8");
        }
        _ => {}
    }
    let text = bytes.strip_prefix(BOM).unwrap_or(bytes).trim_ascii_start();
    match text.first() {
        None => Head::Empty,
        Some(b'[') => Head::Container(Container::JsonArray),
        Some(b'{') => {
            // A line that ends where its object may end is a record; a line
            // that is only `{` or `{"prompt": [` opens one.
            let line = memchr::memchr(b'\n', text).map(|end| text[..end].trim_ascii_end());
            let whole = line.is_none_or(|line| line.ends_with(b"}"));
            Head::Container(if whole { Container::JsonLines } else { Container::JsonSequence })
        }
        Some(&other) => Head::Unknown(other),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_told_by_content() {
        let container = |bytes: &[u8]| match head(bytes) {
            Head::Container(container) => container,
            other => panic!("{other:?}"),
        };
        assert_eq!(container(b"PAR1\x15\x04"), Container::Parquet);
        assert_eq!(container(b"\xef\xbb\xbf \r\n[{"), Container::JsonArray);
        assert_eq!(container(b"{\"a\": 1}\r\n{\"a\": 2}\r\n"), Container::JsonLines);
        assert_eq!(container(b"{\"a\": \"a line longer than the head"), Container::JsonLines);
        assert_eq!(container(b"{\n  \"a\": 1\n}\n{\n"), Container::JsonSequence);
        assert_eq!(head(b" \n\t"), Head::Empty);
        assert_eq!(head(b"prompt,rejected\n"), Head::Unknown(b'p'));
        assert!(matches!(head(&[0x1f, 0x8b, 8]), Head::Encoded("compressed with gzip", _)));
        assert!(matches!(head(&[0xff, 0xfe, b'[']), Head::Encoded("UTF-16", _)));
    }

    #[test]
    fn shapes_are_told_by_keys() {
        let of = |keys: &[&str]| Format::of_keys(keys);
        assert_eq!(of(&["UtterranceId", "TurnId", "Role", "Content"]), Some(Format::Utterances));
        assert_eq!(of(&["conversations", "chosen", "rejected"]), Some(Format::Pairs));
        // Has `messages` too, and is still a table of pairs.
        assert_eq!(of(&["prompt", "chosen", "rejected", "messages"]), Some(Format::Pairs));
        assert_eq!(of(&["prompt", "rejected", "user_preference"]), Some(Format::Dsat));
        assert_eq!(of(&["conversation_hash", "conversation"]), Some(Format::Messages));
        assert_eq!(of(&["prompt", "completion"]), None);
    }

    #[test]
    fn names_go_there_and_back() {
        for format in Format::ALL {
            assert_eq!(format.name().parse(), Ok(format));
            assert_eq!(serde_json::to_string(&format).unwrap(), format!("\"{}\"", format.name()));
        }
        assert!(
            "parquet".parse::<Format>().unwrap_err().contains("utterances, dsat, pairs, messages")
        );
    }
}
