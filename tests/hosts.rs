//! Runs over several hosts. They take root, for network namespaces: `make test-hosts`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::door::Program;
use crate::support::network::Network;
use crate::support::{
    demo_model, ended, eventually, program, published, small, small_model, succeeds,
};

/// A run whose workers are on the hosts of a network, one on each; the coordinator is on
/// the first.
struct Bed {
    folder: tempfile::TempDir,
    model: PathBuf,
    network: Network,
}

impl Bed {
    fn make(names: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        small_model::write(&demo_model(), &model).unwrap();
        let network = Network::make(folder.path(), names);
        Self { folder, model, network }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The small run with settings of its own; one thread a worker, wherever it is.
    fn run(&self, run: &Path, workers: usize, settings: &[&str]) -> Command {
        let mut command = small(run, &workers.to_string(), &self.model);
        // Several steps an epoch.
        for setting in ["launch.threads=1", "training.pairs_per_worker=1", "data.limit=40"] {
            command.args(["--set", setting]);
        }
        for setting in settings {
            command.args(["--set", setting]);
        }
        command
    }

    /// What the same run leaves on one host, with as many workers.
    fn expected(&self, workers: usize, settings: &[&str]) -> Published {
        let run = self.path("one-host");
        succeeds(self.run(&run, workers, settings));
        published(&run)
    }

    fn coordinator(&self, run: &Path, workers: usize, settings: &[&str]) -> Program {
        let mut command = self.run(run, workers, settings);
        command.args(["--set", "launch.start=none", "--set", "launch.listen=0.0.0.0:0"]);
        let coordinator =
            Program::start(self.network.on(0, &command), &self.path("coordinator.log"));
        coordinator.says("wait for workers");
        coordinator
    }

    fn worker(&self, join: &Path, host: usize, more: &[&str]) -> Program {
        let log = self.path(&format!("worker-{host}.log"));
        Program::start(self.network.on(host, &join_command(join, host, more)), &log)
    }
}

type Published = std::collections::BTreeMap<String, String>;

fn join_command(join: &Path, slot: usize, more: &[&str]) -> Command {
    let mut command = Command::new(program("worker"));
    command.args(["--join", join.to_str().unwrap(), "--slot", &slot.to_string()]);
    command.args(["--device", "cpu", "--threads", "1", "--wait", "100"]).args(more);
    command.env_remove("DRIFT_JOIN_TOKEN").env_remove("DRIFT_JOIN_DIR");
    command
}

/// Steps of the warm start that are in its metrics.
fn steps(run: &Path) -> usize {
    let metrics = std::fs::read_to_string(run.join("iterations/00/metrics.jsonl"));
    metrics.unwrap_or_default().lines().filter(|line| line.contains("\"loss\"")).count()
}

#[test]
#[ignore = "takes root, for network namespaces: make test-hosts"]
fn two_and_four_hosts_leave_the_bytes_of_one() {
    let bed = Bed::make(&["host0", "host1", "host2", "host3"]);
    for hosts in [2, 4] {
        let expected = bed.expected(hosts, &[]);
        std::fs::remove_dir_all(bed.path("one-host")).unwrap();
        let run = bed.path(&format!("run-{hosts}"));
        let mut coordinator = bed.coordinator(&run, hosts, &[]);
        let join = run.join("join");
        let address = std::fs::read_to_string(join.join("address")).unwrap();
        assert!(address.starts_with("https://host0:"), "{address}");
        // By the route to the coordinator, and by name.
        let more: &[&str] = if hosts == 2 { &[] } else { &["--interface", "eth0"] };
        let workers: Vec<_> = (0..hosts).map(|host| bed.worker(&join, host, more)).collect();
        assert_eq!(coordinator.status(), Some(0), "{}", coordinator.log());
        for (host, mut worker) in workers.into_iter().enumerate() {
            assert_eq!(worker.status(), Some(0), "{}", worker.log());
            let where_it_is = format!("worker attached rank={host} about=\"cpu on host{host} ");
            assert!(coordinator.log().contains(&where_it_is), "{}", coordinator.log());
        }
        assert_eq!(published(&run), expected, "{hosts} hosts");
    }
}

/// Its cable is out for twenty seconds. Nobody starts anything again by hand, and the
/// run goes on as soon as it is in again.
#[test]
#[ignore = "takes root, for network namespaces: make test-hosts"]
fn a_host_that_is_cut_off_costs_its_absence_the_deadline_and_a_replay() {
    const CUT: Duration = Duration::from_secs(20);
    const DEADLINE: u64 = 5;
    let bed = Bed::make(&["host0", "host1"]);
    let settings = ["training.warm_start_epochs=20", "run.snapshot_steps=5"];
    let began = Instant::now();
    let expected = bed.expected(2, &settings);
    let undisturbed = began.elapsed();
    let run = bed.path("run");
    let mut coordinator = bed.coordinator(&run, 2, &settings);
    let mut workers = [0, 1].map(|host| bed.worker(&run.join("join"), host, &[]));
    eventually(60, "the first steps", || steps(&run) > 10);
    let cut = Instant::now();
    bed.network.plug(1, "down");
    coordinator.says("worker lost; it is replaced rank=1");
    let noticed = cut.elapsed();
    assert!(noticed < Duration::from_secs(DEADLINE + 2), "noticed after {noticed:?}");
    let reached = steps(&run);
    std::thread::sleep(CUT.saturating_sub(cut.elapsed()));
    bed.network.plug(1, "up");
    eventually(60, "a step that is new", || steps(&run) > reached);
    let lost = cut.elapsed();
    eprintln!(
        "cut off for {CUT:?}: noticed after {noticed:.1?}, a new step after {lost:.1?}; undisturbed, the whole run takes {undisturbed:.1?}"
    );
    assert!(lost < CUT + Duration::from_secs(DEADLINE + 5), "a new step after {lost:?}");
    assert_eq!(coordinator.status(), Some(0), "{}", coordinator.log());
    for worker in &mut workers {
        assert_eq!(worker.status(), Some(0), "{}", worker.log());
    }
    assert_eq!(published(&run), expected);
}

#[test]
#[ignore = "takes root, for network namespaces: make test-hosts"]
fn a_worker_that_cannot_see_the_run_directory_says_so_at_once() {
    let bed = Bed::make(&["host0", "host1"]);
    let run = bed.path("run");
    let mut coordinator = bed.coordinator(&run, 2, &[]);
    let copy = bed.path("copy");
    let copied = ended({
        let mut command = Command::new("cp");
        command.arg("-r").arg(run.join("join")).arg(&copy);
        command
    });
    assert_eq!(copied.code, Some(0), "{}", copied.stderr);
    let hide = format!("mount -t tmpfs none {}", run.display());
    let blind = bed.network.on_after(1, &hide, &join_command(&copy, 1, &[]));
    let began = Instant::now();
    let mut blind = Program::start(blind, &bed.path("blind.log"));
    assert_eq!(blind.status(), Some(1), "{}", blind.log());
    let after = began.elapsed();
    assert!(after < Duration::from_secs(5), "after {after:?}");
    let told = format!("cannot see the run directory {} from host1", run.display());
    assert!(blind.log().contains(&told), "{}", blind.log());
    assert_eq!(coordinator.status(), Some(1), "{}", coordinator.log());
    assert!(coordinator.log().contains(&told), "{}", coordinator.log());
}
