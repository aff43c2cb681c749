//! The gRPC door, and the launcher of local workers.

mod accept;
mod connection;
mod door;
mod launch;
mod limits;
mod opening;
mod refusal;
mod service;
mod slurm;
mod tls;
mod wire;

pub use launch::{LaunchError, LaunchPlan, Launcher, WorkerExit, find_worker, threads_per_worker};
pub use opening::{OpenError, Opening, WayIn};
pub use service::{AttachPlan, Link, LinkId, NoPlace, Origin, Server, WorkerEvent};
pub use slurm::{Allocation, SlurmError};
pub use tls::CertifyError;
pub use wire::{Outgoing, PairBatch};

/// Decodes a worker's message as the service does, and drops it: for `tests/fuzz`.
///
/// # Errors
/// What is wrong with it.
#[doc(hidden)]
pub fn decode(message: drift_proto::v1::WorkerMessage) -> Result<(), String> {
    wire::incoming(message).map(drop)
}
