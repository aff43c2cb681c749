//! What workers wrote becomes a snapshot, and the last one a checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Session;
use crate::config::DType;
use crate::domain::{Epoch, Iteration, Step};
use crate::run::command::WrittenFile;
use crate::store::journal::{manifest_behind, manifest_of};
use crate::store::manifest::MANIFEST;
use crate::store::publish::{begin_staging, publish_dir, staging};
use crate::store::{FileEntry, Journal, Manifest, RunDir, Subject};

/// What a manifest of this run says it belongs to.
pub(super) fn subject(session: &Session, k: Iteration) -> Subject {
    Subject {
        run_id: session.run_id.clone(),
        drift_version: env!("CARGO_PKG_VERSION").to_owned(),
        iteration: k,
        base_model: base_name(&session.settings.model),
    }
}

/// Last part of a path or of a hub name.
pub(crate) fn base_name(model: &str) -> String {
    let path = Path::new(model);
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A staging folder with all of a checkpoint but its weights, for a worker to
/// write them into.
pub(super) fn begin_model(session: &Session, k: Iteration, epoch: Epoch) -> Result<PathBuf> {
    let folder = begin_staging(&session.run.snapshot(k, epoch))?;
    for file in session.prepared.text.files() {
        let target = folder.join(&file.name);
        fs::copy(&file.source, &target)
            .with_context(|| format!("copy {} to {}", file.source.display(), target.display()))?;
    }
    write_config(session, &folder)?;
    Ok(folder)
}

/// Copies `config.json`, with the type that the weights are written in: it is
/// what `dtype="auto"` loads.
fn write_config(session: &Session, folder: &Path) -> Result<()> {
    let source = session.model_dir.join("config.json");
    let text = fs::read(&source).with_context(|| format!("read {}", source.display()))?;
    let mut config: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("parse {}", source.display()))?;
    let dtype = match session.settings.training.dtype {
        DType::Bf16 => "bfloat16",
        DType::F32 => "float32",
    };
    let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    config[key] = dtype.into();
    let target = folder.join("config.json");
    let mut json = serde_json::to_vec_pretty(&config)?;
    json.push(b'\n');
    fs::write(&target, json).with_context(|| format!("write {}", target.display()))
}

/// Gives a staged snapshot its manifest and its name.
pub(super) fn keep_snapshot(target: &Path, files: &[WrittenFile], subject: Subject) -> Result<()> {
    let staged = staging(target);
    let known: BTreeMap<_, _> = files
        .iter()
        .map(|file| (file.name.clone(), FileEntry::new(file.bytes, &file.sha256)))
        .collect();
    Manifest::build(&staged, subject, &known, &mut |_| {})?.save(&staged)?;
    publish_dir(&staged, target)?;
    Ok(())
}

/// Records the manifest of an epoch's snapshot, which vouches for all its files.
pub(super) fn seal(run: &RunDir, journal: &mut Journal, k: Iteration, epoch: Epoch) -> Result<()> {
    let path = run.snapshot(k, epoch).join(MANIFEST);
    journal.record_file(&manifest_of(k, epoch), &FileEntry::of_file(&path, &mut |_| ())?)?;
    Ok(())
}

/// The same, of a snapshot inside an epoch: one that is not recorded is not used.
pub(super) fn seal_step(
    run: &RunDir,
    journal: &mut Journal,
    k: Iteration,
    step: Step,
) -> Result<()> {
    let path = run.step_snapshot(k, step).join(MANIFEST);
    journal.record_file(&manifest_behind(k, step), &FileEntry::of_file(&path, &mut |_| ())?)?;
    Ok(())
}

/// Renames the last snapshot into the checkpoint's place.
pub(super) fn publish(snapshot: &Path, checkpoint: &Path) -> Result<()> {
    if !snapshot.exists() && checkpoint.exists() {
        // Killed after the rename and before its commit.
        Manifest::load(checkpoint)?.verify(checkpoint)?;
        return Ok(());
    }
    if let Some(parent) = checkpoint.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    publish_dir(snapshot, checkpoint)?;
    Ok(())
}
