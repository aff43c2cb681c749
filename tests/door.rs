//! Who gets in: workers with what the join folder holds, and nobody else.

mod callers;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use self::callers::{Caller, Greeting};
use crate::support::{eventually, program, published, resume, short};

/// A run whose workers somebody else starts, on an address of this machine that
/// is not loopback, ends with the bytes of a loopback run that starts its own:
/// although strangers of every kind came, and a hundred a second for ten seconds.
#[test]
fn workers_join_by_hand_and_strangers_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);

    // The run to compare with, and what it lets be seen.
    let plain = path("plain");
    let as_long_as_strangers_come = ["--set", "training.warm_start_epochs=4"];
    let mut command = short(&plain, "2");
    command.args(as_long_as_strangers_come).args(["--set", "launch.threads=1"]);
    let mut loopback = Program::start(command, &path("plain.log"));
    loopback.says("worker attached");
    let token = environment_of_child(loopback.id(), "DRIFT_JOIN_TOKEN");
    assert_eq!(token.len(), 64, "256 bits");
    assert!(!plain.join("join").exists(), "its workers need no files");
    nowhere_in_arguments(&[&token]);
    assert_eq!(loopback.status(), Some(0), "{}", loopback.log());
    nowhere_in_files(&[&token], &[&plain, &path("plain.log")]);
    let expected = published(&plain);

    // The first start ends before a worker came: what it handed out is void.
    let run = path("run");
    let ip = address_of_this_machine();
    let mut command = short(&run, "2");
    command.args(as_long_as_strangers_come).args(["--set", "launch.threads=1"]);
    command.args(["--set", "launch.start=none"]);
    command.args(["--set", &format!("launch.listen={ip}:0")]);
    if ip.is_loopback() {
        command.args(["--set", "launch.tls=always"]);
    }
    let mut first = Program::start(command, &path("first.log"));
    first.says("wait for workers");
    let join = run.join("join");
    let old = path("old");
    copy(&join, &old);
    first.signal("TERM");
    assert_eq!(first.status(), Some(143), "{}", first.log());
    assert!(!join.exists(), "the folder goes with the process");

    // One worker is there before the coordinator, and waits for the folder.
    let early = worker(&join, 0, &path("worker-0.log"));
    let mut coordinator = Program::start(resume(&run), &path("run.log"));
    coordinator.says("wait for workers");
    let late = worker(&join, 1, &path("worker-1.log"));
    for rank in [0, 1] {
        coordinator.says(&format!("worker attached rank={rank}"));
    }
    let now = path("now");
    copy(&join, &now);
    let secrets = [secret(&now), secret(&old)].concat();
    nowhere_in_arguments(&secrets.iter().map(String::as_str).collect::<Vec<_>>());

    // A successor that comes before its forerunner's end waits for it.
    let successor = worker(&join, 1, &path("worker-1-again.log"));
    successor.says("slot 1 has its worker already");
    late.signal("KILL");
    successor.says("attached");

    // Whoever says nothing is hung up on.
    let silent = std::thread::spawn({
        let now = now.clone();
        move || {
            let began = Instant::now();
            let silence = callers::call(&now, Caller::Worker, Greeting::Silence);
            (callers::runtime().block_on(silence), began.elapsed())
        }
    });
    strangers_get_nothing(&coordinator, &now, &old, folder.path());
    let flood = callers::flood(&now, &old, 100, Duration::from_secs(10));
    let came = callers::runtime().block_on(flood);
    assert!(came >= 900, "{came} attempts");
    let (got, after) = silent.join().unwrap();
    assert!(got.bytes.is_empty() && after < Duration::from_secs(15), "{got:?} after {after:?}");
    coordinator.says("it did not greet in time");
    assert!(!coordinator.log().contains("phase=finished"), "all of them came while it ran");
    coordinator.says(" × its address calls too often");

    assert_eq!(coordinator.status(), Some(0), "{}", coordinator.log());
    for mut worker in [early, successor] {
        assert_eq!(worker.status(), Some(0), "{}", worker.log());
    }
    assert_eq!(published(&run), expected, "the bytes of the loopback run");
    let refused = coordinator.log().lines().filter(|line| line.contains("refuse")).count();
    assert!(refused < 120, "{refused} lines tell of more than a thousand callers");
    let logs =
        ["first.log", "run.log", "worker-0.log", "worker-1.log", "worker-1-again.log"].map(path);
    let files: Vec<&Path> = logs.iter().map(PathBuf::as_path).chain([run.as_path()]).collect();
    nowhere_in_files(&secrets.iter().map(String::as_str).collect::<Vec<_>>(), &files);
    assert!(!join.exists());
}

