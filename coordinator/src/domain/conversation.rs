//! Conversations, and what is extracted from them.

use serde::{Deserialize, Serialize};

/// Who speaks a message, in the words that chat templates use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions ahead of the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// A tool's answer.
    Tool,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message by `role` with `content`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// Where a sample came from: enough for a person to find it again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// File name without its folder, so that a moved corpus gives the same bytes.
    pub file: String,
    /// Index of the record in the file, from 0: the element of an array, the
    /// line of JSONL, the row of Parquet. For utterance tables, the element
    /// that carries the label.
    pub record: u64,
}

/// A turn in which the user was dissatisfied with the reply before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DsatSample {
    /// x: everything before the reply that disappointed. Never empty; ends with a user turn.
    pub context: Vec<Message>,
    /// y⁻: the reply that disappointed.
    pub rejected: String,
    /// The user's dissatisfied turn.
    pub feedback: String,
    /// Where it stands.
    pub origin: Origin,
}

/// A reply that satisfied.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SatSample {
    /// x: everything before the reply.
    pub context: Vec<Message>,
    /// y⁺: the reply that satisfied.
    pub chosen: String,
    /// Where it stands.
    pub origin: Origin,
}

/// A dissatisfying reply whose correction satisfied: the warm start's data.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SeedPair {
    /// x: everything before the rejected reply.
    pub context: Vec<Message>,
    /// y⁺: the reply after the dissatisfied turn.
    pub chosen: String,
    /// y⁻: the reply before it.
    pub rejected: String,
    /// Where it stands.
    pub origin: Origin,
}
