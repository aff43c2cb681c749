//! The README's table of options, written from the settings themselves.

use std::fmt::Write;

use super::{OptionRow, options};

/// Every option as a row of a Markdown table, in the order of the file: key,
/// default, and what it does.
pub fn table() -> String {
    let mut table = String::from("| option | default | what it does |\n|---|---|---|\n");
    for OptionRow { key, default, what } in options() {
        // Writing to a string cannot fail.
        let _ = writeln!(table, "| `{key}` | `{}` | {} |", cell(&default), cell(&what));
    }
    table
}

/// Text that no table takes for the end of a cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::config::Layers;

    const BEGIN: &str = "<!-- options:begin -->\n";
    const END: &str = "<!-- options:end -->\n";
    const UPDATE: &str = "DRIFT_UPDATE_README";

    fn in_root(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(path)
    }

    #[test]
    fn the_readme_lists_every_option_as_it_is() {
        let path = in_root("README.md");
        let readme = fs::read_to_string(&path).unwrap();
        let (before, rest) = readme.split_once(BEGIN).unwrap();
        let (listed, after) = rest.split_once(END).unwrap();
        let table = table();
        if std::env::var_os(UPDATE).is_some() {
            fs::write(&path, [before, BEGIN, table.as_str(), END, after].concat()).unwrap();
            return;
        }
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        let (listed_lines, lines) = (lines(listed), lines(&table));
        assert!(
            listed == table,
            "README.md does not list the options as they are.\nmissing: {:#?}\nout of date: {:#?}\n\
             run: {UPDATE}=1 cargo test --release -p drift-coordinator --lib the_readme_lists",
            lines.difference(&listed_lines).collect::<Vec<_>>(),
            listed_lines.difference(&lines).collect::<Vec<_>>(),
        );
    }

    #[test]
    fn a_row_holds_key_default_and_sentence_in_three_cells() {
        assert!(table().contains("\n| `training.beta` | `0.1` | DPO's β; IPO's τ. |\n"));
        assert_eq!(table().lines().count(), 2 + options().len());
        assert_eq!(cell("a | b"), "a \\| b");
    }

    #[test]
    fn every_shipped_file_of_settings_can_run() {
        let mut checked = 0;
        for entry in fs::read_dir(in_root("configs")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            let layers = Layers {
                base: crate::config::Base::File(path.clone()),
                overrides: Vec::new(),
                ignore_environment: true,
            };
            let settings = layers.load().unwrap();
            settings.check().unwrap_or_else(|problems| panic!("{}: {problems}", path.display()));
            checked += 1;
        }
        assert!(checked > 0, "configs/ holds no settings");
    }
}
