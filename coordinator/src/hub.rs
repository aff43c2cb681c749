//! Files on the hub: models by name, corpora as `hf://datasets/OWNER/NAME/PATH`.
//!
//! The cache is the one that all of Hugging Face's programs share, under `HF_HOME`;
//! `HF_ENDPOINT` says where the hub is, `HF_TOKEN` (or the token that `hf auth login` left)
//! lets into what is not public. A download that was cut goes on where it ended.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::Progress as HubProgress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::ui::{Activity, Bar, Progress};

/// How a file of a data set is named.
const DATASETS: &str = "hf://datasets/";
/// Attempts that follow one that failed, each going on where that ended.
const RETRIES: usize = 4;

/// A file of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFile {
    /// As it was named.
    name: String,
    /// `OWNER/NAME`.
    repo: String,
    /// Branch, tag or commit.
    revision: String,
    /// In the data set.
    path: String,
}

impl DatasetFile {
    /// What `name` means; none if it is not on the hub.
    ///
    /// # Errors
    /// A name on the hub that lacks its owner, name or path.
    pub fn parse(name: &str) -> Result<Option<Self>> {
        let Some(rest) = name.strip_prefix(DATASETS) else {
            if name.starts_with("hf://") {
                bail!("{name}: expected hf://datasets/OWNER/NAME/PATH");
            }
            return Ok(None);
        };
        let parts: Vec<_> = rest.splitn(3, '/').collect();
        let [owner, repo, path] = parts[..] else {
            bail!("{name}: expected hf://datasets/OWNER/NAME/PATH");
        };
        let (repo, revision) = repo.split_once('@').unwrap_or((repo, "main"));
        let is_sound =
            |part: &str| !part.is_empty() && part.split('/').all(|p| p != ".." && !p.is_empty());
        if ![owner, repo, revision, path].into_iter().all(is_sound) {
            bail!("{name}: expected hf://datasets/OWNER/NAME/PATH");
        }
        Ok(Some(Self {
            name: name.to_owned(),
            repo: format!("{owner}/{repo}"),
            revision: revision.to_owned(),
            path: path.to_owned(),
        }))
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Dataset, self.revision.clone())
    }

    /// Where the cache has it, if it does.
    pub fn cached(&self) -> Option<PathBuf> {
        Cache::from_env().repo(self.repo()).get(&self.path)
    }

    /// Downloads it, unless the cache has it.
    ///
    /// # Errors
    /// What the hub said, and what to do.
    pub fn fetch(&self, progress: &Progress) -> Result<PathBuf> {
        match self.cached() {
            Some(path) => Ok(path),
            None => get(&open(self.repo())?, &self.path, progress)
                .with_context(|| format!("corpus {}", self.name)),
        }
    }
}

/// Where a corpus lies: a path as it is, or in the cache.
///
/// # Errors
/// A file of the hub that was not downloaded.
pub fn local(name: &str) -> Result<PathBuf> {
    match DatasetFile::parse(name)? {
        None => Ok(PathBuf::from(name)),
        Some(file) => file.cached().with_context(|| {
            format!("{name}: not in the hub's cache any more; start the run again to fetch it")
        }),
    }
}

/// The model's folder in the cache, if a run can use it.
pub fn cached_model(name: &str) -> Option<PathBuf> {
    let config = Cache::from_env().repo(Repo::model(name.to_owned())).get("config.json")?;
    config.parent().map(Path::to_path_buf)
}

/// Downloads what a run needs of a model, or finds it in the cache.
///
/// # Errors
/// What the hub said, and what to do.
pub fn fetch_model(name: &str, progress: &Progress) -> Result<PathBuf> {
    let repo = open(Repo::model(name.to_owned()))?;
    let cache = Cache::from_env().repo(Repo::model(name.to_owned()));
    let info = match (repo.info(), cached_model(name)) {
        (Ok(info), _) => info,
        // A machine without a network goes on with what another start fetched.
        (Err(error), Some(folder)) => {
            tracing::warn!(%error, "the hub does not answer; take the model from its cache");
            return Ok(folder);
        }
        (Err(cause), None) => return Err(explain(cause, "the list of the model's files")),
    };
    let wanted = |file: &str| {
        !file.contains('/')
            && (file.ends_with(".safetensors")
                || file.ends_with(".json")
                || file.ends_with(".jinja")
                || matches!(file, "merges.txt" | "tokenizer.model"))
    };
    let mut folder = None;
    for file in info.siblings.iter().map(|sibling| &sibling.rfilename).filter(|f| wanted(f)) {
        let path = match cache.get(file) {
            Some(path) => path,
            None => get(&repo, file, progress)?,
        };
        if file == "config.json" {
            folder = path.parent().map(Path::to_path_buf);
        }
    }
    folder.context("the model has no config.json")
}

fn open(repo: Repo) -> Result<ApiRepo> {
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty());
    let mut builder = ApiBuilder::from_env().with_retries(RETRIES);
    if token.is_some() {
        builder = builder.with_token(token.map(|token| token.trim().to_owned()));
    }
    Ok(builder.build().context("set up the hub's client")?.repo(repo))
}

fn get(repo: &ApiRepo, file: &str, progress: &Progress) -> Result<PathBuf> {
    let shown = Shown { progress: progress.clone(), bar: None, done: 0 };
    repo.download_with_progress(file, shown).map_err(|cause| explain(cause, file))
}

/// What the hub's answer means to whoever asked.
fn explain(cause: ApiError, what: &str) -> anyhow::Error {
    let told = cause.to_string();
    let remedy = if told.contains("status: 401") || told.contains("status: 403") {
        "the hub does not let in: set HF_TOKEN to a token of yours that may read it, and accept the repository's terms on its page if it has any"
    } else if told.contains("status: 404") {
        "the hub has no such file or repository, or hides it without a token (HF_TOKEN); check its name"
    } else {
        "check the network, and HF_ENDPOINT if you set it; started again, the download goes on where it was cut"
    };
    anyhow!("download {what}: {told}; {remedy}")
}

/// A bar for one file.
struct Shown {
    progress: Progress,
    bar: Option<Bar>,
    done: u64,
}

impl HubProgress for Shown {
    fn init(&mut self, size: usize, file: &str) {
        // Told again when a download goes on.
        if self.bar.is_none() {
            let activity = Activity::Downloading { file: file.to_owned(), bytes: size as u64 };
            self.bar = Some(self.progress.begin(activity));
        }
        self.done = 0;
    }

    fn update(&mut self, more: usize) {
        self.done += more as u64;
        if let Some(bar) = &self.bar {
            bar.set(self.done);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_of_data_sets_are_told_from_paths() {
        let parse = |name| DatasetFile::parse(name).unwrap();
        assert_eq!(parse("data/a.json"), None);
        let file = parse("hf://datasets/HuggingFaceH4/uf/data/train.parquet").unwrap();
        assert_eq!(
            (file.repo.as_str(), file.revision.as_str(), file.path.as_str()),
            ("HuggingFaceH4/uf", "main", "data/train.parquet")
        );
        assert_eq!(parse("hf://datasets/a/b@v1.0/c").unwrap().revision, "v1.0");
        for bad in
            ["hf://a/b/c", "hf://datasets/a/b", "hf://datasets/a/b/", "hf://datasets/a/b/../c"]
        {
            let message = DatasetFile::parse(bad).unwrap_err().to_string();
            assert!(message.contains("hf://datasets/OWNER/NAME/PATH"), "{message}");
        }
    }
}
