//! Follows a run's story, and lets faults happen where it says.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::faults::{ABSENCE, Fault, Kind, PAUSE, Schedule, Victim};
use crate::hosts::{Hosts, Workers};
use crate::latencies::Latencies;
use crate::log;
use crate::run::program;

/// Follows a run's story over the lives of its coordinators, and lets faults happen.
pub(crate) struct Follower<'a> {
    waiting: Vec<Fault>,
    /// Where it runs, if not on one host; and the run's directory.
    hosts: Option<(&'a Hosts, PathBuf)>,
    /// Those that no coordinator starts.
    hand_started: Workers,
    /// Whether the coordinator of now has called for those.
    called: bool,
    /// Cables that are out or congested: whose, how, and until when.
    cables: Vec<(Option<u32>, Kind, Instant)>,
    workers: BTreeMap<u32, u32>,
    /// Every worker of the coordinator of now.
    pids: Vec<u32>,
    /// Workers that a signal struck, and which.
    struck: BTreeMap<u32, (Kind, Instant)>,
    lost_in_training: Option<Instant>,
    phase: String,
    deadline: Instant,
    fired: usize,
    lost: usize,
    latencies: Latencies,
    /// Whether a fault ended the coordinator of now, and since when.
    pub(crate) coordinator_fell: bool,
    told_to_stop: Option<Instant>,
    pub(crate) log: String,
}

/// What was seen over a whole run.
pub(crate) struct Outcome {
    pub(crate) fired: usize,
    pub(crate) lost: usize,
    pub(crate) latencies: Latencies,
    pub(crate) log: String,
}

/// A stop by SIGTERM is to be over by then, and workers are to be gone so long after
/// their coordinator.
const STOP_LIMIT: Duration = Duration::from_secs(5);
const ORPHAN_LIMIT: Duration = Duration::from_secs(10);

