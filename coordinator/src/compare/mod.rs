//! Runs side by side: what training measured, and what was drawn, by iteration.
//!
//! | file | owns |
//! |---|---|
//! | [`measure`](self) | one run's quantities, from its `metrics.jsonl` and `pairs.parquet` |
//! | [`table`] | all runs' quantities, for people |
//! | [`plots`] | the same as lines, as SVG and PNG |
//!
//! Only files are read, so runs can be compared while they go on.

mod measure;
pub mod plots;
pub mod table;

pub use measure::{Measured, QUANTITIES, Quantity, RunMeasures, measure};
