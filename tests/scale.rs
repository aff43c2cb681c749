//! Many workers beside one coordinator: real wire, real journal, no engine.

use serde_json::Value;

use crate::support::{ended, program};

/// Each prompt is in the journal once, though workers leave with their leases; those come
/// to others, and nobody else is taken for lost. That is checked by the harness itself.
#[test]
fn every_prompt_is_sampled_once_by_whichever_of_many_workers() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("scale.json");
    let mut command = std::process::Command::new(program("scale"));
    command.args(["--workers", "64", "--prompts", "5000", "--shard-prompts", "4"]);
    command.args(["--rates", "2500,max", "--losses", "5", "--patience", "60"]);
    command.arg("--report").arg(&report);
    let ended = ended(command);
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs {
        assert_eq!(run["each_prompt_once"], true, "{run}");
        assert_eq!(run["recovery_seconds"].as_array().unwrap().len(), 5, "{run}");
        assert!(run["prompts_per_second"].as_f64().unwrap() > 0.0, "{run}");
    }
}
