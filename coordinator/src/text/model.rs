//! A model's text side: its tokenizer and its template behind one door.

use std::path::{Path, PathBuf};

use jiff::civil::Date;
use tokenizers::Tokenizer;

use super::error::TextError;
use super::files::{CheckpointFile, carried};
use super::python;
use super::special::{SpecialTokens, configured_stop_ids};
use super::template::{self, ChatTemplate};
use crate::domain::{FinishReason, Message, Role, Sample};

/// What is appended to the dissatisfied turn of a guided prompt, unless the
/// settings say otherwise.
pub const DEFAULT_INSTRUCTION: &str = "Answer my earlier request again. Put right what I was \
not satisfied with, and give a complete reply that stands on its own: no apology, and no word \
about the earlier attempt or about these remarks.";

/// Texts that are encoded in one parallel call; bounds the memory of encodings.
const BATCH: usize = 512;

/// How a model's text side is loaded.
#[derive(Debug, Clone)]
pub struct TextOptions {
    /// A Jinja file to use in place of the model's own template (`text.chat_template`).
    pub chat_template: Option<PathBuf>,
    /// The date that a template's `strftime_now` shows. Fixed once per run and
    /// kept with it: a resumed run must render the same prompts.
    pub today: Date,
}

/// How the template writes a reply, found by rendering one.
#[derive(Debug, Clone, Copy)]
struct ReplyShape {
    /// The template strips white space around a reply.
    stripped: bool,
    /// The stop id with which the template closes a reply.
    closed_by: Option<u32>,
}

/// Tokenizer and chat template of one model. `Sync`: threads may share it.
#[derive(Debug)]
pub struct TextModel {
    directory: PathBuf,
    options: TextOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    stop_ids: Vec<u32>,
    eos_id: u32,
    strips_replies: bool,
}

impl TextModel {
    /// Loads `tokenizer.json`, `tokenizer_config.json` and the chat template of
    /// a Hugging Face model directory.
    ///
    /// # Errors
    /// A missing or malformed file, a model without a template or without an
    /// `eos_token`; each error names the file and the remedy.
    pub fn load(model_dir: &Path, options: &TextOptions) -> Result<Self, TextError> {
        let special = SpecialTokens::read(model_dir)?;
        let tokenizer = load_tokenizer(model_dir, &special)?;
        let eos_token = special.eos().map(str::to_owned);
        let source = template::find(model_dir, options.chat_template.as_deref())?;
        let template = ChatTemplate::new(source, special, options.today)?;

        let no_eos =
            |reason: String| TextError::NoEos { directory: model_dir.to_path_buf(), reason };
        let eos_token = eos_token.ok_or_else(|| no_eos("no eos_token is set".to_owned()))?;
        let tokenizer_eos = tokenizer
            .token_to_id(&eos_token)
            .ok_or_else(|| no_eos(format!("eos_token {eos_token:?} is not in tokenizer.json")))?;
        let mut stop_ids = configured_stop_ids(model_dir)?;
        stop_ids.insert(tokenizer_eos);

        let mut model = Self {
            directory: model_dir.to_path_buf(),
            options: options.clone(),
            tokenizer,
            template,
            stop_ids: stop_ids.into_iter().collect(),
            eos_id: tokenizer_eos,
            strips_replies: false,
        };
        let shape = model.reply_shape()?;
        model.eos_id = shape.closed_by.unwrap_or(tokenizer_eos);
        model.strips_replies = shape.stripped;
        Ok(model)
    }

    /// Renders a small conversation and looks at what became of its reply. A
    /// template that does not take it, or hides the reply, tells nothing.
    fn reply_shape(&self) -> Result<ReplyShape, TextError> {
        const REPLY: &str = "drift";
        let render = |reply: String| {
            let turns = [Message::new(Role::User, "Hello"), Message::new(Role::Assistant, reply)];
            self.template.render(&turns, false).ok()
        };
        let plain = render(REPLY.to_owned());
        let Some((_, closing)) = plain.as_deref().and_then(|text| text.rsplit_once(REPLY)) else {
            return Ok(ReplyShape { stripped: false, closed_by: None });
        };
        Ok(ReplyShape {
            stripped: render(format!("\n {REPLY} \n")) == plain,
            closed_by: self
                .encode(closing)?
                .first()
                .copied()
                .filter(|id| self.stop_ids.contains(id)),
        })
    }

