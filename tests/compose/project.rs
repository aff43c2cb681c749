//! One compose project: its containers, and what happens to them.

use std::fmt;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::bed::root;

/// Longer than `launch.heartbeat_deadline`.
const SILENCE: Duration = Duration::from_secs(8);

/// How long a pause is tried for.
const FREEZING: Duration = Duration::from_secs(10);

/// What happens to a service.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// Its process is killed as the kernel does it; the restart policy brings it back.
    Kill(&'static str),
    /// `docker kill`, which the restart policy respects, and `docker start`.
    KillAndStart(&'static str),
    /// Frozen for longer than the deadline.
    Pause(&'static str),
    /// Off the network for longer than the deadline.
    Cut(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(service) => write!(f, "kill {service}"),
            Self::KillAndStart(service) => write!(f, "docker kill and start {service}"),
            Self::Pause(service) => write!(f, "pause {service} for {SILENCE:?}"),
            Self::Cut(service) => write!(f, "cut {service} off for {SILENCE:?}"),
        }
    }
}

/// Removes its containers, network and volume when it is dropped.
pub(crate) struct Project {
    name: String,
    overrides: PathBuf,
    tag: String,
}

impl Project {
    /// A project of its own, with `overrides` on top of `deploy/compose.yaml`.
    pub(crate) fn new(name: &str, overrides: &Path, tag: &str) -> Self {
        let name = format!("drift-test-{}-{name}", std::process::id());
        Self { name, overrides: overrides.to_owned(), tag: tag.to_owned() }
    }

    /// A compose command on it, profile `cpu`.
    pub(crate) fn compose(&self, arguments: &[&str]) -> Command {
        let mut command = compose();
        command
            .args(["-p", &self.name, "-f", "deploy/compose.yaml", "-f"])
            .arg(&self.overrides)
            .args(["--profile", "cpu"])
            .args(arguments)
            .env("DRIFT_TAG", &self.tag);
        command
    }

    /// The container of a service.
    pub(crate) fn container(&self, service: &str) -> Result<String> {
        let ids = told(self.compose(&["ps", "-q", service]))?;
        let id = ids.lines().next().with_context(|| format!("{service} has no container"))?;
        Ok(id.to_owned())
    }

    /// A field of a service's container.
    pub(crate) fn inspect(&self, service: &str, format: &str) -> Result<String> {
        let id = self.container(service)?;
        told(docker(&["inspect", "--format", format, &id]))
    }

    /// Status and body of one of a service's endpoints, asked over the network.
    pub(crate) fn get(&self, service: &str, path: &str) -> Result<(u16, String)> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        get(&self.inspect(service, format)?, path)
    }

    /// Lets a fault happen, and what mends it.
    pub(crate) fn disturb(&self, fault: Fault) -> Result<()> {
        match fault {
            Fault::Kill(service) => {
                let pid = self.inspect(service, "{{.State.Pid}}")?;
                let mut kill = Command::new("kill");
                kill.args(["-KILL", &pid]);
                told(kill)?;
            }
            Fault::KillAndStart(service) => {
                let id = self.container(service)?;
                told(docker(&["kill", &id]))?;
                told(docker(&["start", &id]))?;
            }
            Fault::Pause(service) => {
                self.paused(service, || std::thread::sleep(SILENCE))?;
            }
            Fault::Cut(service) => {
                let id = self.container(service)?;
                let network = format!("{}_drift", self.name);
                told(docker(&["network", "disconnect", &network, &id]))?;
                std::thread::sleep(SILENCE);
                told(docker(&["network", "connect", "--alias", service, &network, &id]))?;
            }
        }
        Ok(())
    }

    /// What `during` comes to while a service is frozen.
    ///
    /// On cgroup v1 freezing is "a game of chances" (runc's pull request 2791): where it is
    /// lost, runc lets the container run on, and to try again is its caller's work.
    pub(crate) fn paused<T>(&self, service: &str, during: impl FnOnce() -> T) -> Result<T> {
        let id = self.container(service)?;
        let deadline = Instant::now() + FREEZING;
        while let Err(why) = told(docker(&["pause", &id])) {
            if Instant::now() > deadline || !format!("{why:#}").contains("unable to freeze") {
                return Err(why);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let came = during();
        told(docker(&["unpause", &id]))?;
        Ok(came)
    }

    /// Waits for a service's container to end for good, and returns its status.
    pub(crate) fn wait(&self, service: &str, patience: Duration) -> Result<i32> {
        let deadline = Instant::now() + patience;
        loop {
            let state = self.inspect(service, "{{.State.Status}} {{.State.ExitCode}}")?;
            // Between two tries of the restart policy it is `restarting`.
            if let Some(("exited", code)) = state.split_once(' ') {
                return code.parse().context("an exit status");
            }
            if Instant::now() > deadline {
                bail!("{service} is {state} after {patience:?}:\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(250));
        }
    }

    /// All containers' last lines.
    pub(crate) fn logs(&self) -> String {
        let logs = self.compose(&["logs", "--no-color", "--tail", "60"]).output();
        logs.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let _ = self.compose(&["down", "--volumes", "--timeout", "1"]).output();
    }
}

/// `docker compose`, or the program that it once was.
pub(crate) fn compose() -> Command {
    let is_there = docker(&["compose", "version"]).output().is_ok_and(|o| o.status.success());
    let mut command = match is_there {
        true => docker(&["compose"]),
        false => Command::new("docker-compose"),
    };
    command.current_dir(root());
    command
}

pub(crate) fn docker(arguments: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(arguments);
    command
}

/// What a command that must succeed says on standard output.
pub(crate) fn told(mut command: Command) -> Result<String> {
    let Output { status, stdout, stderr } = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {:?}; is it installed?", command.get_program()))?;
    let stderr = String::from_utf8_lossy(&stderr);
    ensure!(status.success(), "{command:?}: {status}\n{stderr}");
    Ok(String::from_utf8_lossy(&stdout).trim().to_owned())
}

fn get(ip: &str, path: &str) -> Result<(u16, String)> {
    let address = format!("{ip}:9464").parse().with_context(|| format!("address {ip:?}"))?;
    let patience = Duration::from_secs(3);
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {ip}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).context("a status")?.parse()?;
    let body = answer.split_once("\r\n\r\n").context("a body")?.1;
    Ok((status, body.to_owned()))
}
