//! Workers as steps of the Slurm job that the coordinator is part of: on which node
//! each runs, and what `srun` is asked.

use std::process::Command as StdCommand;

use tokio::process::Command;

use crate::run::command::Rank;

/// Why there are no nodes to start workers on.
#[derive(Debug, thiserror::Error)]
pub enum SlurmError {
    /// This process is not part of a job.
    #[error(
        "launch.start = \"slurm\" starts workers on the nodes of the job that the coordinator is part of, and {JOB_NODES} is not set: submit it with sbatch, as deploy/slurm/ does, or enter a job with salloc"
    )]
    NoJob,
    /// The list of nodes cannot be told apart.
    #[error("`scontrol show hostnames {nodes}`: {cause}")]
    Nodes {
        /// What Slurm says of them.
        nodes: String,
        /// Why.
        cause: String,
    },
    /// Workers elsewhere cannot reach the coordinator.
    #[error(
        "launch.listen = {listen:?} is loopback, and the job has {nodes} nodes: take launch.listen=0.0.0.0:0, or an address of the network between them"
    )]
    Loopback {
        /// `launch.listen`.
        listen: String,
        /// How many nodes.
        nodes: usize,
    },
}

/// Slurm's name for the nodes of a job, in a job.
const JOB_NODES: &str = "SLURM_JOB_NODELIST";

/// What a job says of its tasks, which `srun` would take for what is asked of a step.
const OF_THE_JOB: [&str; 8] = [
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SRUN_CPUS_PER_TASK",
    "SLURM_DISTRIBUTION",
    "SLURM_NNODES",
    "SLURM_EXACT",
];

/// The nodes of a job, and how many workers they have together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    nodes: Vec<String>,
    workers: u32,
}

/// Where a worker runs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place<'a> {
    pub(super) node: &'a str,
    /// Its number among the workers there.
    pub(super) on_node: u32,
}

impl Allocation {
    /// The job that this process is part of.
    ///
    /// # Errors
    /// There is none, or Slurm does not tell its nodes.
    pub fn of_this_job(workers: u32) -> Result<Self, SlurmError> {
        let nodes = std::env::var(JOB_NODES).map_err(|_| SlurmError::NoJob)?;
        let failed = |cause: String| SlurmError::Nodes { nodes: nodes.clone(), cause };
        let told = StdCommand::new("scontrol").args(["show", "hostnames", &nodes]).output();
        let told = told.map_err(|error| failed(error.to_string()))?;
        if !told.status.success() || told.stdout.is_empty() {
            return Err(failed(String::from_utf8_lossy(&told.stderr).trim().to_owned()));
        }
        let names = String::from_utf8_lossy(&told.stdout);
        Ok(Self { nodes: names.lines().map(str::to_owned).collect(), workers })
    }

    /// Whether workers reach a coordinator that listens on `listen`.
    ///
    /// # Errors
    /// [`SlurmError::Loopback`].
    pub fn reaches(&self, listen: std::net::SocketAddr) -> Result<(), SlurmError> {
        if self.nodes.len() > 1 && listen.ip().to_canonical().is_loopback() {
            let (listen, nodes) = (listen.to_string(), self.nodes.len());
            return Err(SlurmError::Loopback { listen, nodes });
        }
        Ok(())
    }

    /// Workers of the node with the most.
    pub fn per_node(&self) -> u32 {
        self.workers.div_ceil(self.nodes.len() as u32)
    }

    /// Neighbours share a node: collectives go round in the order of ranks.
    pub(super) fn place(&self, rank: Rank) -> Place<'_> {
        let (nodes, workers) = (self.nodes.len() as u64, u64::from(self.workers.max(1)));
        let node = u64::from(rank.0) * nodes / workers;
        // The first rank r with r · nodes / workers = node.
        let first = (node * workers).div_ceil(nodes);
        Place { node: &self.nodes[node as usize], on_node: rank.0 - first as u32 }
    }

    /// What is asked of `srun`: one task on the rank's node, which sees all that the
    /// job has there. Workers of a node exchange tensors between its GPUs, so none is
    /// given a GPU alone; each takes its own by number.
    pub(super) fn prepare(&self, command: &mut Command, rank: Rank) {
        let Place { node, .. } = self.place(rank);
        for name in OF_THE_JOB {
            command.env_remove(name);
        }
        command.args(["--nodes=1", "--ntasks=1", "--overlap", "--cpu-bind=none"]);
        command.args([&format!("--nodelist={node}"), &format!("--job-name=worker-{rank}")]);
        // It would read the coordinator's terminal, and write when a buffer is full.
        command.args(["--input=none", "--unbuffered"]);
        // A worker starts where the coordinator did, if there is that folder.
        if let Ok(here) = std::env::current_dir() {
            let mut chdir = std::ffi::OsString::from("--chdir=");
            chdir.push(here);
            command.arg(chdir);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn allocation(nodes: usize, workers: u32) -> Allocation {
        Allocation { nodes: (1..=nodes).map(|n| format!("node{n}")).collect(), workers }
    }

    fn places(nodes: usize, workers: u32) -> Vec<(String, u32)> {
        let job = allocation(nodes, workers);
        let place = |rank| job.place(Rank(rank));
        (0..workers).map(|rank| (place(rank).node.to_owned(), place(rank).on_node)).collect()
    }

    #[test]
    fn neighbours_share_a_node_and_each_has_its_number_there() {
        let expected = |places: &[(usize, u32)]| -> Vec<(String, u32)> {
            places.iter().map(|(node, n)| (format!("node{node}"), *n)).collect()
        };
        assert_eq!(places(2, 4), expected(&[(1, 0), (1, 1), (2, 0), (2, 1)]));
        assert_eq!(places(1, 3), expected(&[(1, 0), (1, 1), (1, 2)]));
        assert_eq!(places(3, 4), expected(&[(1, 0), (1, 1), (2, 0), (3, 0)]));
        assert_eq!(places(4, 2), expected(&[(1, 0), (3, 0)]));
        for (nodes, workers) in [(4, 32), (3, 8), (7, 1024), (5, 5), (9, 4)] {
            let job = allocation(nodes, workers);
            let places = places(nodes, workers);
            assert!(places.is_sorted_by(|a, b| (&a.0, a.1) < (&b.0, b.1)), "{places:?}");
            assert!(places.iter().all(|(_, on_node)| *on_node < job.per_node()));
        }
    }

    #[test]
    fn loopback_serves_one_node_and_no_more() {
        let loopback = "127.0.0.1:0".parse().unwrap();
        assert!(allocation(1, 8).reaches(loopback).is_ok());
        let message = allocation(4, 32).reaches(loopback).unwrap_err().to_string();
        assert!(message.contains("4 nodes: take launch.listen=0.0.0.0:0"), "{message}");
        assert!(allocation(4, 32).reaches("0.0.0.0:0".parse().unwrap()).is_ok());
    }
}
