//! What `coordinator check` tells of the settings that are built in, and of real corpora.

use drift_coordinator::config::presets;
use serde_json::Value;

use crate::support::{coordinator, data, demo_model, ended, succeeds};

/// On a machine that has neither model nor corpus, each preset can still be looked at.
#[test]
fn every_preset_is_told_without_its_model_and_corpus() {
    let nothing = tempfile::tempdir().unwrap();
    for name in presets().filter(|name| *name != "demo") {
        let mut command = coordinator(&["check", "--config", name]);
        command.env("HF_HOME", nothing.path()).env("HF_ENDPOINT", "http://127.0.0.1:9");
        command.current_dir(nothing.path());
        let told = succeeds(command).stdout;
        assert!(told.starts_with(&format!("settings   {name}\n")), "{told}");
        assert!(told.contains("8 workers, one GPU each; 4 pairs each in a step, 32 in all"));
        assert!(told.contains("downloaded when the run begins"), "{told}");
        if name.contains("14b") {
            assert!(told.contains("Qwen/Qwen2.5-14B-Instruct"), "{told}");
        }
        let entries = std::fs::read_dir(nothing.path()).unwrap().count();
        assert_eq!(entries, 0, "{name}: nothing is written");
    }
}

#[test]
fn a_plan_counts_what_the_corpora_hold() {
    let (corpus, seeds) = (data("sat_dsat_annotation.json"), data("wildfeedback.json"));
    let plan = |arguments: &[&str]| -> Value {
        let mut command = coordinator(&["check", "--json", "--config"]);
        command.args(arguments);
        command.args(["--corpus", corpus.to_str().unwrap()]);
        command.args(["--seeds", seeds.to_str().unwrap()]);
        command.args(["--model", demo_model().to_str().unwrap()]);
        serde_json::from_str(&succeeds(command).stdout).unwrap()
    };
    // 543 DSAT and 34 SAT turns and 189 seed pairs: see corpus.rs. Held out are 100 prompts of
    // the first, 6 of the second, and 37 of the last.
    let drift = plan(&["qwen2.5-14b-wildfeedback-drift"]);
    assert_eq!((&drift["workers"], &drift["pairs_per_step"]), (&8.into(), &32.into()));
    let (warm_start, first) = (&drift["iterations"][0], &drift["iterations"][1]);
    let number = |of: &Value, name: &str| of[name].as_u64().unwrap();
    assert_eq!(number(warm_start, "epochs"), 3);
    assert_eq!(number(warm_start, "pairs") + number(warm_start, "held_out"), 189);
    assert!(number(warm_start, "held_out") >= 37);
    assert_eq!(number(warm_start, "steps"), 3 * number(warm_start, "pairs").div_ceil(32));
    assert_eq!(number(first, "replies"), 543);
    assert_eq!(number(first, "pairs") + number(first, "held_out"), 543);
    assert!(number(first, "held_out") >= 100);
    assert_eq!(number(first, "steps"), number(first, "pairs").div_ceil(32));
    let rates: Vec<(u64, f64)> = serde_json::from_value(first["learning_rates"].clone()).unwrap();
    assert_eq!(rates[0], (0, 0.0));
    assert_eq!(rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max), 5e-7);
    let lengths = drift["lengths"].as_array().unwrap();
    assert_eq!(lengths[0]["count"], 543);
    // Long ones are cut to what the recipe says of each.
    assert_eq!((&lengths[0]["longest"], &lengths[1]["longest"]), (&2048.into(), &1024.into()));

    let iter_dpo = plan(&["qwen2.5-7b-wildfeedback-iterdpo"]);
    assert_eq!(iter_dpo["iterations"][1]["replies"], 2 * 543);
    let spin = plan(&["qwen2.5-7b-wildfeedback-spin-5-iterations"]);
    assert_eq!(spin["iterations"].as_array().unwrap().len(), 6);
    assert_eq!(spin["iterations"][5]["replies"], 34);
    let few = plan(&["qwen2.5-7b-wildfeedback-drift", "--set", "data.limit=100"]);
    assert_eq!(few["iterations"][1]["replies"], 100);
}

#[test]
fn a_name_that_is_none_is_told_with_those_that_are() {
    let refused = ended(coordinator(&["--config", "qwen2.5-7b", "--print-config"]));
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    for word in ["qwen2.5-7b", "--config", "gemma-3-12b-wildfeedback-drift", "demo, "] {
        assert!(refused.stderr.contains(word), "{word} is not in: {}", refused.stderr);
    }
    let printed = ["--config", "qwen2.5-7b-wildfeedback-drift-rpo", "--print-config"];
    let printed = succeeds(coordinator(&printed)).stdout;
    assert!(printed.contains("rpo_alpha = 0.001") && !printed.contains("extends"), "{printed}");
}
