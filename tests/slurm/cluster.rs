//! A Slurm of its own, on hosts of its own: the daemons are the distribution's, their
//! settings, keys and state are in a folder that goes with it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::eventually;
use crate::support::network::{Network, address};

/// A controller and nodes. Dropped, it is stopped.
pub(super) struct Cluster {
    folder: PathBuf,
    nodes: usize,
    daemons: Vec<Child>,
    network: Network,
}

impl Cluster {
    /// So many nodes, with places for so many GPUs each.
    pub(super) fn start(folder: &Path, nodes: usize, gpus: usize) -> Self {
        let folder = folder.join("slurm");
        for name in ["", "state", "spool"] {
            std::fs::create_dir(folder.join(name)).unwrap();
        }
        let names: Vec<_> = (1..=nodes).map(node).collect();
        let mut hosts = vec!["controller"];
        hosts.extend(names.iter().map(String::as_str));
        let network = Network::make(&folder, &hosts);
        write_settings(&folder, nodes, gpus);
        let mut cluster = Self { folder, nodes, daemons: Vec::new(), network };
        let mut munged = Command::new("munged");
        munged.args(["--foreground", "--force", "--num-threads=2"]);
        for (option, file) in [
            ("--socket", "munge.socket"),
            ("--key-file", "munge.key"),
            ("--pid-file", "munge.pid"),
            ("--seed-file", "munge.seed"),
            ("--log-file", "munge.log"),
        ] {
            munged.arg(format!("{option}={}", cluster.folder.join(file).display()));
        }
        cluster.daemon(munged, "munged.out");
        let socket = cluster.folder.join("munge.socket");
        eventually(30, "munge's socket", || socket.exists());
        let mut controller = Command::new("slurmctld");
        controller.arg("-D");
        cluster.daemon(cluster.at(0, &controller), "slurmctld.out");
        for (host, name) in (1..).zip(&names) {
            let mut slurmd = Command::new("slurmd");
            slurmd.args(["-D", "-N", name]);
            cluster.daemon(cluster.at(host, &slurmd), &format!("slurmd-{name}.out"));
        }
        let idle = ["--noheader", "--states=idle", "--format=%D"];
        let all = nodes.to_string();
        eventually(60, "idle nodes", || cluster.try_says("sinfo", &idle).trim() == all);
        cluster
    }

    /// A command on a host, under this cluster's settings.
    fn at(&self, host: usize, command: &Command) -> Command {
        let mut there = self.network.on(host, command);
        there.env("SLURM_CONF", self.folder.join("slurm.conf"));
        there
    }

    fn daemon(&mut self, mut command: Command, log: &str) {
        let log = std::fs::File::create(self.folder.join(log)).unwrap();
        let error = log.try_clone().unwrap();
        let command = command.stdin(Stdio::null()).stdout(log).stderr(error);
        self.daemons.push(command.spawn().unwrap());
    }

    fn try_says(&self, program: &str, args: &[&str]) -> String {
        let mut command = Command::new(program);
        command.args(args);
        let output = self.at(0, &command).stdin(Stdio::null()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What a command says on the controller's host.
    pub(super) fn says(&self, command: Command) -> String {
        let output = self.at(0, &command).stdin(Stdio::null()).output().unwrap();
        let (said, error) = (output.stdout, String::from_utf8_lossy(&output.stderr).into_owned());
        assert!(output.status.success(), "{command:?}: {error}\n{}", self.logs());
        String::from_utf8(said).unwrap()
    }

    pub(super) fn does(&self, program: &str, args: &[&str]) {
        let mut command = Command::new(program);
        command.args(args);
        self.says(command);
    }

    /// A job's state, as Slurm calls it.
    pub(super) fn state(&self, job: &str) -> String {
        let told = self.try_says("scontrol", &["show", "job", job]);
        let state = told.split("JobState=").nth(1).and_then(|rest| rest.split_whitespace().next());
        state.unwrap_or_default().to_owned()
    }

    /// What the daemons tell, for a test that fails.
    pub(super) fn logs(&self) -> String {
        let mut all = String::new();
        let nodes = (1..=self.nodes).map(|n| format!("slurmd-{}.out", node(n)));
        for name in std::iter::once("slurmctld.out".to_owned()).chain(nodes) {
            let text = std::fs::read_to_string(self.folder.join(&name)).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(15)..].join("\n");
            all.push_str(&format!("--- {name}\n{tail}\n"));
        }
        all
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.try_says("scancel", &["--full", "--user=root"]);
        let empty = || self.try_says("squeue", &["--noheader"]).trim().is_empty();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !empty() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        for daemon in self.daemons.iter_mut().rev() {
            let id = daemon.id().to_string();
            let _ = Command::new("kill").args(["-s", "TERM", &id]).status();
            let _ = daemon.wait();
        }
    }
}

fn node(n: usize) -> String {
    format!("node{n}")
}

fn write_settings(folder: &Path, nodes: usize, gpus: usize) {
    let at = |name: &str| folder.join(name).display().to_string();
    let key: String = (0..64).map(|n| format!("{n:02}")).collect();
    std::fs::write(folder.join("munge.key"), key).unwrap();
    let owner_only = Permissions::from_mode(0o600);
    std::fs::set_permissions(folder.join("munge.key"), owner_only).unwrap();
    // A requeued job waits for its old credentials to run out.
    let settings = format!(
        "ClusterName=drift
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
StateSaveLocation={state}
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={pids}/slurmctld.pid
SlurmdPidFile={pids}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
KillWait=5
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=node[1-{nodes}] CPUs={gpus} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
",
        controller = address(0),
        munge = at("munge.socket"),
        state = at("state"),
        spool = at("spool"),
        pids = folder.display(),
    );
    std::fs::write(folder.join("slurm.conf"), settings).unwrap();
    // A GPU's place takes a device; any file will do.
    for gpu in 0..gpus {
        std::fs::write(folder.join(format!("gpu{gpu}")), "").unwrap();
    }
    let last = gpus - 1;
    let places = format!("NodeName=node[1-{nodes}] Name=gpu File={}[0-{last}]\n", at("gpu"));
    std::fs::write(folder.join("gres.conf"), places).unwrap();
}
