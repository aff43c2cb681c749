//! The run: a pure state machine, its plans, and the driver that feeds it.
//!
//! Everything that decides is synchronous and takes its time as an argument;
//! [`driver`] alone talks to the world.

pub mod command;
pub mod driver;
pub mod forecast;
pub mod health;
pub mod machine;
pub mod metrics;
pub mod objective;
pub mod plan;

pub use command::{Command, ModelSource, PairRef, Report, StepOutcomes};
pub use machine::{Effect, Event, Machine, Outcome, PairSets, Position, Resume, RunShape};
pub use metrics::{EvaluationMetrics, PairOutcome, StepMetrics};
