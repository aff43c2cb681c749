//! Layers of settings become one.

use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat};

use super::Settings;
use super::presets::{preset, presets};

/// What runs when neither settings nor data are named: `configs/demo.toml`, built in.
pub const DEMO_CONFIG: &str = include_str!("../../../configs/demo.toml");

/// The corpus that `corpus = "demo"` means, built in.
pub const DEMO_CORPUS: &[u8] = include_bytes!("../../../configs/demo/corpus.json");

/// Why no settings came out.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {}: {cause}; name a TOML file with --config, or settings that are built in: {}", path.display(), names())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{file}: {cause}")]
    Syntax {
        /// The file.
        file: String,
        /// Where, and why.
        cause: Box<toml::de::Error>,
    },
    /// What a file extends is not there.
    #[error(
        "{file}: extends {extends:?}, expected a TOML file beside it, or settings that are built in: {}",
        names()
    )]
    Extends {
        /// The file.
        file: String,
        /// What it names.
        extends: String,
    },
    /// Files extend each other in a circle.
    #[error("{0}: extends itself, by way of what it extends")]
    Circle(String),
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
    /// Settings that are built in, by their name.
    Preset(String),
}

impl Base {
    /// A file where there is one, else the settings that are built in under that name.
    ///
    /// # Errors
    /// [`ConfigError::Read`] where there is neither.
    pub fn named(name: &Path) -> Result<Self, ConfigError> {
        match (std::fs::metadata(name), name.to_str().filter(|name| preset(name).is_some())) {
            (Err(_), Some(name)) => {
                Ok(Self::Preset(name.strip_suffix(".toml").unwrap_or(name).to_owned()))
            }
            (Err(cause), None) => Err(ConfigError::Read { path: name.to_owned(), cause }),
            (Ok(_), _) => Ok(Self::File(name.to_owned())),
        }
    }
}

/// What is built in, for messages.
fn names() -> String {
    presets().collect::<Vec<_>>().join(", ")
}

/// A file's settings, and what it extends.
#[derive(Debug)]
struct Source {
    /// For messages.
    name: String,
    /// Where relative paths begin.
    folder: PathBuf,
    table: toml::Table,
    extends: Option<String>,
}

impl Source {
    fn of(name: String, folder: PathBuf, text: &str) -> Result<Self, ConfigError> {
        let mut table: toml::Table = text
            .parse()
            .map_err(|cause| ConfigError::Syntax { file: name.clone(), cause: Box::new(cause) })?;
        let extends = match table.remove("extends") {
            None => None,
            Some(toml::Value::String(extends)) => Some(extends),
            Some(other) => {
                return Err(ConfigError::Extends { file: name, extends: other.to_string() });
            }
        };
        Ok(Self { name, folder, table, extends })
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        Self::of(path.display().to_string(), folder, &text)
    }

    /// The settings that this one extends: a file beside it, or built in.
    fn parent(&self) -> Result<Option<Self>, ConfigError> {
        let Some(extends) = &self.extends else { return Ok(None) };
        let path = self.folder.join(extends);
        if path.is_file() {
            return Self::read(&path).map(Some);
        }
        let no_such = || ConfigError::Extends { file: self.name.clone(), extends: extends.clone() };
        let text = preset(extends).ok_or_else(no_such)?;
        Self::of(extends.clone(), PathBuf::new(), text).map(Some)
    }

    /// This one and all that it extends, lowest first.
    fn chain(self) -> Result<Vec<Self>, ConfigError> {
        let mut chain = vec![self];
        while let Some(parent) = chain[chain.len() - 1].parent()? {
            if chain.iter().any(|source| source.name == parent.name) {
                return Err(ConfigError::Circle(parent.name));
            }
            chain.push(parent);
        }
        chain.reverse();
        Ok(chain)
    }
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
        let built_in = |name: &str, text| Source::of(name.to_owned(), PathBuf::new(), text);
        let source = match &self.base {
            Base::File(path) => Source::read(path)?,
            Base::Preset(name) => built_in(name, preset(name).unwrap_or_default())?,
            Base::Demo => built_in("the embedded demo", DEMO_CONFIG)?,
            Base::Recipe => built_in("the recipe", "")?,
        };
        let mut layers = source.name.clone();
        let mut builder = Config::builder();
        for source in source.chain()? {
            let text = source.table.to_string();
            builder = builder.add_source(File::from_str(&text, FileFormat::Toml));
        }
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
    fn a_file_wins_over_what_it_extends_and_names_what_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let load = |path: PathBuf| {
            let base = Base::named(&path).unwrap();
            Layers { base, overrides: Vec::new(), ignore_environment: true }.load()
        };
        write("base.toml", "extends = \"demo\"\n[training]\nbeta = 0.5\niterations = 7\n");
        let mine = write("mine.toml", "extends = \"base.toml\"\n[training]\niterations = 3\n");
        let settings = load(mine).unwrap();
        assert_eq!((settings.training.beta, settings.training.iterations), (0.5, 3));
        assert_eq!(settings.corpus.0, ["demo"], "what neither says is the demo's");

        let message = |path: PathBuf| load(path).unwrap_err().to_string();
        let lost = message(write("lost.toml", "extends = \"nothing\"\n"));
        assert!(lost.contains("lost.toml") && lost.contains("\"nothing\""), "{lost}");
        assert!(lost.contains("qwen2.5-7b-wildfeedback-drift,"), "{lost}");
        write("one.toml", "extends = \"two.toml\"\n");
        let circle = message(write("two.toml", "extends = \"one.toml\"\n"));
        assert!(circle.contains("extends itself"), "{circle}");
        let syntax = message(write("syntax.toml", "model = \"a\"\nseed 3\n"));
        assert!(syntax.contains("syntax.toml") && syntax.contains("line 2"), "{syntax}");
        let none = Base::named("qwen".as_ref()).unwrap_err().to_string();
        assert!(none.contains("read qwen") && none.contains("paper, "), "{none}");
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