    /// The conversation as the model reads it, special tokens written out.
    ///
    /// # Errors
    /// [`TextError::Refused`] with the template's own words where it raises.
    pub fn apply_chat_template(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        self.template.render(messages, add_generation_prompt)
    }

    /// Token ids of `text`. Special tokens in it are recognised, none is added:
    /// templates write their own.
    ///
    /// # Errors
    /// The tokenizer library's, which are not met with in sound tokenizers.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, false);
        Ok(encoding.map_err(|error| self.encode_error(&error))?.get_ids().to_vec())
    }

    /// [`encode`](Self::encode) for many texts, on all cores; results in order.
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_all<S: AsRef<str>>(&self, texts: &[S]) -> Result<Vec<Vec<u32>>, TextError> {
        let mut ids = Vec::with_capacity(texts.len());
        for batch in texts.chunks(BATCH) {
            let batch: Vec<&str> = batch.iter().map(AsRef::as_ref).collect();
            let encodings = self
                .tokenizer
                .encode_batch_fast(batch, false)
                .map_err(|error| self.encode_error(&error))?;
            ids.extend(encodings.iter().map(|encoding| encoding.get_ids().to_vec()));
        }
        Ok(ids)
    }

    /// Text of `ids`, special tokens left out. Spaces are not tidied up.
    ///
    /// # Errors
    /// The tokenizer library's.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        self.tokenizer.decode(ids, true).map_err(|error| TextError::Decode {
            path: self.directory.join("tokenizer.json"),
            reason: error.to_string(),
        })
    }

    /// What ends a reply: the stop id with which the template closes one, and
    /// the tokenizer's `eos_token` where it closes with none.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// Ids at which sampling stops, rising: `eos_token_id` of
    /// `generation_config.json` and `config.json`, and the tokenizer's.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Token ids of `context` with the opening of a reply at the end. Where
    /// they are more than `max_tokens`, their end is kept.
    ///
    /// # Errors
    /// As [`apply_chat_template`](Self::apply_chat_template).
    pub fn prompt(&self, context: &[Message], max_tokens: usize) -> Result<Vec<u32>, TextError> {
        let ids = self.encode(&self.apply_chat_template(context, true)?)?;
        Ok(keep_end(ids, max_tokens))
    }

    /// A reply as it is handed to the tokenizer: without the surrounding white
    /// space, if the template strips it.
    pub(crate) fn reply_text<'a>(&self, text: &'a str) -> &'a str {
        if self.strips_replies { python::strip(text, None, true, true) } else { text }
    }

    /// Token ids of a reply and [`eos_id`](Self::eos_id); cut at the end to
    /// `max_tokens`, and then without the latter.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn response(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>, TextError> {
        Ok(self.closed(self.encode(self.reply_text(text))?, true, max_tokens))
    }

    /// A sample's ids as they were drawn, never tokenised anew: its stop id
    /// becomes [`eos_id`](Self::eos_id), and is there only if the sample ended
    /// by itself and was not cut to `max_tokens`.
    pub fn sampled_response(&self, sample: &Sample, max_tokens: usize) -> Vec<u32> {
        let mut ids = sample.tokens.clone();
        let stopped = sample.finish == FinishReason::Stop;
        if stopped && ids.last().is_some_and(|id| self.stop_ids.contains(id)) {
            ids.pop();
        }
        self.closed(ids, stopped, max_tokens)
    }

    /// `ids` and, if they are `complete`, the end-of-sequence id; cut to `max_tokens`.
    pub(crate) fn closed(&self, mut ids: Vec<u32>, complete: bool, max_tokens: usize) -> Vec<u32> {
        if complete {
            ids.push(self.eos_id);
        }
        ids.truncate(max_tokens);
        ids
    }

    /// Files of the model directory that a published checkpoint carries along,
    /// under the names it gives them.
    pub fn files(&self) -> Vec<CheckpointFile> {
        carried(&self.directory, self.options.chat_template.as_deref())
    }

    fn encode_error(&self, error: &tokenizers::Error) -> TextError {
        TextError::Encode { path: self.directory.join("tokenizer.json"), reason: error.to_string() }
    }
}

