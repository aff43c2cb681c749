//! Where the model is: a folder, a folder of models, or the hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::Settings;
use crate::hub;
use crate::ui::Progress;

/// The folder of `settings.model`; fetched from the hub if it names one there
/// and no local folder has it.
///
/// # Errors
/// No such folder, or a hub that cannot be reached.
pub(super) fn find_model(settings: &Settings, progress: &Progress) -> Result<PathBuf> {
    if let Some(folder) = local_folder(settings)? {
        return Ok(folder);
    }
    hub::fetch_model(&settings.model, progress).with_context(|| {
        format!(
            "model {}: not in {} and not to be had from the hub; download it there, or name a folder with --model",
            settings.model, settings.models_dir
        )
    })
}

/// The folder of `settings.model`, if this machine has it; nothing is fetched.
///
/// # Errors
/// A folder that holds no model, and a name that none can have.
pub(super) fn local_model(settings: &Settings) -> Result<Option<PathBuf>> {
    Ok(local_folder(settings)?.or_else(|| hub::cached_model(&settings.model)))
}

fn local_folder(settings: &Settings) -> Result<Option<PathBuf>> {
    let named = Path::new(&settings.model);
    if named.is_dir() {
        if !named.join("config.json").is_file() {
            bail!(
                "model {}: the folder has no config.json; it takes a model in Hugging Face format",
                named.display()
            );
        }
        return Ok(Some(std::path::absolute(named)?));
    }
    let local = Path::new(&settings.models_dir).join(named.file_name().unwrap_or_default());
    if local.join("config.json").is_file() {
        return Ok(Some(std::path::absolute(local)?));
    }
    let parts: Vec<_> = settings.model.split('/').collect();
    let is_hub_name =
        parts.len() == 2 && parts.iter().all(|part| !part.is_empty() && *part != "..");
    if !is_hub_name || settings.model.starts_with('.') {
        bail!(
            "model {}: no such folder, nor {}; give a folder in Hugging Face format or a hub name such as Qwen/Qwen2.5-7B-Instruct",
            settings.model,
            local.display()
        );
    }
    Ok(None)
}