/// Callers of every kind that has no place in the run.
fn strangers_get_nothing(coordinator: &Program, now: &Path, old: &Path, folder: &Path) {
    // The worker program, with credentials in which something is another start's.
    let mixed = |name: &str, of_old: &[&str]| {
        let mix = folder.join(name);
        copy(now, &mix);
        for file in of_old {
            std::fs::copy(old.join(file), mix.join(file)).unwrap();
        }
        mix
    };
    let zeros = mixed("zeros", &[]);
    std::fs::write(zeros.join("token"), "0".repeat(64)).unwrap();
    for (mix, words, reason) in [
        (
            mixed("stranger", &["ca.pem", "worker.pem", "worker.key", "token"]),
            "is not the one that wrote",
            None,
        ),
        (
            mixed("certificate", &["worker.pem", "worker.key"]),
            "refused the certificate in",
            Some("its certificate is not of this start"),
        ),
        (
            mixed("replay", &["token"]),
            "refused this worker: refused",
            Some("its join token is not of this start"),
        ),
        (zeros, "refused this worker: refused", None),
    ] {
        let mut stranger = worker(&mix, 0, &mix.with_extension("log"));
        assert_eq!(stranger.status(), Some(1), "{}", stranger.log());
        assert!(stranger.log().contains(words), "{words:?} is not in: {}", stranger.log());
        assert!(!stranger.log().contains("protocol"), "it is told nothing else");
        if let Some(reason) = reason {
            coordinator.says(reason);
        }
    }

    let runtime = callers::runtime();
    let call = |caller, greeting, reason: &str| {
        let got = runtime.block_on(callers::call(now, caller, greeting));
        coordinator.says(reason);
        got
    };
    // Bytes that are no TLS get an alert of TLS at most; others get nothing.
    let is_alert = |got: &[u8]| got.len() <= 7 && (got.is_empty() || got[0] == 0x15);
    let got =
        call(Caller::Plain, Greeting::Raw(b"\xde\xad\xbe\xef".repeat(64)), "it does not speak TLS");
    assert!(is_alert(&got.bytes), "{got:?}");
    let http1 = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec();
    let got = call(Caller::Plain, Greeting::Raw(http1.clone()), "it does not speak TLS");
    assert!(is_alert(&got.bytes), "{got:?}");
    let got = call(Caller::Anonymous, Greeting::Raw(http1.clone()), "it shows no certificate");
    assert!(got.bytes.is_empty(), "{got:?}");
    let got = call(Caller::Worker, Greeting::Raw(http1), "it speaks HTTP/1");
    assert!(got.bytes.is_empty(), "{got:?}");
    let noise = Greeting::Raw(b"\xde\xad\xbe\xef".repeat(64));
    let got = call(Caller::Worker, noise, "it does not speak HTTP/2");
    assert!(got.bytes.is_empty(), "{got:?}");

    // Past certificate and HTTP/2. UNAUTHENTICATED is 16, FAILED_PRECONDITION 9.
    let got = call(Caller::Worker, Greeting::WithoutToken, "it has no join token");
    assert_eq!((got.status, got.message.as_str()), (Some(16), "refused"));
    let got = call(Caller::Worker, Greeting::UnknownPath, "it has no join token");
    assert_eq!((got.status, got.message.as_str()), (Some(16), "refused"), "which paths there are");
    let got = call(Caller::Worker, Greeting::Protocol(1), "another version of the protocol");
    assert_eq!(got.status, Some(9), "{got:?}");
    let got = call(Caller::Worker, Greeting::Generation(1), "it belongs to another generation");
    assert_eq!(got.status, Some(9), "{got:?}");
    let got = call(Caller::Worker, Greeting::Slot(9), "the run has no place for it");
    assert_eq!(got.status, Some(9), "{got:?}");
    // UNAVAILABLE: whoever has it may be gone by the next try.
    let got = call(Caller::Worker, Greeting::Slot(1), "another worker has its place");
    assert_eq!(got.status, Some(14), "{got:?}");
    assert!(got.message.contains("slot 1 has its worker already"), "{got:?}");

    let got = call(Caller::Worker, Greeting::Heartbeat, "its first message is no greeting");
    assert_eq!(got.status, Some(3), "{got:?}");

    // A message that is too large is not taken in, whether its length is one that
    // a worker's may have or not.
    let before = coordinator.peak_memory();
    for length in [1 << 30, 60 << 20] {
        let got = call(Caller::Worker, Greeting::Message(length), "it sent more than a greeting");
        assert!(got.sent < 2 << 20, "of {length} bytes, {} were taken in", got.sent);
    }
    let grown = coordinator.peak_memory().saturating_sub(before);
    assert!(grown < 16 << 20, "the coordinator grew by {grown} bytes");
}

