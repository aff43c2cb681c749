//! One file per thing the program does.

mod data;
mod model;
mod reading;
mod run;
mod verify;

pub use data::data;
pub use run::{Exit, run};
pub use verify::verify;
