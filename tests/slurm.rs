//! The job script under a real Slurm: a controller, and nodes with places for GPUs.
//! They take root, Slurm and munge: `make test-slurm`.

mod chapter;
mod cluster;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use self::cluster::Cluster;
use crate::support::{
    demo_model, eventually, processes, program, published, root, small, small_model, succeeds,
};

/// A cluster, and a run that is submitted to it.
struct Bed {
    cluster: Cluster,
    folder: tempfile::TempDir,
    settings: Vec<String>,
}

type Published = std::collections::BTreeMap<String, String>;

/// Two nodes with two workers each.
const WORKERS: &str = "4";

impl Bed {
    fn make(epochs: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        small_model::write(&demo_model(), &model).unwrap();
        let command = small(&folder.path().join("run"), WORKERS, &model);
        // All but the run's directory and its workers, which the script names.
        let mut settings: Vec<_> =
            command.get_args().skip(4).map(|arg| arg.to_str().unwrap().to_owned()).collect();
        for setting in [
            "launch.threads=1".to_owned(),
            // Several steps an epoch.
            "training.pairs_per_worker=1".to_owned(),
            "data.limit=40".to_owned(),
            "training.dtype=bf16".to_owned(),
            format!("training.warm_start_epochs={epochs}"),
            "run.snapshot_steps=50".to_owned(),
        ] {
            settings.extend(["--set".to_owned(), setting]);
        }
        Self { cluster: Cluster::start(folder.path(), 2, 2), folder, settings }
    }

    fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// What the same run leaves without Slurm.
    fn expected(&self) -> Published {
        let run = self.folder.path().join("plain");
        let mut command = crate::support::coordinator(&["--workers", WORKERS, "--run-dir"]);
        command.arg(&run).args(&self.settings);
        succeeds(command);
        published(&run)
    }

    /// Submits the job script; returns the job's number.
    fn submit(&self, options: &[&str]) -> String {
        let mut sbatch = Command::new("sbatch");
        sbatch.args(["--parsable", "--nodes=2", "--gpus-per-node=2"]).args(options);
        sbatch.arg("--output").arg(self.folder.path().join("job.log"));
        sbatch.arg(root().join("deploy/slurm/drift.sbatch")).args(&self.settings);
        sbatch.env("RUN_DIR", self.run()).env("COORDINATOR", program("coordinator"));
        sbatch.current_dir(root());
        self.cluster.says(sbatch).trim().to_owned()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("job.log")).unwrap_or_default()
    }

    /// Steps of the warm start that are in its metrics.
    fn steps(&self) -> usize {
        let metrics = std::fs::read_to_string(self.run().join("iterations/00/metrics.jsonl"));
        metrics.unwrap_or_default().lines().filter(|line| line.contains("\"loss\"")).count()
    }

    fn trained(&self, steps: usize) {
        self.eventually("some steps", || self.steps() >= steps);
    }

    fn eventually(&self, what: &str, holds: impl Fn() -> bool) {
        let held = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(120, what, holds);
        }));
        assert!(held.is_ok(), "{what}:\n{}\n{}", self.log(), self.cluster.logs());
    }

    /// Waits for a job's end as long as its run takes steps, whatever their speed.
    fn ends(&self, job: &str, state: &str) {
        let ended = || self.cluster.state(job) == state;
        while !ended() {
            let before = self.steps();
            self.eventually(state, || ended() || self.steps() != before);
        }
    }
}

fn count(text: &str, part: &str) -> usize {
    text.matches(part).count()
}

/// Processes of the worker program in a run of this model.
fn workers_of(run: &Path) -> Vec<String> {
    let lines = processes("--slot ");
    lines.into_iter().filter(|line| line.contains(run.to_str().unwrap())).collect()
}

