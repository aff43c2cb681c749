//! The coordinator: text, data, order, durability and people.
//!
//! | module | owns |
//! |---|---|
//! | [`cli`], [`commands`] | what can be typed, and what it does |
//! | [`compare`] | runs side by side, as tables and plots |
//! | [`config`] | layers of settings, checked and frozen |
//! | [`estimate`] | memory and time of a run on GPUs, counted |
//! | [`domain`] | the words all other modules speak: conversations, pairs, ids |
//! | [`corpus`] | files of conversations → DSAT samples, SAT samples, seed pairs |
//! | [`text`] | chat template and tokenizer: conversations → token ids, and back |
//! | [`hub`] | models and corpora that are fetched by name |
//! | [`method`] | what is sampled, and which reply is preferred |
//! | [`run`] | the pure state machine, its plans, and the driver that feeds it |
//! | [`server`] | the gRPC door, and the launcher of local workers |
//! | [`store`] | the run directory: journal, pairs, checkpoints |
//! | [`ui`] | progress, the closing table, metrics |
//!
//! libtorch is absent from this crate and everything it depends on.

pub mod cli;
pub mod commands;
pub mod compare;
pub mod config;
mod contain;
pub mod corpus;
pub mod domain;
pub mod estimate;
pub mod hub;
pub mod method;
pub mod run;
pub mod server;
pub mod store;
pub mod text;
pub mod ui;
