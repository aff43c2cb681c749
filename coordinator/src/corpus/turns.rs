//! Messages in the spellings that published files use, in borrowed text.

use std::borrow::Cow;
use std::fmt;

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{self, Deserialize, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};

use crate::domain::Role;

/// What a user turn says about the reply before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Label {
    Dsat,
    Sat,
    /// Both at once: counted, and taken for neither.
    Mixed,
    /// Said to be neither.
    Neither,
    /// Not said. An absent label is not a false one.
    Missing,
}

impl Label {
    /// From WildFeedback's two columns. One that is true decides unless the
    /// other is true too; an absent one leaves the turn undecided.
    pub(super) fn of(satisfied: Option<bool>, dissatisfied: Option<bool>) -> Label {
        match (satisfied, dissatisfied) {
            (Some(true), Some(true)) => Label::Mixed,
            (Some(true), _) => Label::Sat,
            (_, Some(true)) => Label::Dsat,
            (Some(false), Some(false)) => Label::Neither,
            _ => Label::Missing,
        }
    }

    /// From the `label` of a message.
    pub(super) fn named(name: &str) -> Result<Label, String> {
        match name {
            "dsat" | "DSAT" => Ok(Label::Dsat),
            "sat" | "SAT" => Ok(Label::Sat),
            "mixed" => Ok(Label::Mixed),
            other => Err(format!(
                "unknown label `{other}`, expected \"dsat\", \"sat\", \"mixed\" or null"
            )),
        }
    }
}

/// The speaker by any of the names that published files use.
pub(super) fn role(name: &str) -> Result<Role, String> {
    const NAMES: [(Role, &[&str]); 4] = [
        (Role::User, &["user", "human"]),
        (Role::Assistant, &["assistant", "agent", "gpt", "model", "chatgpt", "bot"]),
        (Role::System, &["system", "developer"]),
        (Role::Tool, &["tool", "function"]),
    ];
    let known =
        |(_, names): &&(Role, &[&str])| names.iter().any(|known| known.eq_ignore_ascii_case(name));
    NAMES.iter().find(known).map(|(role, _)| *role).ok_or_else(|| {
        format!(
            "unknown role `{name}`, expected user, assistant, system or tool (or human, gpt, Agent)"
        )
    })
}

/// One turn, its text borrowed from the file where no escape stands in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turn<'a> {
    pub(super) role: Role,
    pub(super) content: Cow<'a, str>,
    /// On user turns; `Missing` on others.
    pub(super) label: Label,
    /// The record that carries the turn.
    pub(super) record: u64,
    /// Whether the turn before it is missing from the file.
    pub(super) after_gap: bool,
}

impl<'a> Turn<'a> {
    pub(super) fn new(role: Role, content: impl Into<Cow<'a, str>>) -> Self {
        Self { role, content: content.into(), label: Label::Missing, record: 0, after_gap: false }
    }
}

/// A string that borrows. (`Option<Cow<str>>` by itself never does in serde.)
#[derive(serde::Deserialize)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

/// `{role, content, label}` or `{from, value}`; all else in it is skipped.
#[derive(serde::Deserialize)]
struct Message<'a> {
    #[serde(borrow, alias = "from")]
    role: Text<'a>,
    #[serde(borrow, alias = "value")]
    content: Option<Text<'a>>,
    #[serde(borrow, default)]
    label: Option<Text<'a>>,
}

impl<'a> Message<'a> {
    fn turn(self) -> Result<Turn<'a>, String> {
        let content = self.content.map_or(Cow::Borrowed(""), |text| text.0);
        let label = self.label.map_or(Ok(Label::Missing), |label| Label::named(&label.0))?;
        Ok(Turn { label, ..Turn::new(role(&self.role.0)?, content) })
    }
}

/// What stands where messages are expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Turns<'a> {
    /// A bare string: its place says who speaks.
    Text(Cow<'a, str>),
    /// One message or several.
    Messages(Vec<Turn<'a>>),
}

impl<'a> Turns<'a> {
    /// As messages; a bare string is said by `speaker`.
    pub(super) fn spoken_by(self, speaker: Role) -> Vec<Turn<'a>> {
        match self {
            Turns::Text(text) => vec![Turn::new(speaker, text)],
            Turns::Messages(turns) => turns,
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Turns<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TurnsVisitor)
    }
}

struct TurnsVisitor;

impl<'de> Visitor<'de> for TurnsVisitor {
    type Value = Turns<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a message {role, content} or {from, value}, or a list of messages")
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Turns::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Turns::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Turns::Messages(Vec::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        let message = Message::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Turns::Messages(vec![message.turn().map_err(de::Error::custom)?]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut turns = Vec::with_capacity(list.size_hint().unwrap_or(8).min(64));
        while let Some(message) = list.next_element::<Message<'de>>()? {
            turns.push(message.turn().map_err(de::Error::custom)?);
        }
        Ok(Turns::Messages(turns))
    }
}

