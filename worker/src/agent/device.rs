//! Which device the worker computes on.

use std::path::Path;

use tch::{Cuda, Device};
use tracing::warn;

/// There where NVIDIA's driver is loaded.
const NVIDIA_DRIVER: &str = "/dev/nvidiactl";
/// What gives a worker for GPUs.
const BUILD: &str = "build it with `cargo build --release --features cuda`";

/// Why there is no device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// A spelling that means none.
    #[error("--device {0:?}: expected auto, cpu or cuda:N")]
    Unknown(String),
    /// A GPU was asked of a build that knows none.
    #[error("--device cuda:{0}: this worker was built for CPUs; {BUILD}, or take --device cpu")]
    NotBuilt(usize),
    /// A GPU was asked of a machine without it.
    #[error(
        "--device cuda:{asked}: libtorch sees {seen} GPUs here; see what `nvidia-smi` and CUDA_VISIBLE_DEVICES say, or take --device cpu"
    )]
    NoGpu {
        /// The GPU asked for.
        asked: usize,
        /// How many there are.
        seen: i64,
    },
}

/// Takes `auto`, `cpu` or `cuda:N` for what it says. `auto` deals the GPUs that this
/// process sees out to workers by their slots: on a machine of several all of them, in a
/// job step that was given one, that one. Where there is none it is the CPU.
///
/// # Errors
/// An unknown spelling, or a GPU that is not there: never another device instead.
pub fn choose_device(name: &str, slot: u32) -> Result<Device, DeviceError> {
    let gpus = if Cuda::is_available() { Cuda::device_count() } else { 0 };
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" if gpus > 0 => Ok(Device::Cuda(dealt(slot, gpus as usize))),
        "auto" => {
            if !cfg!(feature = "cuda") && Path::new(NVIDIA_DRIVER).exists() {
                warn!("this machine has GPUs, and this worker was built for CPUs: {BUILD}");
            }
            Ok(Device::Cpu)
        }
        _ => {
            let asked = name
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .ok_or_else(|| DeviceError::Unknown(name.to_owned()))?;
            if !cfg!(feature = "cuda") {
                Err(DeviceError::NotBuilt(asked))
            } else if (asked as i64) < gpus {
                Ok(Device::Cuda(asked))
            } else {
                Err(DeviceError::NoGpu { asked, seen: gpus })
            }
        }
    }
}

/// The GPU of worker `slot` where each machine has `gpus` of them and as many workers.
fn dealt(slot: u32, gpus: usize) -> usize {
    slot as usize % gpus
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_dealt_out_by_slot() {
        // Two machines of four; a job step that sees one.
        assert_eq!([0, 3, 4, 7].map(|slot| dealt(slot, 4)), [0, 3, 0, 3]);
        assert_eq!(dealt(6, 1), 0);
    }

    #[test]
    fn a_missing_gpu_is_an_error_and_never_the_cpu_instead() {
        assert_eq!(choose_device("cpu", 3), Ok(Device::Cpu));
        let asked = choose_device("cuda:512", 0);
        let expected = match cfg!(feature = "cuda") {
            true => DeviceError::NoGpu { asked: 512, seen: tch::Cuda::device_count() },
            false => DeviceError::NotBuilt(512),
        };
        assert_eq!(asked, Err(expected));
        assert_eq!(choose_device("gpu", 0), Err(DeviceError::Unknown("gpu".to_owned())));
    }
}
