//! One decoder driven by `config.json`: Llama and Qwen2, on packed tokens.
//!
//! A [`Decoder`] is loaded from Hugging Face files and saved to them again,
//! under the names it was loaded by. It owns no loop: callers drive it block
//! by block ([`Block::forward`]) and bring their own attention, so that the
//! same code samples from a cache, scores packed pairs, and trains one layer
//! at a time. Nothing here detaches or switches gradients off.

mod checkpoint;
mod config;
mod decoder;
mod error;
mod layout;
pub(crate) mod ops;
mod rope;
mod save;

pub use config::{Architecture, ModelConfig};
pub(crate) use decoder::Heads;
pub use decoder::{Block, Decoder, Parameter};
pub use error::ModelError;
pub use layout::Part;
pub(crate) use layout::PerBlock;
pub use ops::product_kind;
pub use rope::{RopeConfig, RopeScaling, Rotary};
pub use save::SavedFile;
pub(crate) use save::{write_file, write_tensor};
