//! The stream to the coordinator, and the thread that owns libtorch.

mod device;
mod engine;
mod stream;
mod wire;

pub use device::{DeviceError, choose_device};
pub use stream::{AgentError, AgentOptions, run};
