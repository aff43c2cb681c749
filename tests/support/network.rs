//! Several hosts on one machine: each a network namespace with an address and a name of
//! its own, on a switch in a namespace of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Hosts that reach one another. Dropped, they are removed.
pub(crate) struct Network {
    tag: String,
    names: Vec<String>,
    /// What stands in `/etc/hosts` on each.
    table: PathBuf,
}

impl Network {
    /// Hosts of these names; `folder` keeps their table of names.
    pub(crate) fn make(folder: &Path, names: &[&str]) -> Self {
        let network = Self {
            tag: format!("drift{}", std::process::id()),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            table: folder.join("hosts"),
        };
        let mut table = "127.0.0.1 localhost\n".to_owned();
        // A bridge of the machine itself would be behind its firewall.
        let switch = network.switch();
        ip(&["netns", "add", &switch]);
        ip(&["-n", &switch, "link", "add", "name", "bridge0", "type", "bridge"]);
        ip(&["-n", &switch, "link", "set", "bridge0", "up"]);
        for (n, name) in names.iter().enumerate() {
            let (space, port) = (network.space(n), format!("port{n}"));
            ip(&["netns", "add", &space]);
            let peer = ["peer", "name", "eth0", "netns", &space];
            let link = ["link", "add", &port, "netns", &switch, "type", "veth"];
            ip(&[&link[..], &peer].concat());
            ip(&["-n", &switch, "link", "set", &port, "master", "bridge0", "up"]);
            ip(&["-n", &space, "link", "set", "lo", "up"]);
            let address = address(n);
            ip(&["-n", &space, "address", "add", &format!("{address}/24"), "dev", "eth0"]);
            ip(&["-n", &space, "link", "set", "eth0", "up"]);
            table.push_str(&format!("{address} {name}\n"));
        }
        std::fs::write(&network.table, table).unwrap();
        network
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.tag)
    }

    fn space(&self, host: usize) -> String {
        format!("{}-{host}", self.tag)
    }

    /// `command` on a host. Its process is the command's own.
    pub(crate) fn on(&self, host: usize, command: &Command) -> Command {
        self.on_after(host, "true", command)
    }

    /// As [`Self::on`], in mounts of its own that `preparation` may change.
    pub(crate) fn on_after(&self, host: usize, preparation: &str, command: &Command) -> Command {
        let mut there = Command::new("nsenter");
        there.arg(format!("--net=/run/netns/{}", self.space(host)));
        there.args(["unshare", "--uts", "--mount", "sh", "-c"]).arg(format!(
            "hostname {} && mount --bind {} /etc/hosts && {preparation} && exec \"$0\" \"$@\"",
            self.names[host],
            self.table.display()
        ));
        there.arg(command.get_program()).args(command.get_args());
        if let Some(folder) = command.get_current_dir() {
            there.current_dir(folder);
        }
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        there
    }

    /// Makes a host's cable carry no more than `rate`, either way; or all it can.
    #[allow(dead_code, reason = "not every program that includes this has slow cables")]
    pub(crate) fn limit(&self, host: usize, rate: Option<&str>) {
        let ends = [(self.switch(), format!("port{host}")), (self.space(host), "eth0".to_owned())];
        for (space, end) in ends {
            let mut tc = Command::new("tc");
            tc.args(["-n", &space, "qdisc"]);
            match rate {
                Some(rate) => tc.args(["replace", "dev", &end, "root", "tbf", "rate", rate]),
                None => tc.args(["delete", "dev", &end, "root"]),
            };
            if rate.is_some() {
                tc.args(["burst", "16kb", "latency", "400ms"]);
            }
            let output = tc.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    /// Plugs a host's cable in, or out.
    pub(crate) fn plug(&self, host: usize, state: &str) {
        ip(&["-n", &self.switch(), "link", "set", &format!("port{host}"), state]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let spaces = (0..self.names.len()).map(|host| self.space(host));
        for space in spaces.chain([self.switch()]) {
            let _ = Command::new("ip").args(["netns", "delete", &space]).status();
        }
    }
}

pub(crate) fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(
        output.status.success(),
        "ip {args:?}, which takes root: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