/// A column that is a boolean, or null, or a boolean that went through a
/// spreadsheet: `"True"`, `"no"`, `1.0`. Empty text and NaN are null.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Flag(pub(super) Option<bool>);

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FlagVisitor)
    }
}

struct FlagVisitor;

impl Visitor<'_> for FlagVisitor {
    type Value = Flag;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("true, false or null")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Flag, E> {
        Ok(Flag(Some(value)))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Flag, E> {
        Ok(Flag(None))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Flag, E> {
        match value {
            0 => Ok(Flag(Some(false))),
            1 => Ok(Flag(Some(true))),
            other => Err(E::invalid_value(de::Unexpected::Unsigned(other), &self)),
        }
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Flag, E> {
        match value {
            0.0 => Ok(Flag(Some(false))),
            1.0 => Ok(Flag(Some(true))),
            other => Err(E::invalid_value(de::Unexpected::Float(other), &self)),
        }
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Flag, E> {
        let is = |names: &[&str]| names.iter().any(|name| name.eq_ignore_ascii_case(value.trim()));
        if is(&["true", "yes"]) {
            Ok(Flag(Some(true)))
        } else if is(&["false", "no"]) {
            Ok(Flag(Some(false)))
        } else if is(&["", "null", "none", "nan", "n/a"]) {
            Ok(Flag(None))
        } else {
            Err(E::invalid_value(de::Unexpected::Str(value), &self))
        }
    }
}

impl Flag {
    /// From a text column.
    pub(super) fn parse(text: &str) -> Result<Flag, String> {
        let text: StrDeserializer<'_, de::value::Error> = text.into_deserializer();
        Flag::deserialize(text).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_labels() {
        let (yes, no, absent) = (Some(true), Some(false), None);
        let table = [
            (yes, yes, Label::Mixed),
            (yes, no, Label::Sat),
            (yes, absent, Label::Sat),
            (no, yes, Label::Dsat),
            (absent, yes, Label::Dsat),
            (no, no, Label::Neither),
            (no, absent, Label::Missing),
            (absent, no, Label::Missing),
            (absent, absent, Label::Missing),
        ];
        for (satisfied, dissatisfied, label) in table {
            assert_eq!(Label::of(satisfied, dissatisfied), label, "{satisfied:?} {dissatisfied:?}");
        }
    }

    #[test]
    fn both_spellings_of_messages_borrow_their_text() {
        let plain = br#"[{"role": "user", "content": "hi", "extra": [1]}, {"from": "gpt", "value": "a\nb"}]"#;
        let turns: Turns<'_> = serde_json::from_slice(plain).unwrap();
        let Turns::Messages(turns) = turns else { panic!() };
        assert_eq!(turns[0], Turn::new(Role::User, "hi"));
        assert!(matches!(turns[0].content, Cow::Borrowed(_)));
        assert_eq!(turns[1], Turn::new(Role::Assistant, "a\nb"));
    }

    #[test]
    fn a_string_and_one_message_are_turns_too() {
        let text: Turns<'_> = serde_json::from_str(r#""why?""#).unwrap();
        assert_eq!(text.spoken_by(Role::User), [Turn::new(Role::User, "why?")]);
        let one: Turns<'_> = serde_json::from_str(r#"{"from": "human", "value": null}"#).unwrap();
        assert_eq!(one.spoken_by(Role::Assistant), [Turn::new(Role::User, "")]);
        assert!(
            serde_json::from_str::<Turns<'_>>("3")
                .unwrap_err()
                .to_string()
                .contains("a list of messages")
        );
        let error = serde_json::from_str::<Turns<'_>>(r#"{"role": "narrator", "content": ""}"#)
            .unwrap_err();
        assert!(error.to_string().contains("unknown role `narrator`"), "{error}");
    }

    #[test]
    fn flags_bear_what_spreadsheets_do_to_them() {
        let flag = |json: &str| serde_json::from_str::<Flag>(json).ok().map(|flag| flag.0);
        for yes in ["true", "\"True\"", "\"YES\"", "1", "1.0"] {
            assert_eq!(flag(yes), Some(Some(true)), "{yes}");
        }
        for no in ["false", "\"false\"", "\"No\"", "0"] {
            assert_eq!(flag(no), Some(Some(false)), "{no}");
        }
        for absent in ["null", "\"\"", "\"N/A\""] {
            assert_eq!(flag(absent), Some(None), "{absent}");
        }
        for wrong in ["2", "\"maybe\"", "[]"] {
            assert_eq!(flag(wrong), None, "{wrong}");
        }
    }
}
