//! One file per thing the program does.

mod check;
mod compare;
mod data;
mod model;
mod reading;
mod run;
mod verify;

pub use check::check;
pub use compare::compare;
pub use data::data;
pub use run::{Exit, run};
pub use verify::verify;
