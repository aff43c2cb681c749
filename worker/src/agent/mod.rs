//! The stream to the coordinator, and the thread that owns libtorch.

mod connect;
mod device;
mod engine;
mod hearing;
mod interface;
mod join;
mod place;
mod stream;
mod wire;

pub use connect::ConnectError;
pub use device::{DeviceError, choose_device};
pub use interface::InterfaceError;
pub use join::{JoinError, JoinOptions};
pub use place::Unseen;
pub use stream::{AgentError, AgentOptions, run};
