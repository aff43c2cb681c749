//! The thread that owns libtorch: one command at a time, each answered once.

mod messages;
mod models;

use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tch::{Device, Kind};
use tokio::sync::mpsc::UnboundedSender;
use tracing::info;

use crate::collective::{ProcessGroup, Store};
use crate::reward::RewardError;
use crate::sample::{self, Progress, SampleError, Sampled};
use crate::train::{MicroBatch, TrainError, TrainStep};
pub(super) use messages::{Command, Reply};
use models::Models;

/// Progress is told this often; each time costs a message. A little sooner than the default
/// heartbeat, for which it then stands.
const PROGRESS_PERIOD: Duration = Duration::from_millis(900);

/// A handle on the engine's thread.
pub(super) struct Engine {
    commands: Sender<Command>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Where the engine stands among the others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) rank: u32,
    pub(super) world_size: u32,
    /// This machine's address on the network that leads to the others.
    pub(super) host: IpAddr,
}

impl Engine {
    /// Starts the thread; its replies go to `replies`.
    pub(super) fn start(
        device: Device,
        place: Place,
        replies: UnboundedSender<Reply>,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            #[cfg(feature = "cuda")]
            if let Device::Cuda(index) = device
                && let Err(error) = crate::collective::use_gpu(index)
            {
                let _ = replies.send(Reply::Failed(error.to_string()));
                return;
            }
            let bench = Bench {
                device,
                place,
                replies,
                stop: flag,
                models: Models::none(device),
                group: None,
                _store: None,
                writer: None,
            };
            bench.serve(&inbox);
        })?;
        Ok(Self { commands, stop, thread })
    }

    /// Queues a command.
    pub(super) fn send(&self, command: Command) {
        // A dead engine has told why in its last reply.
        let _ = self.commands.send(command);
    }

    /// Asks it to stop at the running command's next check, and to drop all it holds.
    pub(super) fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes it if it waits for a command.
        let _ = self.commands.send(Command::Stop);
    }

    /// Whether its thread has ended.
    pub(super) fn has_stopped(&self) -> bool {
        self.thread.is_finished()
    }
}

/// The engine's own side: everything that holds tensors.
struct Bench {
    device: Device,
    place: Place,
    replies: UnboundedSender<Reply>,
    stop: Arc<AtomicBool>,
    models: Models,
    group: Option<ProcessGroup>,
    /// Rank 0's store must outlive the group's rendezvous.
    _store: Option<Store>,
    /// Writes a copy of training state; at most one at a time.
    writer: Option<JoinHandle<()>>,
}

impl Bench {
    fn serve(mut self, inbox: &Receiver<Command>) {
        for command in inbox {
            if self.stopped() {
                break;
            }
            let reply = self.carry_out(command).unwrap_or_else(|e| Reply::Failed(format!("{e:#}")));
            if self.stopped() || self.replies.send(reply).is_err() {
                break;
            }
        }
        // It sees the stop as well, and must not write where others write next.
        self.await_writer();
    }

