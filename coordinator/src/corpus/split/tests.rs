#![allow(clippy::unwrap_used)]

use std::io::{self, Read};

use proptest::prelude::*;
use serde_json::Value;

use super::*;

/// Hands out the bytes in pieces of the given sizes, over and over.
struct Pieces<'b> {
    bytes: &'b [u8],
    sizes: Vec<usize>,
    next: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = self.sizes[self.next % self.sizes.len()].min(buffer.len()).min(self.bytes.len());
        self.next += 1;
        let (now, later) = self.bytes.split_at(size);
        buffer[..size].copy_from_slice(now);
        self.bytes = later;
        Ok(size)
    }
}

/// What a splitter says, in words that are easy to compare.
fn say(bytes: &[u8], framing: Framing, sizes: &[usize], limits: Limits) -> Vec<String> {
    let reader = Pieces { bytes, sizes: sizes.to_vec(), next: 0 };
    let mut splitter = Splitter::new(reader, framing, limits);
    let mut said = Vec::new();
    loop {
        let (place, text) = match splitter.next().unwrap() {
            Piece::Value { bytes, .. } => {
                said.push(String::from_utf8_lossy(bytes).into_owned());
                continue;
            }
            Piece::Broken { place, problem, .. } => (place, format!("broken: {problem}")),
            Piece::Truncated { end, expected } => (end, format!("truncated: expected {expected}")),
            Piece::End => return said,
        };
        let last = text.starts_with("truncated");
        let place = splitter.locate(place);
        said.push(format!("{text} @ {} line {}", place.byte.unwrap(), place.line.unwrap()));
        if last {
            return said;
        }
    }
}

/// The same whatever the sizes of the reads; that is asserted here.
fn split(text: &str, framing: Framing) -> Vec<String> {
    let limits = Limits { chunk: 8, value: 4096, suspicious: 64 };
    let whole = say(text.as_bytes(), framing, &[1 << 20], Limits { chunk: 1 << 20, ..limits });
    for sizes in [&[1][..], &[7, 1, 3], &[4096]] {
        assert_eq!(say(text.as_bytes(), framing, sizes, limits), whole, "sizes {sizes:?}");
    }
    whole
}