/// The conversation from which a better reply is sampled: the context, the
/// disappointing reply, and the dissatisfied turn with `instruction` after a
/// blank line. The instruction shares that turn, and no system message is
/// invented, because there are templates that insist on alternating roles and
/// templates that take no system message.
pub fn guided_messages(
    context: &[Message],
    reply: &str,
    feedback: &str,
    instruction: &str,
) -> Vec<Message> {
    let mut messages = context.to_vec();
    messages.push(Message::new(Role::Assistant, reply));
    let turn = match (feedback.trim().is_empty(), instruction.is_empty()) {
        (true, _) => instruction.to_owned(),
        (false, true) => feedback.to_owned(),
        (false, false) => format!("{feedback}\n\n{instruction}"),
    };
    messages.push(Message::new(Role::User, turn));
    messages
}

/// The last `max_tokens` of `ids`.
pub(crate) fn keep_end(mut ids: Vec<u32>, max_tokens: usize) -> Vec<u32> {
    ids.drain(..ids.len().saturating_sub(max_tokens));
    ids
}

pub(super) fn load_tokenizer(
    directory: &Path,
    special: &SpecialTokens,
) -> Result<Tokenizer, TextError> {
    let path = directory.join("tokenizer.json");
    if !path.exists() {
        return Err(TextError::NoTokenizer { path });
    }
    let failed = |reason: String| TextError::Tokenizer { path: path.clone(), reason };
    let mut tokenizer = Tokenizer::from_file(&path).map_err(|error| failed(error.to_string()))?;
    special.add_to(&mut tokenizer, directory)?;
    // A file saved after training carries that training's lengths.
    tokenizer.with_truncation(None).map_err(|error| failed(error.to_string()))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::fixture::{
        ASSISTANT, END, EOS, TEMPLATE, USER, model, model_with, options, word, words, write,
        write_json,
    };
    use super::*;
    use crate::domain::PromptId;

    fn turn(text: &str) -> Vec<Message> {
        vec![Message::new(Role::User, text)]
    }

    fn drawn(tokens: Vec<u32>, finish: FinishReason) -> Sample {
        Sample { prompt: PromptId(0), index: 0, tokens, finish }
    }

    #[test]
    fn a_files_truncation_padding_and_bos_are_not_applied() {
        let model = model();
        assert_eq!(model.encode(&words(9)).unwrap(), (0..9).map(word).collect::<Vec<_>>());
        assert_eq!(model.encode("w7").unwrap(), [word(7)]);
    }

    #[test]
    fn a_prompt_too_long_keeps_its_end() {
        let model = model();
        let whole = model.prompt(&turn("w0 w1 w2"), 100).unwrap();
        assert_eq!(whole, [USER, word(0), word(1), word(2), ASSISTANT]);
        assert_eq!(model.prompt(&turn("w0 w1 w2"), 3).unwrap(), whole[2..]);
        assert_eq!(model.prompt(&turn("w0 w1 w2"), 5).unwrap(), whole);
    }

    #[test]
    fn a_response_ends_with_the_templates_closing_token_unless_cut() {
        let model = model();
        assert_eq!(model.eos_id(), END);
        assert_eq!(model.stop_ids(), [EOS, END]);
        assert_eq!(model.response("w0 w1", 3).unwrap(), [word(0), word(1), END]);
        assert_eq!(model.response("w0 w1", 2).unwrap(), [word(0), word(1)]);
        assert_eq!(model.response("w0 w1", 1).unwrap(), [word(0)]);
    }

    #[test]
    fn a_template_that_closes_with_no_stop_id_leaves_the_tokenizers_eos() {
        let bare = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}";
        assert_eq!(model_with(bare).eos_id(), EOS);
        let hides = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(model_with(hides).eos_id(), EOS);
        let refuses = "{{ raise_exception('never') }}";
        assert_eq!(model_with(refuses).eos_id(), EOS);
    }

    #[test]
    fn replies_are_stripped_where_the_template_strips_them() {
        assert_eq!(model().reply_text(" w1\n"), " w1\n");
        let strips = TEMPLATE.replace("m.content }}", "m.content | trim }}");
        assert_eq!(model_with(&strips).reply_text(" w1\n"), "w1");
    }

    #[test]
    fn a_sample_keeps_its_ids_and_has_eos_only_if_it_stopped_uncut() {
        let model = model();
        let stopped = drawn(vec![word(1), word(2), EOS], FinishReason::Stop);
        assert_eq!(model.sampled_response(&stopped, 10), [word(1), word(2), END]);
        assert_eq!(model.sampled_response(&stopped, 3), [word(1), word(2), END]);
        assert_eq!(model.sampled_response(&stopped, 2), [word(1), word(2)]);
        let unfinished = drawn(vec![word(1), word(2)], FinishReason::Length);
        assert_eq!(model.sampled_response(&unfinished, 10), [word(1), word(2)]);
        assert_eq!(model.sampled_response(&unfinished, 1), [word(1)]);
    }

    #[test]
    fn guidance_shares_the_dissatisfied_turn() {
        let guided =
            |feedback, instruction| guided_messages(&turn("w1"), "w2", feedback, instruction);
        let messages = guided("w3", "w4");
        let roles: Vec<Role> = messages.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant, Role::User]);
        assert_eq!(messages[2].content, "w3\n\nw4");
        assert_eq!(guided(" ", "w4")[2].content, "w4");
        assert_eq!(guided("w3", "")[2].content, "w3");
        let ids = model().prompt(&messages, 100).unwrap();
        let expected = [USER, word(1), ASSISTANT, word(2), END, USER, word(3), word(4), ASSISTANT];
        assert_eq!(ids, expected);
    }

    #[test]
    fn batches_come_back_in_order() {
        let model = model();
        let texts: Vec<String> = (0..1_500).map(|n| format!("w{n} w{}", n + 1)).collect();
        let ids = model.encode_all(&texts).unwrap();
        for (n, ids) in (0_u32..).zip(&ids) {
            assert_eq!(*ids, [word(n), word(n + 1)]);
        }
        assert_eq!(ids.len(), texts.len());
    }

    #[test]
    fn decoding_leaves_special_tokens_out() {
        assert_eq!(model().decode(&[USER, word(1), word(2), END]).unwrap(), "w1 w2");
    }

    #[test]
    fn errors_name_the_file_and_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let load = || TextModel::load(path, &options()).unwrap_err().to_string();
        assert!(load().contains("tokenizer.json is missing"), "{}", load());

        write(path, TEMPLATE);
        write_json(path, "tokenizer_config.json", &serde_json::json!({"eos_token": "</s>"}));
        let message = load();
        assert!(message.contains(&path.display().to_string()), "{message}");
        assert!(
            message.contains("chat_template.jinja, chat_template in tokenizer_config.json"),
            "{message}"
        );
        assert!(message.contains("text.chat_template"), "{message}");

        write_json(
            path,
            "tokenizer_config.json",
            &serde_json::json!({"chat_template": TEMPLATE, "eos_token": "<nowhere>"}),
        );
        assert!(load().contains("eos_token \"<nowhere>\" is not in tokenizer.json"), "{}", load());

        write(path, "{% for m in messages %}{{ m.");
        let message = load();
        assert!(matches!(TextModel::load(path, &options()), Err(TextError::TemplateSyntax { .. })));
        assert!(message.contains("tokenizer_config.json (chat_template)"), "{message}");

        write(path, TEMPLATE);
        std::fs::write(path.join("generation_config.json"), "{\"eos_token_id\": [2,").unwrap();
        assert!(load().contains("generation_config.json, line 1, column 20"), "{}", load());
        write_json(path, "generation_config.json", &serde_json::json!({"eos_token_id": "x"}));
        assert!(load().contains("at `eos_token_id`: expected a token id"), "{}", load());
    }

    #[test]
    fn a_refusal_carries_the_templates_words() {
        let system = [Message::new(Role::System, "w1")];
        let error = model().prompt(&system, 10).unwrap_err();
        assert!(error.is_refusal());
        assert!(
            error.to_string().ends_with("refused the conversation: no system role here"),
            "{error}"
        );
    }

    #[test]
    fn a_checkpoint_carries_the_template_that_was_used() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), TEMPLATE);
        let named = directory.path().join("mine.jinja");
        std::fs::write(&named, "mine {{ messages[0].content }}").unwrap();
        let own = TextModel::load(directory.path(), &options()).unwrap();
        let names: Vec<_> = own.files().into_iter().map(|file| file.name).collect();
        assert_eq!(names, ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]);
        let options = TextOptions { chat_template: Some(named.clone()), ..options() };
        let other = TextModel::load(directory.path(), &options).unwrap();
        assert_eq!(other.apply_chat_template(&turn("w1"), true).unwrap(), "mine w1");
        let carried = CheckpointFile { name: "chat_template.jinja".to_owned(), source: named };
        assert!(other.files().contains(&carried));
    }
}
