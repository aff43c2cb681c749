//! Methods of Python's strings, where Rust's nearest relatives differ.
//!
//! `minijinja-contrib` covers most of what templates call; what it lacks, or
//! does by Rust's idea of white space, is answered here first.

use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Called for a method that a value itself does not have.
pub(crate) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str())
        && let Some(result) = string_method(text, name, args)
    {
        return result;
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let result = match name {
        "strip" => one_optional(args).map(|set| strip(text, set.as_deref(), true, true).into()),
        "lstrip" => one_optional(args).map(|set| strip(text, set.as_deref(), true, false).into()),
        "rstrip" => one_optional(args).map(|set| strip(text, set.as_deref(), false, true).into()),
        "split" => split_arguments(args)
            .and_then(|(separator, limit)| split(text, separator.as_deref(), limit)),
        "rsplit" => split_arguments(args)
            .and_then(|(separator, limit)| rsplit(text, separator.as_deref(), limit)),
        "splitlines" => split_lines(text, args),
        "removeprefix" => {
            one(args).map(|prefix| text.strip_prefix(prefix.as_str()).unwrap_or(text).into())
        }
        "removesuffix" => {
            one(args).map(|suffix| text.strip_suffix(suffix.as_str()).unwrap_or(text).into())
        }
        "partition" => one(args).map(|separator| match text.split_once(separator.as_str()) {
            Some((before, after)) => Value::from((before, separator, after)),
            None => Value::from((text, "", "")),
        }),
        "rpartition" => one(args).map(|separator| match text.rsplit_once(separator.as_str()) {
            Some((before, after)) => Value::from((before, separator, after)),
            None => Value::from(("", "", text)),
        }),
        "title" => from_args::<()>(args).map(|()| title(text).into()),
        _ => return None,
    };
    Some(result)
}

/// White space by `str.isspace`: Unicode's, and four control characters besides.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.strip`, `lstrip` and `rstrip`: of white space, or of the characters in `set`.
pub(crate) fn strip<'a>(text: &'a str, set: Option<&str>, start: bool, end: bool) -> &'a str {
    let gone = |c: char| set.map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if start { text.trim_start_matches(gone) } else { text };
    if end { text.trim_end_matches(gone) } else { text }
}

/// `str.title`: a letter is a capital unless a letter stands before it.
fn title(text: &str) -> String {
    let mut after_letter = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if after_letter {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        after_letter = c.is_alphabetic();
    }
    out
}

/// The `length` filter: as `len`, by which an undefined value is empty.
pub(crate) fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| {
        let kind = value.kind();
        Error::new(ErrorKind::InvalidOperation, format!("a value of kind {kind} has no length"))
    })
}

/// The `trim` filter, which is `str.strip`.
pub(crate) fn trim(value: &Value, set: Option<String>) -> Value {
    strip(&value.to_string(), set.as_deref(), true, true).into()
}

/// A Python list of strings.
fn list(pieces: Vec<&str>) -> Value {
    pieces.into_iter().map(Value::from).collect()
}

fn one(args: &[Value]) -> Result<String, Error> {
    let (text,): (String,) = from_args(args)?;
    Ok(text)
}

fn one_optional(args: &[Value]) -> Result<Option<String>, Error> {
    let (text,): (Option<String>,) = from_args(args)?;
    Ok(text)
}

/// Separator and number of splits, by place or by name; no limit below zero.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (separator, limit, named): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => named.get::<Option<String>>("sep")?,
    };
    let limit = match limit {
        Some(limit) => Some(limit),
        None => named.get::<Option<i64>>("maxsplit")?,
    };
    named.assert_all_used()?;
    if separator.as_deref() == Some("") {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok((separator, limit.and_then(|limit| usize::try_from(limit).ok())))
}

fn split(text: &str, separator: Option<&str>, limit: Option<usize>) -> Result<Value, Error> {
    let pieces: Vec<&str> = match (separator, limit) {
        (Some(separator), None) => text.split(separator).collect(),
        (Some(separator), Some(limit)) => text.splitn(limit + 1, separator).collect(),
        (None, limit) => {
            let mut pieces = Vec::new();
            let mut rest = text.trim_start_matches(is_space);
            while !rest.is_empty() {
                let end =
                    rest.find(is_space).filter(|_| limit.is_none_or(|limit| pieces.len() < limit));
                let Some(end) = end else {
                    // The last piece keeps the space inside it; with a limit, its end too.
                    pieces.push(rest);
                    break;
                };
                pieces.push(&rest[..end]);
                rest = rest[end..].trim_start_matches(is_space);
            }
            pieces
        }
    };
    Ok(list(pieces))
}

fn rsplit(text: &str, separator: Option<&str>, limit: Option<usize>) -> Result<Value, Error> {
    let mut pieces: Vec<&str> = match (separator, limit) {
        (_, None) => return split(text, separator, None),
        (Some(separator), Some(limit)) => text.rsplitn(limit + 1, separator).collect(),
        (None, Some(limit)) => {
            let mut pieces = Vec::new();
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                let cut = rest.char_indices().rev().find(|&(_, c)| is_space(c));
                let Some((at, c)) = cut.filter(|_| pieces.len() < limit) else {
                    pieces.push(rest);
                    break;
                };
                pieces.push(&rest[at + c.len_utf8()..]);
                rest = rest[..at].trim_end_matches(is_space);
            }
            pieces
        }
    };
    pieces.reverse();
    Ok(list(pieces))
}

/// `str.splitlines`, which knows ten line ends and `\r\n`.
fn split_lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep_ends, named): (Option<bool>, Kwargs) = from_args(args)?;
    let keep_ends = keep_ends.or(named.get::<Option<bool>>("keepends")?).unwrap_or(false);
    named.assert_all_used()?;
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(is_end) else {
            lines.push(rest);
            break;
        };
        let width = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(&rest[..if keep_ends { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    Ok(list(lines))
}
