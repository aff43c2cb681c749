//! What people see while a run goes on, and at its end.
//!
//! | module | owns |
//! |---|---|
//! | [`progress`] | bars on a terminal, plain log lines elsewhere |
//! | [`checking`] | a bar for reading files through, once that takes long |
//! | [`logging`] | log lines that do not tear the bars, and the run's log file |
//! | [`step_line`] | one line for each training step |
//! | [`summary`] | `summary.json`, and the closing table |
//! | [`format`](mod@format) | numbers as people read them |
//!
//! Nothing here decides anything: it is told what happened, and shows it.

pub mod checking;
pub mod format;
pub mod logging;
pub mod progress;
pub mod step_line;
pub mod summary;

pub use crate::config::LogFormat;
pub use checking::CheckingBar;
pub use progress::{Activity, Bar, Progress};
pub use summary::RunSummary;
