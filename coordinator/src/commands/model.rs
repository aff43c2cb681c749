//! Where the model is: a folder, a folder of models, or the hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::Settings;
use crate::hub;
use crate::ui::Progress;

/// A model that settings name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Named<'a> {
    /// The setting, as it is typed.
    setting: &'static str,
    name: &'a str,
    models_dir: &'a str,
}

impl<'a> Named<'a> {
    /// The model to train.
    pub(super) fn model(settings: &'a Settings) -> Self {
        let (name, models_dir) = (settings.model.as_str(), settings.models_dir.as_str());
        Self { setting: "--model", name, models_dir }
    }

    /// The reward model, if there is one.
    pub(super) fn reward(settings: &'a Settings) -> Option<Self> {
        let (name, models_dir) = (settings.reward.model.as_str(), settings.models_dir.as_str());
        (!name.is_empty()).then_some(Self { setting: "--set reward.model=", name, models_dir })
    }

    /// Its folder; fetched from the hub if it names one there and no local folder has it.
    ///
    /// # Errors
    /// No such folder, or a hub that cannot be reached.
    pub(super) fn find(self, progress: &Progress) -> Result<PathBuf> {
        if let Some(folder) = local_folder(self)? {
            return Ok(folder);
        }
        hub::fetch_model(self.name, progress).with_context(|| {
            format!(
                "model {}: not in {} and not to be had from the hub; download it there, or name a folder with {}",
                self.name, self.models_dir, self.setting
            )
        })
    }

    /// Its folder, if this machine has it; nothing is fetched.
    ///
    /// # Errors
    /// A folder that holds no model, and a name that none can have.
    pub(super) fn find_here(self) -> Result<Option<PathBuf>> {
        Ok(local_folder(self)?.or_else(|| hub::cached_model(self.name)))
    }
}

fn local_folder(Named { name, models_dir, .. }: Named<'_>) -> Result<Option<PathBuf>> {
    let named = Path::new(name);
    if named.is_dir() {
        if !named.join("config.json").is_file() {
            bail!(
                "model {}: the folder has no config.json; it takes a model in Hugging Face format",
                named.display()
            );
        }
        return Ok(Some(std::path::absolute(named)?));
    }
    let local = Path::new(models_dir).join(named.file_name().unwrap_or_default());
    if local.join("config.json").is_file() {
        return Ok(Some(std::path::absolute(local)?));
    }
    let parts: Vec<_> = name.split('/').collect();
    let is_hub_name =
        parts.len() == 2 && parts.iter().all(|part| !part.is_empty() && *part != "..");
    if !is_hub_name || name.starts_with('.') {
        bail!(
            "model {}: no such folder, nor {}; give a folder in Hugging Face format or a hub name such as Qwen/Qwen2.5-7B-Instruct",
            name,
            local.display()
        );
    }
    Ok(None)
}
