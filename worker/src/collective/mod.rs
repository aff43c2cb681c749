//! Process groups over libtorch's own c10d: Gloo on CPU, NCCL on GPU.
//!
//! This is the code under PyTorch's DDP, reached through a C++ bridge
//! (`bridge.cpp`). [`Store`] is the rendezvous: rank 0 listens, the others
//! connect. [`ProcessGroup`] is a set of ranks that have found one another;
//! its operations run on threads of their own, and [`Work`] is one under way.
//!
//! All ranks must call the same operations in the same order. A group in which
//! an operation failed, or was given up, is out of step with its peers: drop
//! it, and form a new one under the next generation. Dropping a group waits for
//! what it still has under way; a peer's operations fail as soon as the
//! connection closes, so all ranks dropping a group end together.
//!
//! c10d's sockets carry tensors in the clear: bind them to the cluster's
//! private interface.
//!
//! `unsafe` lives in this module alone.
#![allow(unsafe_code)]

mod error;
mod ffi;
mod group;
mod store;
mod work;

pub use error::CollectiveError;
pub use group::ProcessGroup;
#[cfg(feature = "cuda")]
pub use group::{nccl_defaults, use_gpu};
pub use store::Store;
pub use work::Work;

#[cfg(test)]
mod tests;
