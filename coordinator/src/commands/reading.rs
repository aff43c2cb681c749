//! A bar for each corpus file.

use std::path::{Path, PathBuf};

use crate::ui::{Activity, Bar, Progress};

/// Shows how far the file in hand is read.
pub(super) struct ReadingBar<'p> {
    progress: &'p Progress,
    current: Option<(PathBuf, Bar)>,
}

impl<'p> ReadingBar<'p> {
    pub(super) fn new(progress: &'p Progress) -> Self {
        Self { progress, current: None }
    }

    /// `done` of the `bytes` of `file` are read.
    pub(super) fn update(&mut self, file: &Path, bytes: u64, done: u64) {
        if self.current.as_ref().is_none_or(|(shown, _)| shown != file) {
            self.close();
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
            let bar = self.progress.begin(Activity::Reading { file: name, bytes });
            self.current = Some((file.to_owned(), bar));
        }
        if let Some((_, bar)) = &self.current {
            bar.set(done);
        }
    }

    pub(super) fn close(&mut self) {
        if let Some((_, bar)) = self.current.take() {
            bar.finish();
        }
    }
}
