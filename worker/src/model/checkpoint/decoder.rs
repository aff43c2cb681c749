//! What a checkpoint holds of a decoder, and beside it.

use safetensors::tensor::Dtype;
use tch::{TchError, Tensor};

use super::{Checkpoint, WeightFile};
use crate::model::error::ModelError;
use crate::model::layout::{Layout, Prefix};

/// A tensor that is no part of the decoder, and is saved as it was read.
#[derive(Debug)]
pub(in crate::model) struct Untouched {
    pub(in crate::model) name: String,
    pub(in crate::model) dtype: Dtype,
    pub(in crate::model) shape: Vec<usize>,
    /// `[bytes]`, u8.
    pub(in crate::model) content: Tensor,
}

impl Checkpoint {
    /// Under which names the decoder is here: those with which its embedding is found.
    pub(in crate::model) fn prefix(&self, multimodal: bool) -> Prefix {
        let prefixes = if multimodal { Prefix::MULTIMODAL } else { Prefix::PLAIN };
        let found = |prefix: &Prefix| self.tensors.contains_key(&prefix.embedding());
        prefixes.into_iter().find(found).unwrap_or(prefixes[0])
    }

    /// Checks names, shapes and kinds against `layout`, without reading a weight.
    pub(in crate::model) fn check_decoder(&self, layout: &Layout) -> Result<(), ModelError> {
        // A tied head may be written out once more, if it says the same.
        let copy = layout.outer.head.is_none().then(|| layout.prefix.vocabulary());
        self.check(layout.slots(), |name| {
            is_derived(name) || layout.prefix.is_beside(name) || copy.as_deref() == Some(name)
        })?;
        match copy.filter(|copy| self.tensors.contains_key(copy)) {
            Some(copy) => self.check_tied(layout, &copy),
            None => Ok(()),
        }
    }

    /// Checks that `head`, a tensor that is here, is the embedding.
    #[expect(clippy::disallowed_methods, reason = "once, as the model is loaded")]
    fn check_tied(&self, layout: &Layout, head: &str) -> Result<(), ModelError> {
        let embedding = layout.prefix.embedding();
        let file = &self.files[self.tensors[head]];
        let slot = &layout.outer.embedding;
        file.check(head, &slot.shape(slot.rows()))?;
        if self.tensor(head)?.f_equal(&self.tensor(&embedding)?)? {
            return Ok(());
        }
        let problem = format!(
            "{head} differs from {embedding}, but config.json has tie_word_embeddings true; set \
             it to false to use both"
        );
        Err(ModelError::malformed(&file.path, problem))
    }

    /// What is here beside the decoder: views into the mapping, which outlives the files'
    /// names.
    pub(in crate::model) fn untouched(
        &self,
        layout: &Layout,
    ) -> Result<Vec<Untouched>, ModelError> {
        let beside = self.tensors.iter().filter(|(name, _)| layout.prefix.is_beside(name));
        beside.map(|(name, &at)| Ok(self.files[at].untouched(name)?)).collect()
    }
}

impl WeightFile {
    fn untouched(&self, name: &str) -> Result<Untouched, TchError> {
        let info = &self.tensors[name];
        Ok(Untouched {
            name: name.to_owned(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            content: self.content(info)?,
        })
    }
}

/// Old conversions of Llama stored the rotary frequencies, which follow from
/// `config.json`; transformers drops them too.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}
