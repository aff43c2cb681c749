//! One file per thing the program does.

mod data;
mod model;
mod reading;
mod run;

pub use data::data;
pub use run::{Exit, run};
