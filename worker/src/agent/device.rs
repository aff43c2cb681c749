//! Which device the worker computes on.

use tch::{Cuda, Device};

/// Why there is no device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// A spelling that means none.
    #[error("--device {0:?}: expected auto, cpu or cuda:N")]
    Unknown(String),
    /// A GPU was asked of a build or a machine without one.
    #[error(
        "--device cuda:{asked}: libtorch sees {seen} GPUs here; take --device cpu, or a build with CUDA on a machine that has the GPU"
    )]
    NoGpu {
        /// The GPU asked for.
        asked: usize,
        /// How many there are.
        seen: i64,
    },
}

/// Takes `auto`, `cpu` or `cuda:N` for what it says. `auto` gives worker `slot`
/// GPU `slot` where there are that many, and the CPU otherwise.
///
/// # Errors
/// An unknown spelling, or a GPU that is not there: never another device instead.
pub fn choose_device(name: &str, slot: u32) -> Result<Device, DeviceError> {
    let gpus = if Cuda::is_available() { Cuda::device_count() } else { 0 };
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" if i64::from(slot) < gpus => Ok(Device::Cuda(slot as usize)),
        "auto" => Ok(Device::Cpu),
        _ => {
            let asked = name
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .ok_or_else(|| DeviceError::Unknown(name.to_owned()))?;
            if (asked as i64) < gpus {
                Ok(Device::Cuda(asked))
            } else {
                Err(DeviceError::NoGpu { asked, seen: gpus })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_gpu_is_an_error_and_never_the_cpu_instead() {
        assert_eq!(choose_device("cpu", 3), Ok(Device::Cpu));
        let asked = choose_device("cuda:512", 0);
        assert!(matches!(asked, Err(DeviceError::NoGpu { asked: 512, .. })), "{asked:?}");
        assert_eq!(choose_device("gpu", 0), Err(DeviceError::Unknown("gpu".to_owned())));
    }
}