/// What a hundred strangers a second for thirty seconds cost a run, in steps a
/// second. It prints figures, and is run by name: `-- --ignored flood --nocapture`.
#[test]
#[ignore = "a measurement of minutes, on a machine that does nothing else"]
fn a_flood_of_strangers_costs_the_run_little() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let run = path("run");
    let ip = address_of_this_machine();
    let launch = |run: &Path, log: &str| {
        let mut command = short(run, "2");
        command.args(["--set", "launch.threads=1", "--set", "launch.start=none"]);
        command.args(["--set", &format!("launch.listen={ip}:0"), "--set", "launch.tls=always"]);
        command.args(["--set", "training.warm_start_epochs=1000"]);
        command.args(["--set", "training.pairs_per_worker=1"]);
        let program = Program::start(command, &path(log));
        program.says("wait for workers");
        program
    };
    let mut other = launch(&path("other"), "other.log");
    let old = path("old");
    copy(&path("other/join"), &old);
    other.signal("TERM");
    other.status();
    let mut coordinator = launch(&run, "run.log");
    let join = run.join("join");
    let workers = [0, 1].map(|slot| worker(&join, slot, &path(&format!("worker-{slot}.log"))));
    coordinator.says("phase=Training");
    let steps = || {
        let file = run.join("iterations/00/metrics.jsonl");
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.lines().filter(|line| line.contains("\"loss\"")).count()
    };
    eventually(60, "the first steps", || steps() > 4);
    // From the end of a step to the end of another: there are not so many of them that a
    // part of one would not count.
    let next_step = || {
        let before = steps();
        eventually(60, "a step", || steps() > before);
        (steps(), Instant::now())
    };
    let period = Duration::from_secs(30);
    let measure = |what: &str, strangers: u32| {
        let (first, began) = next_step();
        let cpu = coordinator.cpu_seconds();
        let came = if strangers == 0 {
            std::thread::sleep(period);
            0
        } else {
            callers::runtime().block_on(callers::flood(&join, &old, strangers, period))
        };
        let (last, ended) = next_step();
        let seconds = (ended - began).as_secs_f64();
        let rate = (last - first) as f64 / seconds;
        let cpu = (coordinator.cpu_seconds() - cpu) / seconds;
        eprintln!(
            "{what}: {} steps, {rate:.3} a second, coordinator {:.2} % of a core, {came} strangers",
            last - first,
            100.0 * cpu
        );
        rate
    };
    let rates = [0, 100, 0].map(|n| measure(if n == 0 { "alone" } else { "flood" }, n));
    let (alone, flood) = ((rates[0] + rates[2]) / 2.0, rates[1]);
    eprintln!("a flood costs {:.1} %", 100.0 * (1.0 - flood / alone));
    assert!(flood > 0.9 * alone, "{rates:?}");
    coordinator.signal("TERM");
    assert_eq!(coordinator.status(), Some(143));
    drop(workers);
}

/// A program that runs, and its log. Dropped, it is killed.
pub(crate) struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    pub(crate) fn start(mut command: Command, log: &Path) -> Self {
        let file = std::fs::File::create(log).unwrap();
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        Self { child: command.spawn().unwrap(), log: log.to_owned() }
    }

    fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for a part of a line.
    pub(crate) fn says(&self, part: &str) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !self.log().contains(part) {
            assert!(Instant::now() < deadline, "{part:?} is not in: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn signal(&self, signal: &str) {
        let id = self.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
    }

    pub(crate) fn status(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// Most memory it has had, in bytes.
    fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Time that it has computed.
    fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: f64 = [11, 12].map(|n: usize| fields[n].parse::<f64>().unwrap()).iter().sum();
        ticks / 100.0
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A worker that a person starts.
fn worker(join: &Path, slot: u32, log: &Path) -> Program {
    let mut command = Command::new(program("worker"));
    command.args(["--join", join.to_str().unwrap(), "--slot", &slot.to_string()]);
    command.args(["--device", "cpu", "--threads", "1", "--wait", "100"]);
    command.env_remove("DRIFT_JOIN_TOKEN").env_remove("DRIFT_JOIN_DIR");
    Program::start(command, log)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// An address under which this machine reaches itself, not loopback if it has one.
fn address_of_this_machine() -> IpAddr {
    // Connecting a datagram socket sends nothing; it finds the way out.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let found = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
    found.map_or([127, 0, 0, 1].into(), |address| address.ip())
}

/// A variable of a process's first child that has it.
fn environment_of_child(parent: u32, name: &str) -> String {
    let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        let stat = read(format!("/proc/{id}/stat"));
        let of = stat.rsplit(')').next().unwrap().split_whitespace().nth(1);
        if of != Some(parent.to_string().as_str()) {
            continue;
        }
        let environment = read(format!("/proc/{id}/environ"));
        let value =
            environment.split('\0').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        if let Some(value) = value {
            return value.to_owned();
        }
    }
    panic!("no child of {parent} has {name}");
}

/// The token, and the lines of the private key.
fn secret(join: &Path) -> Vec<String> {
    let read = |name: &str| std::fs::read_to_string(join.join(name)).unwrap();
    let key = read("worker.key");
    let lines = key.lines().filter(|line| !line.starts_with("-----")).map(str::to_owned);
    lines.chain([read("token")]).filter(|line| line.len() > 16).collect()
}

fn nowhere_in_arguments(secrets: &[&str]) {
    for secret in secrets {
        assert!(crate::support::processes(secret).is_empty(), "a secret is in an argument");
    }
}

fn nowhere_in_files(secrets: &[&str], paths: &[&Path]) {
    for path in paths {
        if path.is_dir() {
            let entries: Vec<_> =
                std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
            nowhere_in_files(secrets, &entries.iter().map(PathBuf::as_path).collect::<Vec<_>>());
            continue;
        }
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        for secret in secrets {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "a secret is in {}", path.display());
        }
    }
}