    fn await_writer(&mut self) {
        if let Some(writer) = self.writer.take() {
            // It tells of its own failures.
            let _ = writer.join();
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn carry_out(&mut self, command: Command) -> Result<Reply> {
        self.models.make_room_for(&command);
        match command {
            Command::Stop => bail!("stopped"),
            Command::OpenGroup { number, store, timeout } => {
                self.open_group(number, store, timeout).context("form the process group")
            }
            Command::LoadModel { directory, kind } => {
                let parameters = self.models.load(&directory, kind);
                let place = || format!("load the model in {}", directory.display());
                Ok(Reply::ModelReady { parameters: parameters.with_context(place)? })
            }
            Command::Sample { number, shard } => {
                self.sample(number, &shard).with_context(|| format!("sample shard {number}"))
            }
            Command::Embed { batch, sequences } => {
                self.embed(batch, &sequences).with_context(|| format!("embed batch {batch}"))
            }
            Command::Score { batch, micro_batches } => {
                self.score(batch, &micro_batches).with_context(|| format!("score batch {batch}"))
            }
            Command::Rate { batch, directory, kind, sequences } => {
                self.rate(batch, &directory, kind, &sequences).with_context(|| {
                    format!("rate batch {batch} by the model in {}", directory.display())
                })
            }
            Command::BeginTraining(settings) => {
                let trainer = self.models.trainer()?;
                trainer.begin(settings, self.group.as_ref()).context("begin training")?;
                Ok(Reply::Done)
            }
            Command::TrainStep(step) => {
                self.train(&step).with_context(|| format!("train step {}", step.step))
            }
            Command::SaveStateBeside { directory, step } => self
                .save_beside(&directory, step)
                .with_context(|| format!("copy training state for {}", directory.display())),
            Command::SaveState(folder) => {
                self.await_writer();
                let files = self.models.trainer()?.save_state(&folder);
                let place = || format!("save training state in {}", folder.display());
                Ok(Reply::StateSaved(files.with_context(place)?))
            }
            Command::LoadState(folder) => {
                let loaded = self.models.trainer()?.load_state(&folder);
                loaded.with_context(|| format!("load training state from {}", folder.display()))?;
                Ok(Reply::Done)
            }
            Command::SaveModel(folder) => {
                self.await_writer();
                let files = self.models.trainer()?.policy().save(&folder);
                let place = || format!("save the model in {}", folder.display());
                Ok(Reply::ModelSaved(files.with_context(place)?))
            }
        }
    }

    /// Copies this rank's part of training state, and writes it on a thread of its own.
    fn save_beside(&mut self, folder: &Path, step: u64) -> Result<Reply> {
        self.await_writer();
        let began = Instant::now();
        let copy = self.models.trainer()?.copy_state(folder)?;
        let copy_seconds = began.elapsed().as_secs_f64();
        let (stop, replies) = (Arc::clone(&self.stop), self.replies.clone());
        let folder = folder.to_owned();
        let write = move || {
            // What trains comes first.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 10);
            let began = Instant::now();
            let saved = copy.write(&folder, &|| stop.load(Ordering::Relaxed));
            let saved = saved.map_err(|error| format!("{:#}", anyhow::Error::from(error)));
            let write_seconds = began.elapsed().as_secs_f64();
            let _ =
                replies.send(Reply::SnapshotWritten { step, saved, copy_seconds, write_seconds });
        };
        self.writer = Some(std::thread::Builder::new().name("snapshot".to_owned()).spawn(write)?);
        Ok(Reply::Done)
    }

    fn open_group(
        &mut self,
        number: u64,
        store: Option<String>,
        timeout: Duration,
    ) -> Result<Reply> {
        let Place { rank, world_size, host: here } = self.place;
        let host = here.to_string();
        // Those who are still in the old one must not wait for this rank.
        (self.group, self._store) = (None, None);
        let store = match store {
            Some(address) => {
                let store: SocketAddr = address
                    .parse()
                    .with_context(|| format!("store address {address:?} is not IP:PORT"))?;
                reaches(here, store.ip()).with_context(|| format!("rank {rank}"))?;
                Store::connect(&store.ip().to_string(), store.port(), timeout)?
            }
            None if rank == 0 => {
                let (store, port) = Store::listen(&host)?;
                self.tell(Reply::StoreListening(SocketAddr::new(here, port).to_string()));
                store
            }
            None => bail!("rank {rank} got no store address"),
        };
        let group =
            ProcessGroup::form(&store, number, rank, world_size, timeout, &host, self.device)?;
        self.group = Some(group);
        self._store = Some(store);
        Ok(Reply::Done)
    }

    fn sample(&mut self, number: u64, shard: &sample::Shard) -> Result<Reply> {
        let began = Instant::now();
        let mut told = began;
        let (stop, replies) = (Arc::clone(&self.stop), self.replies.clone());
        let mut observe = |progress: Progress| {
            if told.elapsed() >= PROGRESS_PERIOD {
                told = Instant::now();
                let Progress { tokens, finished, .. } = progress;
                let _ = replies.send(Reply::SampleProgress { shard: number, tokens, finished });
            }
            if stop.load(Ordering::Relaxed) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        match self.models.sampler()?.sample(shard, &mut observe) {
            Ok(Sampled { samples, work }) => {
                let seconds = began.elapsed().as_secs_f64();
                info!(shard = number, ?work, seconds, "sampled");
                Ok(Reply::Sampled { shard: number, samples, seconds })
            }
            Err(SampleError::Stopped) => bail!("stopped"),
            Err(error) => Err(error.into()),
        }
    }

    fn embed(&mut self, batch: u64, sequences: &[Vec<u32>]) -> Result<Reply> {
        let stop = Arc::clone(&self.stop);
        let mut observe = |_| match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let embeddings = self.models.sampler()?.embed(sequences, &mut observe)?;
        Ok(Reply::Embedded { batch, embeddings })
    }

    fn rate(
        &mut self,
        batch: u64,
        directory: &Path,
        kind: Kind,
        sequences: &[Vec<u32>],
    ) -> Result<Reply> {
        let began = Instant::now();
        let stop = Arc::clone(&self.stop);
        let mut observe = |_| match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        match self.models.reward(directory, kind)?.rate(sequences, &mut observe) {
            Ok(ratings) => {
                let seconds = began.elapsed().as_secs_f64();
                info!(batch, sequences = ratings.len(), seconds, "rated");
                Ok(Reply::Rated { batch, ratings })
            }
            Err(RewardError::Stopped) => bail!("stopped"),
            Err(error) => Err(error.into()),
        }
    }

    fn score(&mut self, batch: u64, micro_batches: &[MicroBatch]) -> Result<Reply> {
        let stop = Arc::clone(&self.stop);
        let logps =
            self.models.trainer()?.score(micro_batches, &|| stop.load(Ordering::Relaxed))?;
        Ok(Reply::Scored { batch, logps })
    }

    fn train(&mut self, step: &TrainStep) -> Result<Reply> {
        let began = Instant::now();
        let stop = Arc::clone(&self.stop);
        let report = self
            .models
            .trainer()?
            .step(step, self.group.as_ref(), &|| stop.load(Ordering::Relaxed))
            .map_err(|error| match error {
                TrainError::Stopped => anyhow::anyhow!("stopped"),
                other => other.into(),
            })?;
        Ok(Reply::Stepped { step: step.step, report, seconds: began.elapsed().as_secs_f64() })
    }

    fn tell(&self, reply: Reply) {
        let _ = self.replies.send(reply);
    }
}

/// Who is bound to loopback meets nobody who is not.
fn reaches(here: IpAddr, rank_0: IpAddr) -> Result<()> {
    if here.to_canonical().is_loopback() == rank_0.to_canonical().is_loopback() {
        return Ok(());
    }
    bail!(
        "it would meet the others at {here}, and rank 0 is at {rank_0}: one is loopback, where nobody from another machine comes; name the network between them with --interface, or launch.interface where the coordinator starts the workers"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_a_network_do_not_meet() {
        let meet = |a: &str, b: &str| match (a.parse(), b.parse()) {
            (Ok(a), Ok(b)) => reaches(a, b).map_err(|error| error.to_string()),
            other => panic!("{other:?}"),
        };
        assert_eq!(meet("127.0.0.1", "127.0.0.1"), Ok(()));
        assert_eq!(meet("10.0.0.1", "10.0.0.2"), Ok(()));
        assert!(meet("127.0.1.1", "10.0.0.2").is_err_and(|why| why.contains("--interface")));
        assert!(meet("10.0.0.2", "::1").is_err());
    }
}
