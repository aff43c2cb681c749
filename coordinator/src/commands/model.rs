//! Where the model is: a folder, a folder of models, or the hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hf_hub::api::sync::ApiBuilder;

use crate::config::Settings;

/// The folder of `settings.model`; fetched from the hub if it names one there
/// and no local folder has it.
///
/// # Errors
/// No such folder, or a hub that cannot be reached.
pub(super) fn find_model(settings: &Settings) -> Result<PathBuf> {
    let named = Path::new(&settings.model);
    if named.is_dir() {
        if !named.join("config.json").is_file() {
            bail!(
                "model {}: the folder has no config.json; it takes a model in Hugging Face format",
                named.display()
            );
        }
        return Ok(std::path::absolute(named)?);
    }
    let local = Path::new(&settings.models_dir).join(named.file_name().unwrap_or_default());
    if local.join("config.json").is_file() {
        return Ok(std::path::absolute(local)?);
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
    fetch(&settings.model).with_context(|| {
        format!(
            "model {}: not in {} and not to be had from the hub; download it there, or name a folder with --model",
            settings.model, settings.models_dir
        )
    })
}

/// Downloads what a run needs of a model on the hub, or finds it in the hub's cache.
fn fetch(name: &str) -> Result<PathBuf> {
    let api = ApiBuilder::from_env().build().context("set up the hub's client")?;
    let model = api.model(name.to_owned());
    let info = model.info().context("list the model's files")?;
    let wanted = |file: &str| {
        !file.contains('/')
            && (file.ends_with(".safetensors")
                || file.ends_with(".json")
                || file.ends_with(".jinja")
                || matches!(file, "merges.txt" | "tokenizer.model"))
    };
    let mut folder = None;
    for file in info.siblings.iter().map(|sibling| &sibling.rfilename).filter(|f| wanted(f)) {
        let path = model.get(file).with_context(|| format!("download {file}"))?;
        if file == "config.json" {
            folder = path.parent().map(Path::to_path_buf);
        }
    }
    folder.context("the model has no config.json")
}
