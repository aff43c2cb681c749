//! One file per thing the program does.

mod check;
mod compare;
mod data;
mod model;
mod plan;
mod reading;
mod run;
mod verify;

pub use check::check;
pub use compare::compare;
pub use data::data;
pub use plan::plan;
pub use run::{Exit, run};
pub use verify::verify;
