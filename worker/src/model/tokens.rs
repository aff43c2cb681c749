//! What a model can read.

use std::fmt::Display;

/// Checks that `tokens`, which are of `what`, can be computed by a model whose vocabulary has
/// `vocab_size` ids.
///
/// # Errors
/// What is wrong with them, in words.
pub(crate) fn check_tokens(
    vocab_size: i64,
    what: &dyn Display,
    tokens: &[u32],
) -> Result<(), String> {
    if tokens.is_empty() {
        return Err(format!("{what} has no tokens"));
    }
    match tokens.iter().find(|id| i64::from(**id) >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(format!(
            "{what} holds token {id}, but the model's vocabulary has {vocab_size}: tokenizer and \
             model do not belong together"
        )),
    }
}
