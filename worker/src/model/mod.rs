//! One decoder driven by `config.json`: Llama, Mistral, Qwen2, Qwen3 and Gemma-3, on packed
//! tokens.
//!
//! A [`Decoder`] is loaded from Hugging Face files and saved to them again,
//! under the names it was loaded by. It owns no loop: callers drive it block
//! by block ([`Block::forward`]) and bring their own attention, so that the
//! same code samples from a cache, scores packed pairs, and trains one layer
//! at a time. Nothing here detaches or switches gradients off.

mod block;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod layout;
pub(crate) mod ops;
mod rope;
mod save;
mod tokens;

pub use block::Block;
pub(crate) use block::Heads;
pub(crate) use checkpoint::Checkpoint;
pub use config::{Architecture, Head, ModelConfig, RopeConfig, RopeScaling};
pub(crate) use config::{
    ConfigFile, Purpose, check_one_label, classes, layers, refuse_quantized, size, typed,
};
pub use decoder::{Decoder, Parameter};
pub use error::ModelError;
pub use layout::Part;
pub(crate) use layout::{PerBlock, Slot};
pub use ops::{Activation, NormScale, product_kind};
pub use rope::{Rotary, Rotations};
pub use save::SavedFile;
pub(crate) use save::{write_file, write_tensor};
pub(crate) use tokens::check_tokens;
