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

pub use block::Block;
pub(crate) use block::Heads;
pub use config::{Architecture, ModelConfig, RopeConfig, RopeScaling};
pub use decoder::{Decoder, Parameter};
pub use error::ModelError;
pub use layout::Part;
pub(crate) use layout::PerBlock;
pub use ops::{Activation, NormScale, product_kind};
pub use rope::{Rotary, Rotations};
pub use save::SavedFile;
pub(crate) use save::{write_file, write_tensor};
