//! The stream to the coordinator, and the thread that owns libtorch.

mod connect;
mod device;
mod engine;
mod hearing;
mod join;
mod stream;
mod watch;
mod wire;

pub use connect::ConnectError;
pub use device::{DeviceError, choose_device};
pub use join::{JoinError, JoinOptions};
pub use stream::{AgentError, AgentOptions, device_name, run};
pub use watch::Watch;
