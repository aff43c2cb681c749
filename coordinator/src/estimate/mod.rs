//! What a run needs of memory and time, from a model's `config.json` and settings alone:
//! before money is spent on GPUs.
//!
//! | module | |
//! |---|---|
//! | [`shape`] | how many weights of which kind a model has |
//! | [`memory`] | bytes of one worker in each phase, and settings that fit |
//! | [`time`] | seconds of each phase, at rates that are stated |
//!
//! The counts follow the worker's engine (`worker/src/train`, `worker/src/sample`), and a
//! test compares them with what workers take (`tests/plan.rs`).

pub mod memory;
pub mod shape;
pub mod time;

pub use memory::{Fit, Footprint, Phase, Work};
pub use shape::{Shape, ShapeError};
pub use time::{Amounts, Rates, Times};
