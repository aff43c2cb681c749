//! Layers of settings become one.

use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat};

use super::Settings;

/// What runs when neither settings nor data are named: `configs/demo.toml`, built in.
pub const DEMO_CONFIG: &str = include_str!("../../../configs/demo.toml");

/// The corpus that `corpus = "demo"` means, built in.
pub const DEMO_CORPUS: &[u8] = include_bytes!("../../../configs/demo/corpus.json");

/// Why no settings came out.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {}: {cause}; name a TOML file with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A layer does not fit the settings.
    #[error("{layers}: {cause}; the README lists every option, --print-config shows the result")]
    Fit {
        /// Which layers were read.
        layers: String,
        /// What did not fit.
        cause: config::ConfigError,
    },
    /// A `--set` without an equals sign.
    #[error("--set {0}: expected KEY=VALUE, as in --set training.beta=0.2")]
    Override(String),
}

/// What lies right above the recipe's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// The demo that is built in.
    Demo,
    /// Nothing: the recipe as it is.
    Recipe,
    /// A file.
    File(PathBuf),
}

/// The layers above the recipe's defaults, lowest first.
#[derive(Debug)]
pub struct Layers {
    /// The lowest.
    pub base: Base,
    /// `KEY=VALUE` of flags; values in TOML, or bare words.
    pub overrides: Vec<String>,
    /// Leave `DRIFT__…` variables out: a frozen run takes nothing from today's shell.
    pub ignore_environment: bool,
}

impl Layers {
    /// Reads the layers and joins them.
    pub fn load(&self) -> Result<Settings, ConfigError> {
        let (name, text) = match &self.base {
            Base::File(path) => (
                path.display().to_string(),
                std::fs::read_to_string(path)
                    .map_err(|cause| ConfigError::Read { path: path.clone(), cause })?,
            ),
            Base::Demo => ("the embedded demo".to_owned(), DEMO_CONFIG.to_owned()),
            Base::Recipe => ("the recipe".to_owned(), String::new()),
        };
        let mut layers = name;
        let mut builder = Config::builder().add_source(File::from_str(&text, FileFormat::Toml));
        if !self.ignore_environment {
            layers.push_str(", DRIFT__… environment");
            builder = builder.add_source(
                Environment::with_prefix("DRIFT")
                    .prefix_separator("__")
                    .separator("__")
                    .try_parsing(true),
            );
        }
        if !self.overrides.is_empty() {
            layers.push_str(", flags");
        }
        let fit = |cause| ConfigError::Fit { layers: layers.clone(), cause };
        for assignment in &self.overrides {
            let (key, value) = assignment
                .split_once('=')
                .ok_or_else(|| ConfigError::Override(assignment.clone()))?;
            builder = builder.add_source(File::from_str(
                &format!("{} = {}", key.trim(), toml_value(value.trim())),
                FileFormat::Toml,
            ));
        }
        builder.build().and_then(Config::try_deserialize).map_err(fit)
    }
}

/// A flag's value as TOML: as it stands if it parses, else as a string.
fn toml_value(value: &str) -> String {
    match format!("x = {value}").parse::<toml::Table>() {
        Ok(_) => value.to_owned(),
        Err(_) => toml::Value::String(value.to_owned()).to_string(),
    }
}

impl Settings {
    /// The settings as a file that gives the same settings again.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }

    /// Reads the frozen settings of a run, and nothing else.
    pub fn frozen(path: &Path) -> Result<Self, ConfigError> {
        Layers {
            base: Base::File(path.to_owned()),
            overrides: Vec::new(),
            ignore_environment: true,
        }
        .load()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{HeldOutSetting, OneOrMany};

    fn load(overrides: &[&str]) -> Result<Settings, ConfigError> {
        Layers {
            base: Base::Demo,
            overrides: overrides.iter().map(|s| (*s).to_owned()).collect(),
            ignore_environment: true,
        }
        .load()
    }

    #[test]
    fn flags_win_over_the_file_and_may_be_bare_words() {
        let settings =
            load(&["training.beta=0.25", "model=org/name", "corpus=[\"a\", \"b\"]"]).unwrap();
        assert_eq!(settings.training.beta, 0.25);
        assert_eq!(settings.model, "org/name");
        assert_eq!(settings.corpus, OneOrMany(vec!["a".into(), "b".into()]));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let message = load(&["training.bta=0.25"]).unwrap_err().to_string();
        assert!(message.contains("bta"), "{message}");
    }

    #[test]
    fn frozen_settings_come_back_equal() {
        let mut settings = load(&[]).unwrap();
        settings.data.held_out = HeldOutSetting::Share(0.125);
        settings.corpus = OneOrMany(vec!["/data/a.json".into()]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, settings.to_toml().unwrap()).unwrap();
        assert_eq!(Settings::frozen(&path).unwrap(), settings);
    }

    #[test]
    fn held_out_is_a_count_or_a_share_below_one() {
        assert_eq!(load(&["data.held_out=7"]).unwrap().data.held_out, HeldOutSetting::Pairs(7));
        assert_eq!(load(&["data.held_out=0.5"]).unwrap().data.held_out, HeldOutSetting::Share(0.5));
        assert!(load(&["data.held_out=1.5"]).is_err());
    }
}