#[test]
fn brackets_and_quotes_inside_strings_do_not_count() {
    let text = r#"[{"a": "}]{[,\" \\"}, {"b\\\"": ["]", "\\\\"]}, "x\\", 12, null]"#;
    let values =
        [r#"{"a": "}]{[,\" \\"}"#, r#"{"b\\\"": ["]", "\\\\"]}"#, r#""x\\""#, "12", "null"];
    assert_eq!(split(text, Framing::Array), values);
}

#[test]
fn unicode_that_spans_reads_stays_whole() {
    let text = "[{\"a\": \"żółć 漢字 👩‍🚀\"}, {\"a\": \"é\"}]";
    assert_eq!(split(text, Framing::Array), ["{\"a\": \"żółć 漢字 👩‍🚀\"}", "{\"a\": \"é\"}"]);
}

#[test]
fn byte_order_mark_crlf_and_empty_arrays() {
    assert_eq!(
        split("\u{feff}\r\n[\r\n{\"a\":\r\n1}\r\n,\r\n{}\r\n]\r\n", Framing::Array),
        ["{\"a\":\r\n1}", "{}"]
    );
    assert_eq!(split(" [ ] ", Framing::Array), Vec::<String>::new());
    assert_eq!(
        split("\u{feff}{\"a\":1}\r\n\r\n{\"a\":2}", Framing::Lines),
        ["{\"a\":1}", "{\"a\":2}"]
    );
    assert_eq!(
        split("{\n\"a\":1\n}\n{\n\"a\":2}\n", Framing::Sequence),
        ["{\n\"a\":1\n}", "{\n\"a\":2}"]
    );
}

#[test]
fn a_cut_file_says_where_it_ends() {
    assert_eq!(
        split("[{\"a\": 1},\n{\"a\": \"half", Framing::Array),
        ["{\"a\": 1}", "truncated: expected the rest of the record @ 22 line 2"]
    );
    for cut in ["[{\"a\": 1}", "[{\"a\": 1},"] {
        let said = split(cut, Framing::Array);
        assert!(
            said[1].starts_with("truncated: expected the next record or the closing `]`"),
            "{said:?}"
        );
    }
}

#[test]
fn a_missing_bracket_or_quote_costs_one_record() {
    for broken in [
        r#"{"id": 1, "t": "x""#,
        r#"{"id": 1, "t": "x}"#,
        r#"{"id": 1, "t": [[}"#,
        r#"{"id": 1, "t": x"}"#,
        r#"{"id": 1, "t": 2]"#,
    ] {
        let text = format!("[{{\"id\": 0}},\n{broken},\n{{\"id\": 2}},\n{{\"id\": 3}}]");
        let said = split(&text, Framing::Array);
        let rest: Vec<_> = said.iter().filter(|said| said.starts_with('{')).collect();
        assert_eq!(rest[0], "{\"id\": 0}", "{said:?}");
        assert!(
            rest.ends_with(&[&"{\"id\": 2}".to_owned(), &"{\"id\": 3}".to_owned()]),
            "{said:?}"
        );
        assert!(
            said[1].contains("a bracket or quote in it is missing")
                && said[1].ends_with("@ 12 line 2"),
            "{said:?}"
        );
    }
}

#[test]
fn garbage_between_records_is_passed_over() {
    let said = split("[{\"id\": 0}, \"id\": 1}, {\"id\": 2}]", Framing::Array);
    // The stray string is a value by itself; its parser will refuse it.
    assert_eq!(said[0], "{\"id\": 0}");
    assert_eq!(said[1], "\"id\"");
    assert!(said[2].starts_with("broken: expected `,` and the next record"), "{said:?}");
    assert_eq!(said[3], "{\"id\": 2}");

    let said = split("[{\"id\": 0}]\n[{\"id\": 1}]", Framing::Array);
    assert!(said[1].starts_with("broken: expected the end of the file"), "{said:?}");
    assert_eq!(said[2], "{\"id\": 1}");
}

#[test]
fn a_value_beyond_the_bound_is_dropped_and_memory_stays_bounded() {
    let huge = "x".repeat(10_000);
    let text = format!("[{{\"id\": 0}}, {{\"id\": 1, \"t\": \"{huge}\"}}, {{\"id\": 2}}]");
    let limits = Limits { chunk: 8, value: 512, suspicious: 64 };
    let reader = Pieces { bytes: text.as_bytes(), sizes: vec![8], next: 0 };
    let mut splitter = Splitter::new(reader, Framing::Array, limits);
    let mut values = Vec::new();
    loop {
        match splitter.next().unwrap() {
            Piece::Value { bytes, .. } => values.push(String::from_utf8(bytes.to_vec()).unwrap()),
            Piece::Broken { problem, .. } => values.push(problem.to_owned()),
            Piece::Truncated { expected, .. } => panic!("{expected}"),
            Piece::End => break,
        }
        assert!(splitter.window.capacity() <= 2048, "{}", splitter.window.capacity());
    }
    assert_eq!(values, ["{\"id\": 0}", "larger than 64 MiB", "{\"id\": 2}"]);

    let lines = format!("{{\"id\": 0}}\n\"{huge}\"\n{{\"id\": 2}}\n");
    let said = say(lines.as_bytes(), Framing::Lines, &[8], limits);
    assert_eq!(said, ["{\"id\": 0}", "broken: larger than 64 MiB @ 10 line 2", "{\"id\": 2}"]);
}

fn json() -> impl Strategy<Value = Value> {
    let text = || "[\\[\\]{}\",:\\\\/a\\n\\té漢👩 ]{0,12}";
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::hash_map(text(), inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Cutting and then parsing equals parsing, for any values and any reads.
    #[test]
    fn splitting_equals_parsing(
        values in prop::collection::vec(json(), 0..8),
        sizes in prop::collection::vec(1usize..40, 1..6),
        chunk in 1usize..64,
        pretty in any::<bool>(),
    ) {
        let write = if pretty { serde_json::to_string_pretty::<Value> } else { serde_json::to_string::<Value> };
        let limits = Limits { chunk, value: 1 << 20, suspicious: 1 << 20 };
        let parse = |said: Vec<String>| -> Vec<Value> {
            said.iter().map(|text| serde_json::from_str(text).unwrap()).collect()
        };

        let array = write(&Value::from(values.clone())).unwrap();
        prop_assert_eq!(&parse(say(array.as_bytes(), Framing::Array, &sizes, limits)), &values);

        let sequence: String = values.iter().map(|value| write(value).unwrap() + "\n").collect();
        prop_assert_eq!(&parse(say(sequence.as_bytes(), Framing::Sequence, &sizes, limits)), &values);

        let lines: String = values.iter().map(|value| value.to_string() + "\r\n").collect();
        prop_assert_eq!(&parse(say(lines.as_bytes(), Framing::Lines, &sizes, limits)), &values);
    }

    /// Any bytes at all: no panic, no endless loop.
    #[test]
    fn noise_ends(noise in "[\\[\\]{}\",:\\\\a1 \\n]{0,200}", sizes in prop::collection::vec(1usize..9, 1..4)) {
        let limits = Limits { chunk: 4, value: 64, suspicious: 16 };
        for framing in [Framing::Array, Framing::Sequence, Framing::Lines] {
            prop_assert!(say(noise.as_bytes(), framing, &sizes, limits).len() <= noise.len() + 1);
        }
    }
}
