//! Whole-system tests: real processes, a real model, real peers.
//!
//! `make test` runs them. They need what `make setup` installs: the virtual
//! environment with the pinned peers, and the demo model.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

mod support;

mod corpus;
mod demo;
mod determinism;
mod door;
mod model_parity;
mod run;
mod text_parity;
mod train_memory;
mod train_parity;
