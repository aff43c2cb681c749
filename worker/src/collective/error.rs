//! What goes wrong between ranks.

use std::io;

use tch::Device;

/// Why a store, a group or an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The address to listen on is not one of this machine's, or not free.
    #[error("bind the rendezvous store to {host}: {source}; give an address of this machine")]
    Bind {
        /// The address asked for.
        host: String,
        /// What the system said.
        source: io::Error,
    },
    /// The store could not be opened or reached.
    #[error("{operation} at {host}:{port}: {text}")]
    Store {
        /// `listen` or `connect`.
        operation: &'static str,
        /// The store's host.
        host: String,
        /// The store's port.
        port: u16,
        /// c10d's own words.
        text: String,
    },
    /// An operation of a group failed: a peer is missing, slow or gone.
    #[error("{operation} on rank {rank} of {world_size}: {text}")]
    Operation {
        /// `form group`, or the operation's name.
        operation: &'static str,
        /// This process's rank.
        rank: u32,
        /// Ranks in the group.
        world_size: u32,
        /// c10d's own words.
        text: String,
    },
    /// A rank outside of its group.
    #[error("rank {rank} is outside a group of {world_size}; ranks count from 0")]
    Rank {
        /// The rank given.
        rank: u32,
        /// Ranks in the group.
        world_size: u32,
    },
    /// Backends reduce memory, not views: a strided tensor would give wrong sums.
    #[error("{operation} of a tensor of shape {shape:?} that is not contiguous; copy it first")]
    NotContiguous {
        /// The operation asked for.
        operation: &'static str,
        /// The tensor's shape.
        shape: Vec<i64>,
    },
    /// A flat tensor that does not divide into the shares given.
    #[error(
        "{operation} over {world_size} ranks of {flat} elements in all, with {share} in a share; pad \
         the flat tensor to a multiple of the ranks"
    )]
    Share {
        /// The operation asked for.
        operation: &'static str,
        /// Elements of the flat tensor.
        flat: usize,
        /// Elements of a share.
        share: usize,
        /// Ranks in the group.
        world_size: u32,
    },
    /// A device that this build has no backend for.
    #[error(
        "no collectives for {0:?} in this build; build the worker with `cargo build --release \
         --features cuda`"
    )]
    NoCuda(Device),
    /// A GPU does not answer.
    #[error("use GPU {index}: {text}")]
    Device {
        /// Its number among those that this process sees.
        index: usize,
        /// CUDA's own words.
        text: String,
    },
    /// A host name with a zero byte in it.
    #[error("host name {0:?} holds a zero byte")]
    HostName(String),
}
