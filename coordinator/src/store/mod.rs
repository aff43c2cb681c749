//! The run directory: everything that outlives a process, and nothing else.
//!
//! ```text
//! <run-dir>/
//!   lock                          held by the one live coordinator
//!   config.toml                   the resolved configuration, frozen
//!   journal.sqlite                phases, samples, ratings, references, steps
//!   iterations/00/ 01/ …          00 is the warm start
//!     pairs.parquet               what is trained on
//!     metrics.jsonl               a view of the journal's steps
//!     checkpoint/                 Hugging Face format, and manifest.json
//!   snapshots/01-epoch-0/ …       training state inside an iteration
//!   join/                         what lets workers in, while a coordinator runs
//!   logs/                         coordinator.log, worker-0.log, …
//!   summary.json
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`run_dir`] | the layout, and the exclusive lock |
//! | [`publish`] | written aside, synced, renamed: the only way a file or folder gets its name |
//! | [`manifest`] | sizes and SHA-256 of a folder's files |
//! | [`journal`] | the one SQLite database: what has happened, in order |
//! | [`pairs`] | `pairs.parquet` |
//! | [`metrics`] | `metrics.jsonl` |
//! | [`names`] | what all of these are called |
//! | [`verify`](mod@verify) | whether each file is still the one that was written |
//! | [`secrets`] | `join/`: readable by its owner alone |
//! | [`error`] | what went wrong, with which file, and what to do about it |
//!
//! Absent from here: clocks, chance, the network, and any decision about what
//! the run does next. Times are passed in.

pub mod error;
pub mod journal;
pub mod manifest;
pub mod metrics;
pub mod names;
pub mod pairs;
pub mod publish;
pub mod run_dir;
pub mod secrets;
pub mod verify;

pub use error::StoreError;
pub use journal::{
    Commit, CommittedPhase, Entry, Journal, JournalWriter, RunMeta, StepRecord, TO_BE_RATED,
};
pub use manifest::{FileEntry, Manifest, Subject, VerifyError};
pub use run_dir::RunDir;
