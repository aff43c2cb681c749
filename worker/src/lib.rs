//! The worker: tensors, and nothing else. Token ids in, token ids and numbers out.
//!
//! | module | owns |
//! |---|---|
//! | [`model`] | one decoder driven by `config.json`, its weights in safetensors |
//! | [`sample`] | sampling with a KV cache, by host-drawn uniforms |
//! | [`train`] | scoring and data-parallel DPO steps, block by block |
//! | [`reward`] | reward models, which rate whole conversations |
//! | [`collective`] | libtorch's own c10d behind a C++ bridge: the one place with `unsafe` |
//! | [`agent`] | the stream to the coordinator, and the thread that owns libtorch |
//! | `kernels` | operations of ours for CPUs, in C++ |
//! | `host` | what goes between host and device, counted |
//!
//! Text is absent from this crate: it holds no tokenizer and no template.

// Tests look at what they like.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod agent;
pub mod collective;
mod host;
mod kernels;
pub mod model;
pub mod reward;
pub mod sample;
pub mod train;

/// libtorch's allocator too: with glibc's, the threads of a step wait for each other's
/// small allocations, and give large ones back to be faulted in again. Its settings
/// are compiled in (`.cargo/config.toml`).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The libtorch that this build is linked against.
pub const LIBTORCH_VERSION: &str = "2.13.0";
