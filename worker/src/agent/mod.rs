//! The stream to the coordinator, and the thread that owns libtorch.

mod connect;
mod device;
mod engine;
mod hearing;
mod interface;
mod join;
mod place;
mod stream;
mod watch;
mod wire;

pub use connect::ConnectError;
pub use device::{DeviceError, choose_device};
pub use interface::InterfaceError;
pub use join::{JoinError, JoinOptions};
pub use place::Unseen;
pub use stream::{AgentError, AgentOptions, device_name, run};
pub use watch::Watch;

/// Decodes a coordinator's message as the agent does, and drops it: for `tests/fuzz`.
///
/// # Errors
/// What is wrong with it.
#[doc(hidden)]
pub fn decode(body: drift_proto::v1::coordinator_message::Body) -> Result<(), String> {
    wire::command(body).map(drop)
}
