//! Settings by name: the files of `configs/`, built in.

macro_rules! presets {
    ($($name:literal),+ $(,)?) => {
        /// Names and texts, by name.
        const PRESETS: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../../configs/", $name, ".toml")))),+];
    };
}

presets![
    "demo",
    "gemma-3-12b-ultrafeedback-drift",
    "gemma-3-12b-ultrafeedback-iterdpo",
    "gemma-3-12b-ultrafeedback-spin",
    "gemma-3-12b-wildfeedback-drift",
    "gemma-3-12b-wildfeedback-iterdpo",
    "gemma-3-12b-wildfeedback-spin",
    "paper",
    "qwen2.5-14b-ultrafeedback-drift",
    "qwen2.5-14b-ultrafeedback-iterdpo",
    "qwen2.5-14b-ultrafeedback-spin",
    "qwen2.5-14b-wildfeedback-drift",
    "qwen2.5-14b-wildfeedback-iterdpo",
    "qwen2.5-14b-wildfeedback-spin",
    "qwen2.5-7b-ultrafeedback-drift",
    "qwen2.5-7b-ultrafeedback-iterdpo",
    "qwen2.5-7b-ultrafeedback-spin",
    "qwen2.5-7b-wildfeedback-drift",
    "qwen2.5-7b-wildfeedback-drift-5-iterations",
    "qwen2.5-7b-wildfeedback-drift-controlled",
    "qwen2.5-7b-wildfeedback-drift-rpo",
    "qwen2.5-7b-wildfeedback-drift-unguided",
    "qwen2.5-7b-wildfeedback-iterdpo",
    "qwen2.5-7b-wildfeedback-iterdpo-5-iterations",
    "qwen2.5-7b-wildfeedback-iterdpo-controlled",
    "qwen2.5-7b-wildfeedback-iterdpo-unguided",
    "qwen2.5-7b-wildfeedback-spin",
    "qwen2.5-7b-wildfeedback-spin-5-iterations",
    "qwen2.5-7b-wildfeedback-spin-controlled",
    "qwen2.5-7b-wildfeedback-spin-two-iterations",
    "ultrafeedback",
];

/// All names, sorted.
pub fn presets() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// The settings of that name, with or without `.toml` behind it.
pub(super) fn preset(name: &str) -> Option<&'static str> {
    let name = name.strip_suffix(".toml").unwrap_or(name);
    PRESETS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{Base, Guidance, Layers, Method, Settings, Sharding};

    fn settings(name: &str) -> Settings {
        let base = Base::named(name.as_ref()).unwrap();
        Layers { base, overrides: Vec::new(), ignore_environment: true }.load().unwrap()
    }

    #[test]
    fn every_file_is_built_in_under_its_name() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs");
        let mut files: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter_map(|name| name.strip_suffix(".toml").map(str::to_owned))
            .collect();
        files.sort();
        assert_eq!(presets().collect::<Vec<_>>(), files);
    }

    #[test]
    fn every_preset_can_run_and_is_what_its_name_says() {
        for name in presets() {
            let settings = settings(name);
            settings.check().unwrap_or_else(|problems| panic!("{name}: {problems}"));
            if !name.contains("feedback-") {
                continue;
            }
            let says = |part: &str| name.contains(part);
            let method = match (says("-spin"), says("-iterdpo")) {
                (true, _) => Method::Spin,
                (_, true) => Method::IterDpo,
                _ => Method::Drift,
            };
            assert_eq!(settings.method, method, "{name}");
            let model = settings.model.to_lowercase();
            let (family, data) = name.split_at(name.find("-wild").or(name.find("-ultra")).unwrap());
            assert!(model.contains(family), "{name}: {model}");
            let data = data[1..].split('-').next().unwrap();
            assert!(settings.corpus.0[0].to_lowercase().contains(data), "{name}");
            assert_eq!(settings.sampling.guidance == Guidance::Off, says("unguided"), "{name}");
            let is_rated = says("-iterdpo") && (says("ultrafeedback") || says("unguided"));
            let reward = "OpenAssistant/reward-model-deberta-v3-large-v2";
            assert_eq!(settings.reward.model, if is_rated { reward } else { "" }, "{name}");
            assert_eq!(settings.data.limit == 4000, says("controlled"), "{name}");
            let iterations = if says("5-iterations") { 5 } else { 2 };
            assert_eq!(settings.training.iterations, iterations, "{name}");
            assert_eq!(settings.training.rpo_alpha > 0.0, says("rpo"), "{name}");
            assert_eq!(settings.training.pair_iterations == 2, says("two-iterations"), "{name}");
            assert_eq!((settings.workers, settings.training.pairs_per_worker), (8, 4), "{name}");
            assert_eq!(settings.training.sharding, Sharding::Zero2, "{name}");
            assert_eq!(settings.training.learning_rate, 5e-7, "{name}");
        }
    }
}
