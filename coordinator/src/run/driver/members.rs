//! Workers as processes and streams: who is let in, who is listened to, who is
//! started again.

use anyhow::{Context, Result, bail};
use serde_json::json;
use tracing::{debug, info, warn};

use super::{Driver, Event, Rank, WorkerEvent, WorkerExit, resume, unix_seconds};
use crate::server::{AttachPlan, Link, LinkId, NoPlace, Origin, Outgoing};
use crate::store::Entry;

/// A worker that is attached.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) link: Link,
    id: LinkId,
    /// What its messages must name: others are of before it was called anew.
    generation: u64,
    host: String,
}

impl Driver {
    pub(super) fn worker_event(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Attach { rank, about, host, id, link, answer } => {
                let answered = self.admit(rank, id, &link, host);
                match &answered {
                    Ok(()) => {}
                    Err(NoPlace::Never(why)) => warn!(%rank, why, "refuse a worker"),
                    // It asks again, several times a second.
                    Err(NoPlace::Taken(why)) => debug!(%rank, why, "turn a worker away"),
                }
                let is_in = answered.is_ok();
                let is_listening = answer.send(answered).is_ok();
                if is_in && is_listening {
                    self.session.watch.heard(rank);
                    info!(%rank, about, generation = self.generation, "worker attached");
                    self.look_at_places();
                    self.feed(Event::Attached(rank));
                } else if is_in {
                    self.peers.remove(&rank);
                }
            }
            WorkerEvent::Report(from, report) if self.is_current(from) => {
                self.view.report(&report);
                self.session.watch.heard(from.rank);
                self.session.watch.report(&report);
                self.feed(Event::Told(from.rank, report));
            }
            WorkerEvent::Ready(from) if self.is_current(from) => {
                self.feed(Event::Attached(from.rank));
            }
            WorkerEvent::Report(from, _) | WorkerEvent::Ready(from) => {
                info!(rank = %from.rank, generation = from.generation, "drop a stale message");
            }
            WorkerEvent::Heartbeat(rank, id) if self.is_link(rank, id) => {
                self.session.watch.heard(rank);
                self.feed(Event::Heard(rank));
            }
            WorkerEvent::Lost(rank, id, why) if self.is_link(rank, id) => {
                self.feed(Event::Lost(rank, format!("{why}{}", self.log_hint(rank))));
            }
            // Of one that was replaced.
            WorkerEvent::Heartbeat(..) | WorkerEvent::Lost(..) => {}
        }
    }

    fn is_link(&self, rank: Rank, id: LinkId) -> bool {
        self.peers.get(&rank).is_some_and(|peer| peer.id == id)
    }

    fn is_current(&self, from: Origin) -> bool {
        let Origin { rank, link, generation } = from;
        self.peers.get(&rank).is_some_and(|p| p.id == link && p.generation == generation)
    }

    /// Lets a worker in, in a generation of its own.
    fn admit(&mut self, rank: Rank, id: LinkId, link: &Link, host: String) -> Result<(), NoPlace> {
        let world_size = self.session.workers;
        if rank.0 >= world_size {
            let why = format!("slot {rank} is outside this run's {world_size} workers");
            return Err(NoPlace::Never(why));
        }
        if self.peers.contains_key(&rank) {
            return Err(NoPlace::Taken(format!("slot {rank} has its worker already")));
        }
        let generation = self.next_generation();
        let generation = generation.map_err(|error| NoPlace::Never(format!("{error:#}")))?;
        link.welcome(rank, self.plan(generation));
        self.peers.insert(rank, Peer { link: link.clone(), id, generation, host });
        Ok(())
    }

    pub(super) fn next_generation(&mut self) -> Result<u64> {
        self.generation = match self.generations.next() {
            Some(next) => next,
            None => {
                // Many at once: a worker that attaches is not to wait for the disk.
                let more = self.session.workers;
                self.generations = self.session.journal.journal()?.next_generations(more)?;
                self.generations.next().context("generations are used up")?
            }
        };
        Ok(self.generation)
    }

    fn plan(&self, generation: u64) -> AttachPlan {
        AttachPlan {
            generation,
            world_size: self.session.workers,
            heartbeat: self.session.settings.launch.heartbeat,
            run_directory: self.place.0.clone(),
            config_sha256: self.place.1.clone(),
        }
    }

    /// Collectives go round in the order of ranks: says so where that crosses the
    /// network more often than it must.
    fn look_at_places(&self) {
        if self.peers.len() < self.session.workers as usize {
            return;
        }
        let hosts: Vec<_> = self.peers.values().map(|peer| peer.host.as_str()).collect();
        if let Some(host) = scattered(&hosts) {
            warn!(
                host,
                "its workers are not neighbours, and gradients cross the network more often than they must; give each machine's workers slots that follow one another"
            );
        }
    }

    pub(super) fn worker_exit(&mut self, exit: WorkerExit) {
        let WorkerExit { rank, process, by_itself, status, last_lines } = exit;
        if !self.launcher.is_current(rank, process) {
            return;
        }
        let mut why = format!("its process ended ({status})");
        if !last_lines.is_empty() {
            why.push_str("; its last lines:");
            for line in &last_lines {
                why.push_str("\n    ");
                why.push_str(line);
            }
        }
        let event = match by_itself && !self.peers.contains_key(&rank) {
            true => Event::StartFailed(rank, why),
            false => Event::Lost(rank, why),
        };
        self.feed(event);
    }

    /// Tells people, and keeps, that a worker is lost; listens to it no more.
    pub(super) fn drop_worker(&mut self, rank: Rank, why: &str) -> Result<()> {
        warn!(%rank, why, "worker lost; it is replaced");
        self.peers.remove(&rank);
        self.launcher.kill(rank);
        self.losses += 1;
        let kind = format!("loss {} of start {}", self.losses, self.generation);
        let loss = json!({ "rank": rank, "why": why, "at": unix_seconds() });
        self.session.journal.record(Entry::Counts(kind, loss))?;
        Ok(())
    }

    /// Calls workers into a new generation.
    pub(super) fn call(&mut self, ranks: &[Rank]) -> Result<()> {
        let generation = self.next_generation()?;
        info!(generation, workers = ranks.len(), "form the group anew");
        let plan = self.plan(generation);
        for rank in ranks {
            if let Some(peer) = self.peers.get_mut(rank) {
                peer.generation = generation;
                peer.link.welcome(*rank, plan.clone());
            }
        }
        Ok(())
    }

    /// Where the run stands, by what is on disk.
    pub(super) fn rewind(&mut self) -> Result<Event> {
        self.view.close();
        self.metrics = None;
        let Self { session, machine, .. } = self;
        let extent = machine.extent();
        let (resume, rows) =
            resume::resume(&session.run, session.journal.journal()?, extent, session.workers)?;
        info!(position = ?resume.position, after = ?resume.after, "go back to what is on disk");
        self.pairs = super::by_id(rows);
        super::carry::renew_metrics(self.session.journal.journal()?, &self.session.run)?;
        Ok(Event::Rewound(Box::new(resume)))
    }

    pub(super) fn dismiss(&self) {
        for peer in self.peers.values() {
            peer.link.send(Outgoing::Abort);
            peer.link.send(Outgoing::Shutdown);
        }
    }

    fn log_hint(&self, rank: Rank) -> String {
        let log = self.session.run.worker_log(rank.0);
        // A worker that somebody else started has its log somewhere else.
        if log.exists() { format!("; its log is {}", log.display()) } else { String::new() }
    }

    pub(super) fn link(&self, rank: Rank) -> Result<&Link> {
        match self.peers.get(&rank) {
            Some(peer) => Ok(&peer.link),
            None => bail!("worker {rank} is gone"),
        }
    }
}

/// A host that comes again in the order of ranks, behind another.
fn scattered<'a>(hosts: &[&'a str]) -> Option<&'a str> {
    let mut gone = std::collections::BTreeSet::new();
    hosts.windows(2).filter(|pair| pair[0] != pair[1]).find_map(|pair| {
        gone.insert(pair[0]);
        gone.contains(pair[1]).then_some(pair[1])
    })
}

#[cfg(test)]
mod tests {
    use super::scattered;

    #[test]
    fn hosts_whose_ranks_are_apart_are_found() {
        assert_eq!(scattered(&["a", "a", "b", "b"]), None);
        assert_eq!(scattered(&["a"]), None);
        assert_eq!(scattered(&["a", "b", "a", "b"]), Some("a"));
        assert_eq!(scattered(&["a", "b", "c", "c", "b"]), Some("b"));
    }
}
