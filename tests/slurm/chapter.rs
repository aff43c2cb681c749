//! README's chapter on clusters: its commands, as they stand there.

use std::os::unix::fs::symlink;
use std::process::Command;

use super::cluster::Cluster;
use crate::support::{data, demo_model, eventually, metrics, program, root, small_model};

/// Commands of the chapter's first block, without what they say about themselves.
fn commands() -> Vec<String> {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let chapter = readme.split("\n## On a cluster\n").nth(1).expect("the chapter");
    let block = chapter.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let command = |line: &str| line.split(" #").next().unwrap().trim().to_owned();
    block.lines().map(command).collect()
}

/// A folder that looks as a clone does, after its first command.
fn clone_with_a_corpus() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(at("target")).unwrap();
    symlink(program("coordinator").parent().unwrap(), at("target/release")).unwrap();
    symlink(root().join("deploy"), at("deploy")).unwrap();
    symlink(data("sat_dsat_annotation.json"), at("sat_dsat_annotation.json")).unwrap();
    small_model::write(&demo_model(), &at("model")).unwrap();
    let settings = r#"model = "model"
corpus = "sat_dsat_annotation.json"
[data]
limit = 32
held_out = 4
[text]
max_length = 160
max_prompt_tokens = 96
[sampling]
max_prompt_tokens = 128
max_new_tokens = 12
cache_budget = "64MiB"
[training]
iterations = 1
pairs_per_worker = 1
[launch]
threads = 1
"#;
    std::fs::write(at("mine.toml"), settings).unwrap();
    folder
}

/// The first command, `make cuda`, is what `make test-cuda` does; what it builds would say
/// here that there is no GPU. Nodes have eight places for one; workers compute on the CPU.
#[test]
#[ignore = "takes root, Slurm and munge: make test-slurm"]
fn its_commands_start_a_job_of_eight_workers_and_one_of_thirty_two() {
    let commands = commands();
    assert_eq!(commands.first().map(String::as_str), Some("make cuda"));
    let folder = clone_with_a_corpus();
    let cluster = Cluster::start(folder.path(), 4, 8);
    let (mut jobs, mut workers) = (Vec::new(), Vec::new());
    for command in &commands[1..] {
        let job = jobs.last().map_or("JOBID", String::as_str);
        // `tail -f` does not end.
        let command = command.replace("JOBID", job).replace("tail -f", "tail");
        let mut shell = Command::new("bash");
        shell.args(["-euo", "pipefail", "-c", &command]).current_dir(folder.path());
        let said = cluster.says(shell);
        if command.contains("coordinator data") {
            assert!(said.contains("DSAT samples"), "{said}");
        }
        let Some(job) = said.trim().strip_prefix("Submitted batch job ") else { continue };
        jobs.push(job.to_owned());
        let log = folder.path().join(format!("drift-{job}.log"));
        let log = || std::fs::read_to_string(&log).unwrap_or_default();
        eventually(300, "the job's end", || {
            ["COMPLETED", "FAILED"].contains(&cluster.state(job).as_str())
        });
        assert_eq!(cluster.state(job), "COMPLETED", "{}\n{}", log(), cluster.logs());
        let attached = "worker attached rank=";
        let count = log().matches(attached).count();
        assert!(log().contains(&format!("{attached}{} ", count - 1)), "{}", log());
        workers.push(count);
        let run = folder.path().join("runs").join(job);
        assert_eq!(metrics(&run, 1)[0]["loss"].as_f64(), Some(std::f64::consts::LN_2));
    }
    assert_eq!(workers, [8, 32], "{commands:?}");
}
