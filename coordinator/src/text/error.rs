//! What can go wrong between conversations and token ids.

use std::path::PathBuf;

use crate::domain::PromptId;

/// Why a model's text side could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file of the model directory could not be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file of the model directory does not parse.
    #[error("{}, line {}, column {}: {source}", path.display(), source.line(), source.column())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A file parses, but a value in it is not what it should be.
    #[error("{}, at `{place}`: expected {expected}, found {found}", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// The place in it.
        place: String,
        /// What was expected there.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// The directory holds no fast tokenizer.
    #[error(
        "{} is missing: write it with transformers' AutoTokenizer.from_pretrained(dir).save_pretrained(dir)",
        path.display()
    )]
    NoTokenizer {
        /// Where `tokenizer.json` was expected.
        path: PathBuf,
    },
    /// `tokenizer.json` does not load.
    #[error("load tokenizer {}: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library said.
        reason: String,
    },
    /// The tokenizer names no end-of-sequence token, or one that it does not hold.
    #[error(
        "{}: {reason}; set \"eos_token\" in tokenizer_config.json to a token of tokenizer.json",
        directory.display()
    )]
    NoEos {
        /// The model's directory.
        directory: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The model brings no chat template.
    #[error(
        "no chat template in {}: looked for {looked_at}; name a file with the setting text.chat_template",
        directory.display()
    )]
    NoTemplate {
        /// The model's directory.
        directory: PathBuf,
        /// The places that were looked at.
        looked_at: String,
    },
    /// The chat template does not compile.
    #[error("chat template {template} does not compile: {reason}")]
    TemplateSyntax {
        /// Where the template stands.
        template: String,
        /// Line and cause.
        reason: String,
    },
    /// The chat template called `raise_exception`: it does not take this conversation.
    #[error("chat template {template} refused the conversation: {message}")]
    Refused {
        /// Where the template stands.
        template: String,
        /// The template's own words.
        message: String,
    },
    /// The chat template failed on this conversation.
    #[error("chat template {template} failed: {reason}")]
    Render {
        /// Where the template stands.
        template: String,
        /// Line and cause.
        reason: String,
    },
    /// The tokenizer failed on a text.
    #[error("encode text with {}: {reason}", path.display())]
    Encode {
        /// The tokenizer's file.
        path: PathBuf,
        /// What the tokenizer library said.
        reason: String,
    },
    /// Token ids could not be turned into text.
    #[error("decode token ids with {}: {reason}", path.display())]
    Decode {
        /// The tokenizer's file.
        path: PathBuf,
        /// What the tokenizer library said.
        reason: String,
    },
    /// The directory holds no reward model that can be read to.
    #[error("reward model {}: {reason}", directory.display())]
    Reward {
        /// The model's directory.
        directory: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A sample answers a prompt that the corpus does not hold.
    #[error(
        "sample {index} answers prompt {prompt}, but the corpus holds {prompts} prompts: was the corpus changed since the run began"
    )]
    UnknownPrompt {
        /// The prompt it claims to answer.
        prompt: PromptId,
        /// Which of that prompt's samples.
        index: u32,
        /// How many prompts there are.
        prompts: usize,
    },
    /// A prompt and sample number occur twice.
    #[error("sample {index} of prompt {prompt} was given twice: expected one")]
    DuplicateSample {
        /// The prompt.
        prompt: PromptId,
        /// Which of its samples.
        index: u32,
    },
}

impl TextError {
    /// Whether the template decided against this conversation: it can be left
    /// out, and the others still serve.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}
