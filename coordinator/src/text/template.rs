//! The model's own chat template, rendered as `transformers` renders it.

use std::error::Error as _;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use jiff::civil::{Date, Time};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, escape_formatter};

use super::error::TextError;
use super::files::{read_json, read_text};
use super::special::SpecialTokens;
use super::{generation_blocks, json, python};
use crate::domain::{Message, Role};

/// The name under which the environment holds the one template.
const NAME: &str = "chat";

/// A template's source and where it stands.
pub(crate) struct TemplateSource {
    /// File, and the place in it where that is not the whole file.
    pub(crate) origin: String,
    /// Jinja.
    pub(crate) source: String,
}

/// Finds the template as `transformers` does: `chat_template.jinja`, then
/// `chat_template` of `tokenizer_config.json`, then `chat_template.json`; or
/// the file that a setting names, which goes before all.
pub(crate) fn find(directory: &Path, named: Option<&Path>) -> Result<TemplateSource, TextError> {
    let whole_file = |path: PathBuf| -> Result<TemplateSource, TextError> {
        Ok(TemplateSource { origin: path.display().to_string(), source: read_text(&path)? })
    };
    if let Some(path) = named {
        return whole_file(path.to_path_buf());
    }
    let jinja = directory.join("chat_template.jinja");
    if jinja.exists() {
        return whole_file(jinja);
    }
    for name in ["tokenizer_config.json", "chat_template.json"] {
        let path = directory.join(name);
        if path.exists()
            && let Some(source) = in_json(&path)?
        {
            return Ok(TemplateSource {
                origin: format!("{} (chat_template)", path.display()),
                source,
            });
        }
    }
    Err(TextError::NoTemplate {
        directory: directory.to_path_buf(),
        looked_at:
            "chat_template.jinja, chat_template in tokenizer_config.json, chat_template.json"
                .to_owned(),
    })
}

/// `chat_template` of a JSON file: a string, or a list of named ones with a default.
fn in_json(path: &Path) -> Result<Option<String>, TextError> {
    let document = read_json(path)?;
    let unexpected = |expected: &'static str, found: String| TextError::Unexpected {
        path: path.to_path_buf(),
        place: "chat_template".to_owned(),
        expected,
        found,
    };
    match document.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(source)) => Ok(Some(source.clone())),
        Some(serde_json::Value::Array(list)) => {
            let field = |entry: &serde_json::Value, name: &str| {
                entry.get(name).and_then(serde_json::Value::as_str).map(str::to_owned)
            };
            let default =
                list.iter().find(|entry| field(entry, "name").as_deref() == Some("default"));
            match default.and_then(|entry| field(entry, "template")) {
                Some(source) => Ok(Some(source)),
                None => {
                    let names: Vec<_> =
                        list.iter().filter_map(|entry| field(entry, "name")).collect();
                    Err(unexpected(
                        "a template named \"default\" (or name a file with the setting text.chat_template)",
                        format!("templates named {names:?}"),
                    ))
                }
            }
        }
        Some(other) => Err(unexpected(
            "a string or a list of named templates",
            other.to_string().chars().take(60).collect(),
        )),
    }
}

/// A compiled chat template. Rendering is a pure function of the messages.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    special: SpecialTokens,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `template`. `today` is what `strftime_now` shows, at midnight: a
    /// date read from the clock would make a resumed run's prompts differ.
    pub(crate) fn new(
        template: TemplateSource,
        special: SpecialTokens,
        today: Date,
    ) -> Result<Self, TextError> {
        let mut environment = environment(today);
        environment
            .add_template_owned(NAME, generation_blocks::rewrite(&template.source))
            .map_err(|error| TextError::TemplateSyntax {
                template: template.origin.clone(),
                reason: reason(&error),
            })?;
        Ok(Self { environment, origin: template.origin, special })
    }

    /// The conversation as the model reads it.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                Value::from_pairs([
                    ("role", role_name(message.role)),
                    ("content", message.content.as_str()),
                ])
            })
            .collect();
        let fixed = [
            ("messages", Value::from(messages)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let special = self.special.template_variables();
        let context = Value::from_pairs(
            special.into_iter().chain(fixed.map(|(name, value)| (name.to_owned(), value))),
        );
        // The engine panics on some slices (`''[::-1]`); that must be
        // an error, not the program's end. Rendering leaves nothing half changed.
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            self.environment.get_template(NAME).and_then(|template| template.render(context))
        }));
        match rendered {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(_) => Err(TextError::Render {
                template: self.origin.clone(),
                reason: "the template engine panicked".to_owned(),
            }),
        }
    }

    /// Tells a refusal, which is the template's decision, from a failure.
    fn explain(&self, error: &Error) -> TextError {
        let template = self.origin.clone();
        let mut cause = error.source();
        while let Some(inner) = cause {
            if let Some(Refusal(message)) = inner.downcast_ref() {
                return TextError::Refused { template, message: message.clone() };
            }
            cause = inner.source();
        }
        TextError::Render { template, reason: reason(error) }
    }
}

/// What a template said through `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

/// `line 3: cannot add undefined`: kind, detail and place without the environment's name for it.
fn reason(error: &Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

/// Jinja with the settings, filters, tests and functions of `transformers`.
fn environment(today: Date) -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(false);
    if let Ok(syntax) = syntax.build() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(|out, state, value| {
        if value.kind() == ValueKind::Number
            && !value.is_integer()
            && let Ok(x) = f64::try_from(value.clone())
            && x.is_finite()
        {
            return escape_formatter(out, state, &Value::from(json::float_repr(x)));
        }
        escape_formatter(out, state, value)
    });
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("trim", python::trim);
    environment.add_filter("length", python::length);
    environment.add_filter("count", python::length);
    environment.add_test("iterable", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
    });
    environment.add_test("sequence", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
    });
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let message = message.to_string();
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", move |format: String| strftime(today, &format));
    environment
}

/// `datetime.strftime` in the C locale, for midnight of `date`.
fn strftime(date: Date, format: &str) -> Result<String, Error> {
    let mut c_locale = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        let directive = if c == '%' { chars.next() } else { None };
        match directive {
            // These follow a locale; jiff's own is not C's.
            Some('c') => c_locale.push_str("%a %b %e %H:%M:%S %Y"),
            Some('x' | 'D') => c_locale.push_str("%m/%d/%y"),
            Some('X') => c_locale.push_str("%H:%M:%S"),
            Some('r') => c_locale.push_str("%I:%M:%S %p"),
            // Microseconds have six digits, and a time without a zone has no zone's name.
            Some('f') => c_locale.push_str("000000"),
            Some('z' | 'Z') => {}
            Some(other) => c_locale.extend(['%', other]),
            None => c_locale.push(c),
        }
    }
    jiff::fmt::strtime::format(&c_locale, date.to_datetime(Time::midnight())).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"))
    })
}
