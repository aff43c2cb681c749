//! `{% generation %}` blocks: the one statement that Hugging Face adds to Jinja.
//!
//! They mark what an assistant wrote, for loss masks. Rendering them is
//! rendering their body in a scope of its own, which is what `{% with %}`
//! without variables does; so the two tag names are rewritten and all else,
//! whitespace control and line numbers included, stays as it is.

/// `source` with `generation` tags rewritten to `with`, and newlines made `\n`
/// as Jinja2 does before it reads a template.
pub(crate) fn rewrite(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let taken = match from.as_bytes().get(1) {
            Some(b'#') => copy(&mut out, from, from.find("#}").map(|end| end + 2)),
            Some(b'{') => copy(&mut out, from, tag_end(from, "}}")),
            Some(b'%') => statement(&mut out, from),
            _ => copy(&mut out, from, Some(1)),
        };
        rest = &from[taken..];
    }
    out.push_str(rest);
    out
}

/// Copies one `{% … %}`; a raw block is copied whole. Returns bytes consumed.
fn statement(out: &mut String, from: &str) -> usize {
    let name_at = from[2..]
        .find(|c: char| !(c.is_whitespace() || c == '-' || c == '+'))
        .map_or(from.len(), |offset| offset + 2);
    let name_len = from[name_at..]
        .find(|c: char| !(c.is_alphanumeric() || c == '_'))
        .unwrap_or(from.len() - name_at);
    let name = &from[name_at..name_at + name_len];
    if name == "raw" {
        return copy(out, from, raw_end(from));
    }
    let Some(end) = tag_end(from, "%}") else { return copy(out, from, None) };
    let replacement = match name {
        "generation" => "with",
        "endgeneration" => "endwith",
        other => other,
    };
    out.push_str(&from[..name_at]);
    out.push_str(replacement);
    out.push_str(&from[name_at + name_len..end]);
    end
}

/// Copies `from` up to `end`, or all of it where the tag is never closed (the
/// compiler then says so). Returns bytes consumed.
fn copy(out: &mut String, from: &str, end: Option<usize>) -> usize {
    let end = end.unwrap_or(from.len());
    out.push_str(&from[..end]);
    end
}

/// Where the `{% endraw %}` that closes the raw block at the start of `from` ends.
fn raw_end(from: &str) -> Option<usize> {
    let mut at = tag_end(from, "%}")?;
    loop {
        at += from[at..].find("{%")?;
        let name = from[at + 2..].trim_start_matches(['-', '+']).trim_start();
        if name.starts_with("endraw") {
            return Some(at + from[at..].find("%}")? + 2);
        }
        at += 2;
    }
}

/// Where the tag at the start of `from` ends, `close` included: closers inside
/// string literals and inside braces do not count.
fn tag_end(from: &str, close: &str) -> Option<usize> {
    let bytes = from.as_bytes();
    let mut depth = 0_usize;
    let mut at = 2;
    while at < bytes.len() {
        if depth == 0 && from.as_bytes()[at..].starts_with(close.as_bytes()) {
            return Some(at + close.len());
        }
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_names_change_and_whitespace_control_stays() {
        assert_eq!(
            rewrite("a{%- generation -%} b {%+ endgeneration %}c"),
            "a{%- with -%} b {%+ endwith %}c"
        );
        assert_eq!(rewrite("{%generation%}x{%endgeneration%}"), "{%with%}x{%endwith%}");
    }

    #[test]
    fn strings_comments_expressions_and_raw_blocks_are_left_alone() {
        for same in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ {'a': {'b': '}}'}} }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% set generation = 1 %}{{ generation }}",
            "{% set x = \"\\\"%}{% generation %}\" %}",
            "{ % generation % }",
            "{% generation_x %}",
            "{",
            "{%",
            "{% generation",
            "{{ 'é",
        ] {
            assert_eq!(rewrite(same), same);
        }
        assert_eq!(
            rewrite("{% raw %}{% generation %}{%- endraw %}{% generation %}"),
            "{% raw %}{% generation %}{%- endraw %}{% with %}"
        );
    }

    #[test]
    fn newlines_become_line_feeds() {
        assert_eq!(rewrite("a\r\nb\rc\n"), "a\nb\nc\n");
    }
}
