//! What goes between the host and the device: through here, and nowhere else.
//!
//! On a GPU a read waits until all that was queued before it is done, and the host then has
//! nothing queued: it is what a decode or training loop must not do without need. So clippy
//! forbids libtorch's own methods for it in this crate (`clippy.toml`), and tests count
//! what each loop does:
//!
//! | loop | reads | uploads |
//! |---|---|---|
//! | decode step | 1: the candidates of all rows, and 1 for each row that they do not settle | 5: ids, positions, places, whose states are wanted, and where the rows are that decode; and one for each shared beginning, and for each prompt that is read further (these and the fifth twice behind a window), for each that begins as another, and where replies end |
//! | decode step with a repetition penalty, or too early for stop ids | 1, as above | one more for each such row, and each of both |
//! | sequences embedded together | 1 | 3 |
//! | sequence rated | 1: its rating | 1 by an encoder, 3 by a decoder |
//! | micro-batch scored | 1: the scores of its rows | 4: ids, positions, predictors, targets |
//! | micro-batch trained on | 1: the same | 8: those, coefficients, and 3 that say which tokens the embedding's gradients are of |
//! | step | 1: the norm by which gradients are clipped | 0 |
//!
//! On a CPU, where a read costs a copy, a decode step reads 3 times: what each row's scores sum
//! to, those near the best, and what was drawn. Masks are made on the device; tensors that a checkpoint or a snapshot holds
//! cross outside of these loops.

#![allow(clippy::disallowed_methods, reason = "the one place for them")]

use tch::kind::Element;
use tch::{Device, Kind, TchError, Tensor};

/// `values` on `device`, `[values.len()]`.
///
/// To a GPU they go from pinned memory, behind what is queued there, and the host goes on.
pub(crate) fn upload<T: Element>(values: &[T], device: Device) -> Result<Tensor, TchError> {
    count::upload();
    let values = Tensor::f_from_slice(values)?;
    match device {
        Device::Cuda(_) => {
            // libtorch keeps the pinned block until the copy from it is done.
            values.f_pin_memory(device)?.f_to_device_(device, values.f_kind()?, true, false)
        }
        _ => values.f_to_device(device),
    }
}

/// All elements of `tensor` as fp32, in its order.
pub(crate) fn read(tensor: &Tensor) -> Result<Vec<f32>, TchError> {
    count::read();
    Vec::try_from(tensor.f_reshape([-1])?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?)
}

/// The only element of `tensor`.
pub(crate) fn read_one(tensor: &Tensor) -> Result<f64, TchError> {
    count::read();
    tensor.f_view([1])?.f_double_value(&[0])
}

#[cfg(not(test))]
mod count {
    pub(super) fn read() {}
    pub(super) fn upload() {}
}

/// How often something crossed on this thread.
#[cfg(test)]
pub(crate) mod count {
    use std::cell::Cell;

    thread_local! {
        static CROSSINGS: Cell<Crossings> = Cell::default();
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) struct Crossings {
        pub(crate) reads: u64,
        pub(crate) uploads: u64,
    }

    pub(super) fn read() {
        let Crossings { reads, uploads } = CROSSINGS.get();
        CROSSINGS.set(Crossings { reads: reads + 1, uploads });
    }

    pub(super) fn upload() {
        let Crossings { reads, uploads } = CROSSINGS.get();
        CROSSINGS.set(Crossings { reads, uploads: uploads + 1 });
    }

    /// Those since this was last called.
    pub(crate) fn take() -> Crossings {
        CROSSINGS.take()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_crosses_is_the_same_and_counted() {
        count::take();
        let up = upload(&[3i64, 1, 2], Device::Cpu).unwrap();
        assert_eq!(read(&up.f_view([3, 1]).unwrap()).unwrap(), [3.0, 1.0, 2.0]);
        assert_eq!(read_one(&up.f_narrow(0, 2, 1).unwrap()).unwrap(), 2.0);
        assert_eq!(count::take(), count::Crossings { reads: 2, uploads: 1 });
    }

    /// Conversions of tensors are a trait's, which clippy cannot tell from those of integers.
    #[test]
    fn no_other_file_converts_tensors_to_values() {
        let conversions = ["Vec::try_from(", ">::try_from(", "f32::try_from(", "f64::try_from("];
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let is_for_tests = path.components().any(|c| c.as_os_str() == "tests");
                if is_for_tests || path.ends_with("tests.rs") || path.ends_with("host.rs") {
                    continue;
                }
                let Ok(text) = std::fs::read_to_string(&path) else { continue };
                let code = text.split("#[cfg(test)]").next().unwrap();
                let converts = |line: &&str| conversions.iter().any(|name| line.contains(name));
                found.extend(
                    code.lines().filter(converts).map(|line| format!("{}: {line}", path.display())),
                );
            }
        }
        assert_eq!(found, Vec::<String>::new(), "use crate::host");
    }
}
