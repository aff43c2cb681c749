//! Log lines that do not tear the progress bars, and the run's log file.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use indicatif::MultiProgress;
use tracing::Subscriber;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::progress::Progress;
use crate::config::LogFormat;

/// The run's log file; lines go to it from when it is opened.
#[derive(Debug, Clone, Default)]
pub struct LogFile(Arc<OnceLock<File>>);

impl LogFile {
    /// Takes lines to the end of the file at `path` from now on.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(&self, path: &Path) -> anyhow::Result<()> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("open log file {}", path.display()))?;
        // A second file of one process has no reader; the first stays.
        let _ = self.0.set(file);
        Ok(())
    }
}

impl Write for &LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.get().map_or(Ok(line.len()), |mut file| file.write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for LogFile {
    type Writer = &'w LogFile;

    fn make_writer(&'w self) -> Self::Writer {
        self
    }
}

/// Sends the process's log lines to standard error, past `progress`'s bars, and
/// to the file that is returned, once it is opened.
///
/// `filter` is in `tracing`'s words: `info`, or `warn,drift_coordinator::run=debug`.
///
/// # Errors
/// A filter that cannot be read, or a second call.
pub fn init(progress: &Progress, format: LogFormat, filter: &str) -> anyhow::Result<LogFile> {
    let filter = parse_filter(filter)?;
    let past_bars = PastBars(progress.bars().clone());
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let file = LogFile::default();
    tracing_subscriber::registry()
        .with(filter)
        .with(layer(format, past_bars, colours))
        .with(layer(format, file.clone(), false))
        .try_init()
        .context("set up logging, which this process has already")?;
    Ok(file)
}

fn parse_filter(filter: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::builder().parse(filter).with_context(|| {
        format!("read log filter {filter:?}; expected a level, or module=level, such as \"warn,drift_coordinator::run=debug\"")
    })
}

fn layer<S, W>(format: LogFormat, writer: W, colours: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    match format {
        LogFormat::Text => layer.with_target(false).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    }
}

/// Standard error with the bars taken off the screen while a line is written.
#[derive(Clone)]
struct PastBars(MultiProgress);

impl<'w> MakeWriter<'w> for PastBars {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        self.clone()
    }
}

impl Write for PastBars {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().lock().write_all(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_cannot_be_read_says_what_is_expected() {
        parse_filter("warn,drift_coordinator::run=debug").unwrap();
        let message = format!("{:#}", parse_filter("drift=loud").unwrap_err());
        assert!(message.contains("read log filter \"drift=loud\"; expected a level"), "{message}");
    }

    #[test]
    fn lines_of_the_file_are_whole_and_json_where_asked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = Arc::new(file.reopen().unwrap());
        let subscriber = tracing_subscriber::registry().with(layer(LogFormat::Json, writer, false));
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("run", iteration = 1);
            span.in_scope(|| tracing::warn!(worker = 3, "worker lost"));
        });
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(text.lines().count(), 1);
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["message"], "worker lost");
        assert_eq!(line["worker"], 3);
        assert_eq!(line["span"]["iteration"], 1);
    }
}
