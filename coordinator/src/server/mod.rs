//! The gRPC door, and the launcher of local workers.

mod door;
mod launch;
mod service;
mod wire;

pub use door::JoinToken;
pub use launch::{LaunchError, LaunchPlan, Launcher, WorkerExit, find_worker, threads_per_worker};
pub use service::{AttachPlan, Link, LinkId, Origin, Server, WorkerEvent};
pub use wire::{Outgoing, PairBatch};
