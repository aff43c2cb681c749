//! Whole-system tests: real processes, a real model, real peers.
//!
//! `make test` runs them. They need what `make setup` installs: the virtual
//! environment with the pinned peers, and the demo model.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

mod support;

mod compare;
mod corpus;
mod damage;
mod demo;
mod determinism;
mod disk;
mod door;
mod hosts;
mod hub;
mod methods;
mod model_parity;
mod presets;
mod recovery;
mod reward_parity;
mod run;
mod sample_parity;
mod scale;
mod slurm;
mod stop_strings;
mod text_parity;
mod train_memory;
mod train_parity;