impl<'a> Follower<'a> {
    /// Of a run that has until `deadline`.
    pub(crate) fn new(
        schedule: Schedule,
        hosts: Option<(&'a Hosts, &Path)>,
        deadline: Instant,
    ) -> Self {
        let mut waiting = schedule.faults;
        waiting.reverse();
        Self {
            waiting,
            hosts: hosts.map(|(hosts, dir)| (hosts, dir.to_owned())),
            hand_started: Workers::default(),
            called: false,
            cables: Vec::new(),
            workers: BTreeMap::new(),
            pids: Vec::new(),
            struck: BTreeMap::new(),
            lost_in_training: None,
            phase: "start".to_owned(),
            deadline,
            fired: 0,
            lost: 0,
            latencies: Latencies::default(),
            coordinator_fell: false,
            told_to_stop: None,
            log: String::new(),
        }
    }

    /// Runs one coordinator to its end.
    pub(crate) fn follow(&mut self, mut command: Command) -> Result<ExitStatus> {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let coordinator = child.id();
        let stderr = child.stderr.take().context("its log")?;
        let (lines, told) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        self.workers.clear();
        self.pids.clear();
        self.struck.clear();
        self.phase = "start".to_owned();
        self.called = false;
        (self.coordinator_fell, self.lost_in_training, self.told_to_stop) = (false, None, None);
        self.listen(&told, coordinator)?;
        if Instant::now() > self.deadline {
            signal(coordinator, "KILL");
            for pid in self.workers.values() {
                signal(*pid, "KILL");
            }
            self.log.push_str("(it took too long)\n");
        }
        let status = child.wait()?;
        if let Some(since) = self.told_to_stop {
            self.latencies.stopped.push(since.elapsed());
        }
        Ok(status)
    }

    /// Mends all cables, and ends who is left.
    pub(crate) fn end(mut self) -> Outcome {
        self.mend(true);
        let Self { fired, lost, latencies, log, .. } = self;
        Outcome { fired, lost, latencies, log }
    }

    /// What a coordinator that ended must not leave: workers that live on, or a stop
    /// that took long.
    pub(crate) fn left_behind(&self) -> Option<String> {
        if let Some(since) = self.told_to_stop
            && since.elapsed() > STOP_LIMIT
        {
            return Some(format!("a stop by SIGTERM took {:?}", since.elapsed()));
        }
        if self.hosts.is_some() {
            // These wait for the next one.
            return None;
        }
        let ended = Instant::now();
        let is_alive = |pid: &u32| {
            // A zombie of a reaped parent's is gone.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        while self.pids.iter().any(is_alive) {
            if ended.elapsed() > ORPHAN_LIMIT {
                return Some("workers outlive their coordinator".to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    fn listen(&mut self, told: &Receiver<String>, coordinator: u32) -> Result<()> {
        loop {
            self.mend(false);
            self.start_workers()?;
            match told.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => {
                    self.hear(&line);
                    self.called |= log::calls_for_workers(&line);
                    self.log.push_str(&line);
                    self.log.push('\n');
                    let place = log::place(&line);
                    if self.waiting.last().is_some_and(|f| Some(&f.place) == place.as_ref())
                        && let Some(fault) = self.waiting.pop()
                    {
                        self.fire(&fault, coordinator)?;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) if Instant::now() > self.deadline => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn hear(&mut self, line: &str) {
        if let Some((rank, pid)) = log::attached(line) {
            self.workers.insert(rank, pid);
            self.pids.push(pid);
        }
        if let Some(rank) = log::lost(line) {
            self.lost += 1;
            if let Some((kind, since)) = self.struck.remove(&rank) {
                match kind {
                    Kind::Stop | Kind::Cut => self.latencies.silence.push(since.elapsed()),
                    _ => self.latencies.noticed.push(since.elapsed()),
                }
                if self.phase == "Training" {
                    self.lost_in_training = Some(Instant::now());
                }
            }
        }
        if let Some(phase) = log::phase(line) {
            self.phase = phase;
        }
        if log::is_step(line)
            && let Some(since) = self.lost_in_training.take()
        {
            self.latencies.trained_again.push(since.elapsed());
        }
    }

    /// From a coordinator's call for workers that nobody else starts until all are there:
    /// those that its forerunner sent home may take a moment to leave.
    fn start_workers(&mut self) -> Result<()> {
        if let Some((hosts, dir)) = &self.hosts
            && self.called
            && self.workers.len() < hosts.workers()
        {
            hosts.start_workers(&program("worker"), dir, &mut self.hand_started)?;
        }
        Ok(())
    }

    /// Mends cables whose time is over, or all.
    fn mend(&mut self, all: bool) {
        let Some((hosts, _)) = self.hosts else { return };
        let over = |(_, _, until): &(_, _, Instant)| all || *until <= Instant::now();
        for (whose, kind, _) in self.cables.extract_if(.., |cable| over(cable)) {
            match kind {
                Kind::Congest => hosts.congest(whose, false),
                _ => hosts.plug(whose, "up"),
            }
            self.log.push_str(&format!("(chaos: the cable of {whose:?} is mended)\n"));
        }
    }

    /// Pulls a cable, or congests it.
    fn disturb_cable(&mut self, victim: Victim, kind: Kind) {
        let Some((hosts, _)) = &self.hosts else { return };
        let whose = match victim {
            Victim::Coordinator => None,
            Victim::Worker(rank) => Some(rank),
        };
        // One thing at a time for each cable.
        if self.cables.iter().any(|(other, ..)| *other == whose) {
            return;
        }
        match kind {
            Kind::Congest => hosts.congest(whose, true),
            _ => hosts.plug(whose, "down"),
        }
        let lasts = if kind == Kind::Blink { PAUSE } else { ABSENCE };
        self.cables.push((whose, kind, Instant::now() + lasts));
    }

    fn fire(&mut self, fault: &Fault, coordinator: u32) -> Result<()> {
        std::thread::sleep(fault.delay);
        let pid = match fault.victim {
            Victim::Coordinator => Some(coordinator),
            Victim::Worker(rank) => self.workers.get(&rank).copied(),
        };
        // A worker that has not attached has no process that is known here.
        let Some(pid) = pid else { return Ok(()) };
        self.fired += 1;
        *self.latencies.by_phase.entry(self.phase.clone()).or_default() += 1;
        self.log.push_str(&format!("(chaos: {:?} {:?})\n", fault.kind, fault.victim));
        match fault.kind {
            Kind::Kill => signal(pid, "KILL"),
            Kind::Stop => signal(pid, "STOP"),
            Kind::Term => signal(pid, "TERM"),
            Kind::Pause => {
                signal(pid, "STOP");
                std::thread::sleep(PAUSE);
                signal(pid, "CONT");
            }
            Kind::Cut | Kind::Blink | Kind::Congest => {
                self.disturb_cable(fault.victim, fault.kind);
            }
        }
        match (fault.victim, fault.kind) {
            (Victim::Coordinator, kind @ (Kind::Kill | Kind::Term)) => {
                self.coordinator_fell = true;
                self.told_to_stop = (kind == Kind::Term).then(Instant::now);
            }
            (Victim::Worker(rank), kind @ (Kind::Kill | Kind::Stop | Kind::Cut)) => {
                self.struck.insert(rank, (kind, Instant::now()));
            }
            _ => {}
        }
        Ok(())
    }
}

fn signal(pid: u32, name: &str) {
    // The process may have ended by itself.
    let _ =
        Command::new("kill").args(["-s", name, &pid.to_string()]).stderr(Stdio::null()).status();
}
