//! The gRPC door, and the launcher of local workers.

mod door;
mod launch;
mod service;
mod wire;

pub use door::JoinToken;
pub use launch::{LaunchError, Launcher, WorkerExit, find_worker, threads_per_worker};
pub use service::{AttachPlan, Link, Server, WorkerEvent};
pub use wire::{Outgoing, PairBatch};
