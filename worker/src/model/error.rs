//! What can be wrong with a model's files.

use std::path::{Path, PathBuf};

use tch::TchError;

/// A model that could not be read, built or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried, as a verb: "open", "write to".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file that is not what its name promises: broken JSON, a lying header,
    /// a field out of range.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The place in it, what was found, and what was expected.
        problem: String,
    },
    /// A sound description of a model that the worker does not compute.
    #[error("{}: {field} is {found}, but the worker supports {supported}", path.display())]
    Unsupported {
        /// The file, as a rule `config.json`.
        path: PathBuf,
        /// The field's name, dotted where nested.
        field: String,
        /// What the file says.
        found: String,
        /// What would have been accepted.
        supported: String,
    },
    /// Tensors that the configuration calls for are absent from the files.
    #[error("{}: {} missing: {}; is the file whole, and of this model?", path.display(), plural(names), list(names))]
    MissingTensors {
        /// The weight file, or the index over several.
        path: PathBuf,
        /// Their Hugging Face names.
        names: Vec<String>,
    },
    /// Tensors in the files that the configuration has no place for.
    #[error("{}: {} that config.json has no place for: {}", path.display(), plural(names), list(names))]
    UnexpectedTensors {
        /// The weight file.
        path: PathBuf,
        /// Their names.
        names: Vec<String>,
    },
    /// A tensor of another shape than the configuration's.
    #[error("{}: tensor {name} has shape {found:?}, but config.json calls for {expected:?}", path.display())]
    Shape {
        /// The weight file.
        path: PathBuf,
        /// The tensor's Hugging Face name.
        name: String,
        /// The file's shape.
        found: Vec<usize>,
        /// The configuration's shape.
        expected: Vec<usize>,
    },
    /// libtorch refused: out of memory, no such device.
    #[error(transparent)]
    Torch(#[from] TchError),
}

impl ModelError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), problem: problem.into() }
    }

    pub(crate) fn unsupported(
        path: &Path,
        field: &str,
        found: impl ToString,
        supported: &str,
    ) -> Self {
        Self::Unsupported {
            path: path.to_path_buf(),
            field: field.to_owned(),
            found: found.to_string(),
            supported: supported.to_owned(),
        }
    }
}

fn plural(names: &[String]) -> String {
    match names.len() {
        1 => "1 tensor".to_owned(),
        n => format!("{n} tensors"),
    }
}

/// The first few names: a wrong model lacks hundreds.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
