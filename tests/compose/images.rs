//! What the images are, before anything runs in them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::bed::root;
use crate::project::{compose, docker, told};

/// Each image, and the bytes that it stays under.
const IMAGES: [(&str, u64); 2] = [("coordinator", 80_000_000), ("worker", 900_000_000)];

/// Small, labelled, run by nobody in particular, without a shell, and working.
pub(crate) fn check(tag: &str) -> Result<()> {
    for (name, limit) in IMAGES {
        let image = format!("drift-{name}:{tag}");
        let field = |format: &str| told(docker(&["image", "inspect", "--format", format, &image]));
        let size: u64 = field("{{.Size}}").context("run `make images` first")?.parse()?;
        println!("  {image}: {:.1} MB", size as f64 / 1e6);
        ensure!(size < limit, "{image} has {size} bytes, and is to stay under {limit}");
        ensure!(field("{{.Config.User}}")? == "10001:10001", "{image} runs as root");
        for label in ["version", "revision"] {
            let key = format!("org.opencontainers.image.{label}");
            let value = field(&format!("{{{{index .Config.Labels \"{key}\"}}}}"))?;
            ensure!(!value.is_empty() && value != "unknown", "{image} has no {label}");
        }
        let run = |entry: &[&str], arguments: &[&str]| {
            let limits =
                ["run", "--rm", "--read-only", "--network=none", "--cap-drop=ALL", "--tmpfs=/tmp"];
            docker(&[&limits[..], entry, &[image.as_str()], arguments].concat())
        };
        let version = told(run(&[], &["--version"]))?;
        ensure!(version.ends_with(env!("CARGO_PKG_VERSION")), "{image}: {version}");
        for shell in ["/bin/sh", "/bin/bash", "/bin/busybox"] {
            let there = run(&["--entrypoint", shell], &["-c", "exit 0"]).output()?;
            ensure!(!there.status.success(), "{image} holds {shell}");
        }
        let probe = run(&["--entrypoint", "probe"], &["9464/healthz"]).output()?;
        ensure!(probe.status.code() == Some(1), "{image}: its probe says {probe:?}");
    }
    Ok(())
}

/// Kubernetes' own schemas accept the manifests, and they say what compose's file says.
pub(crate) fn check_manifests(python: &Path) -> Result<()> {
    let mut command = Command::new(python);
    command.current_dir(root()).arg("tests/python/kubernetes_reference.py");
    command.args(["deploy/kubernetes/drift.yaml", "deploy/compose.yaml"]);
    for line in told(command).context("compare the manifests")?.lines() {
        println!("  {line}");
    }
    Ok(())
}

/// Compose has nothing to say against its file, in either profile.
pub(crate) fn check_files() -> Result<()> {
    let file = "deploy/compose.yaml";
    ensure!(root().join(file).exists(), "{file} is missing");
    for (profile, image) in [("cpu", "drift-worker:latest"), ("gpu", "drift-worker-cuda:latest")] {
        let mut command = compose();
        command.args(["-f", file, "--profile", profile, "config"]);
        let said = command.output()?;
        let words = String::from_utf8_lossy(&said.stderr);
        ensure!(said.status.success() && words.trim().is_empty(), "profile {profile}: {words}");
        let text = String::from_utf8_lossy(&said.stdout);
        ensure!(text.matches(&format!("image: {image}")).count() == 2, "profile {profile}: {text}");
        ensure!(text.contains("image: drift-coordinator:latest"), "profile {profile}");
    }
    Ok(())
}