#[test]
#[ignore = "takes root, Slurm and munge: make test-slurm"]
fn a_job_of_two_nodes_leaves_the_bytes_of_one_machine_although_a_worker_is_lost() {
    let bed = Bed::make(100);
    let expected = bed.expected();
    let job = bed.submit(&[]);
    bed.trained(60);
    // A worker of the second node dies, and its successor is started there.
    let attached = "worker attached rank=3 about=\"cpu on node2 (pid ";
    let log = bed.log();
    let pid: String =
        log.split(attached).nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
    assert!(Command::new("kill").args(["-s", "KILL", &pid]).status().unwrap().success());
    bed.eventually("its successor", || count(&bed.log(), attached) == 2);
    bed.ends(&job, "COMPLETED");
    assert_eq!(published(&bed.run()), expected);
    let log = bed.log();
    for (rank, node) in [(0, "node1"), (1, "node1"), (2, "node2"), (3, "node2")] {
        let place = format!("worker attached rank={rank} about=\"cpu on {node} ");
        assert!(log.contains(&place), "neighbours share a node: {log}");
        assert!(bed.run().join(format!("logs/worker-{rank}.log")).exists());
    }
}

#[test]
#[ignore = "takes root, Slurm and munge: make test-slurm"]
fn what_is_cancelled_leaves_nothing_running_and_goes_on_in_another_job() {
    let bed = Bed::make(100);
    let expected = bed.expected();
    let job = bed.submit(&[]);
    bed.trained(60);
    bed.cluster.does("scancel", &[&job]);
    bed.ends(&job, "CANCELLED");
    bed.eventually("an end of all processes", || workers_of(bed.folder.path()).is_empty());
    assert!(bed.log().contains("stopped; go on with"), "an orderly stop: {}", bed.log());
    let next = bed.submit(&[]);
    assert_ne!(next, job);
    bed.ends(&next, "COMPLETED");
    assert!(bed.log().contains("go on with a run"), "{}", bed.log());
    assert_eq!(published(&bed.run()), expected);
}

#[test]
#[ignore = "takes root, Slurm and munge: make test-slurm"]
fn a_job_whose_node_fails_queues_again_and_leaves_the_same_bytes() {
    let bed = Bed::make(100);
    let expected = bed.expected();
    let job = bed.submit(&[]);
    bed.trained(60);
    bed.cluster.does("scontrol", &["update", "nodename=node2", "state=down", "reason=test"]);
    bed.eventually("a place in the queue", || bed.cluster.state(&job) == "PENDING");
    // The node comes back by itself, since its daemon lives.
    bed.ends(&job, "COMPLETED");
    assert!(bed.log().contains("go on with a run"), "{}", bed.log());
    assert_eq!(published(&bed.run()), expected);
}

/// The time limit is a minute, and the signal comes fifty seconds before, or up to half a
/// minute later, since Slurm looks no more often: the run, which takes longer, saves,
/// queues again, and does no step twice.
#[test]
#[ignore = "takes root, Slurm and munge: make test-slurm"]
fn before_the_time_is_up_it_saves_and_queues_again() {
    const PROBE: u32 = 50;
    let probe = Bed::make(PROBE);
    let began = Instant::now();
    probe.expected();
    let epochs = (f64::from(PROBE) * 60.0 / began.elapsed().as_secs_f64()).ceil() as u32;
    drop(probe);
    let bed = Bed::make(epochs);
    let expected = bed.expected();
    let job = bed.submit(&["--time=1", "--signal=B:USR1@50"]);
    bed.eventually("the signal", || bed.log().contains("stop soon: what is under way is saved"));
    bed.eventually("the stop", || bed.log().contains("stopped; go on with"));
    let done = bed.steps();
    bed.cluster.does("scontrol", &["update", &format!("jobid={job}"), "timelimit=30"]);
    bed.ends(&job, "COMPLETED");
    let log = bed.log();
    assert!(log.contains("go on with a run"), "{log}");
    assert_eq!(published(&bed.run()), expected);
    // Where the first life ended, the second began.
    let second = log.split("go on with a run").nth(1).unwrap();
    let began = second.split("phase=Training").nth(1).unwrap().split("done=").nth(1).unwrap();
    let began: String = began.chars().take_while(char::is_ascii_digit).collect();
    assert_eq!(began, done.to_string(), "{log}");
}
