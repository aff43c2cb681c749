//! One stream, kept: commands down, replies and heartbeats up.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use drift_proto::PROTOCOL_VERSION;
use drift_proto::v1::{self as pb, coordinator_message::Body as Down, worker_message::Body as Up};
use tch::Device;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio_stream::StreamExt;
use tonic::Streaming;
use tracing::{info, warn};

use super::connect::{self, ConnectError};
use super::engine::{Engine, Place, Reply};
use super::interface::{self, InterfaceError};
use super::join::JoinOptions;
use super::place::{self, Unseen};
use super::watch::Watch;
use super::wire;

/// How a worker finds its coordinator and what it brings.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Where it is, and what lets this worker in.
    pub join: JoinOptions,
    /// How long it is waited for, each time.
    pub wait: Duration,
    /// Whether it is looked for again when it is lost: by a worker that it did not
    /// start, and so will not start again.
    pub rejoins: bool,
    /// Number that the launcher gave this process.
    pub slot: u32,
    /// Where it computes.
    pub device: Device,
    /// Threads it computes with.
    pub threads: u32,
    /// Name of this machine.
    pub host: String,
    /// Interface or address at which the other workers meet it; none: on the way to the
    /// coordinator.
    pub interface: Option<String>,
    /// What monitoring sees.
    pub watch: Arc<Watch>,
}

/// Why a worker ends other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It was not let in.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The coordinator does not let this worker in.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// The stream ended; the coordinator is gone, or gave this worker up.
    #[error("lost the coordinator: {0}")]
    Lost(String),
    /// The run directory is out of sight.
    #[error(transparent)]
    Unseen(#[from] Unseen),
    /// There is no such interface.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// The engine's thread cannot be started.
    #[error("start the engine's thread: {0}")]
    Engine(std::io::Error),
}

/// The engine has this long to reach its next check after a stop.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Serves one run: attaches, carries out commands, and returns when told to leave. A
/// worker that rejoins attaches anew where its coordinator is lost.
///
/// # Errors
/// The coordinator cannot be reached, refuses, or is lost.
pub async fn run(options: AgentOptions) -> Result<(), AgentError> {
    loop {
        match attend(&options).await {
            Err(AgentError::Lost(why)) if options.rejoins => {
                warn!(why, wait = ?options.wait, "lost the coordinator; look for it again");
            }
            ended => return ended,
        }
    }
}

/// Attaches once, and serves until the stream ends.
async fn attend(options: &AgentOptions) -> Result<(), AgentError> {
    let (up, mut inbound, here) =
        connect::attach(&options.join, &hello(options), options.wait).await?;
    let welcome = match inbound.next().await {
        Some(Ok(pb::CoordinatorMessage { body: Some(Down::Welcome(welcome)) })) => welcome,
        Some(Err(status)) => return Err(AgentError::Refused(status.message().to_owned())),
        _ => return Err(AgentError::Refused("it sent no welcome".to_owned())),
    };
    let usable = async {
        place::look(&welcome, &options.host)?;
        Ok::<_, AgentError>(interface::address(options.interface.as_deref(), here).await?)
    };
    let here = match usable.await {
        Ok(here) => here,
        Err(error) => return give_up(error, &welcome, &up, &mut inbound).await,
    };
    let watch = Arc::clone(&options.watch);
    let mut session = Session::begin(options.device, &welcome, up, here, watch)?;
    let ended = session.serve(&mut inbound).await;
    options.watch.detached();
    if !session.retire().await {
        kill_self();
    }
    ended
}

/// Tells the coordinator why this worker is of no use, and waits to be told to leave: so
/// that it is told, too.
async fn give_up(
    error: AgentError,
    welcome: &pb::Welcome,
    up: &UnboundedSender<pb::WorkerMessage>,
    inbound: &mut Streaming<pb::CoordinatorMessage>,
) -> Result<(), AgentError> {
    let failure = wire::message(Reply::Failed(error.to_string()));
    let generation = welcome.generation;
    let _ = up.send(pb::WorkerMessage { generation, body: Some(failure) });
    let told = async {
        while let Some(Ok(message)) = inbound.next().await {
            if matches!(message.body, Some(Down::Shutdown(_))) {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(STOP_GRACE, told).await;
    Err(error)
}

/// The engine is inside libtorch, perhaps in a collective whose peer is gone: nothing
/// there is worth waiting for, and an orderly exit would wait.
fn kill_self() {
    warn!("the engine did not stop in time; the process kills itself");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// What this worker tells of itself.
fn hello(options: &AgentOptions) -> pb::Hello {
    pb::Hello {
        protocol_version: PROTOCOL_VERSION,
        slot: options.slot,
        pid: std::process::id(),
        host: options.host.clone(),
        device: device_name(options.device),
        threads: options.threads,
        libtorch_version: crate::LIBTORCH_VERSION.to_owned(),
    }
}

/// A generation that this worker belongs to, and the engine that computes in it.
struct Session {
    device: Device,
    engine: Engine,
    replied: UnboundedReceiver<Reply>,
    up: UnboundedSender<pb::WorkerMessage>,
    generation: u64,
    heartbeat: tokio::time::Interval,
    /// This machine's address at which the others meet it.
    here: IpAddr,
    watch: Arc<Watch>,
}

impl Session {
    fn begin(
        device: Device,
        welcome: &pb::Welcome,
        up: UnboundedSender<pb::WorkerMessage>,
        here: IpAddr,
        watch: Arc<Watch>,
    ) -> Result<Self, AgentError> {
        let place = Place { rank: welcome.rank, world_size: welcome.world_size, host: here };
        let generation = welcome.generation;
        info!(rank = place.rank, world_size = place.world_size, generation, "attached");
        let (replies, replied) = mpsc::unbounded_channel();
        let engine = Engine::start(device, place, replies).map_err(AgentError::Engine)?;
        let period = Duration::try_from_secs_f64(welcome.heartbeat_seconds)
            .unwrap_or(Duration::from_secs(1));
        let mut heartbeat = tokio::time::interval(period);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        watch.attached(generation, period);
        Ok(Self { device, engine, replied, up, generation, heartbeat, here, watch })
    }

    /// Whatever is said tells that this worker lives: the next heartbeat is due a period
    /// later.
    fn send(&mut self, body: Up) {
        let message = pb::WorkerMessage { generation: self.generation, body: Some(body) };
        let _ = self.up.send(message);
        self.heartbeat.reset();
        self.watch.turned();
    }

    /// Passes commands to the engine and its replies up, until told to leave.
    async fn serve(
        &mut self,
        inbound: &mut Streaming<pb::CoordinatorMessage>,
    ) -> Result<(), AgentError> {
        loop {
            tokio::select! {
                message = inbound.next() => match message {
                    Some(Ok(pb::CoordinatorMessage { body: Some(body) })) => match self.hear(body) {
                        Down::Shutdown(_) => return Ok(()),
                        Down::Abort(_) => {
                            info!("told to stop");
                            return Ok(());
                        }
                        Down::Heartbeat(_) => {}
                        Down::Welcome(welcome) => self.begin_anew(&welcome).await?,
                        body => match wire::command(body) {
                            Ok(command) => {
                                self.watch.command(&command);
                                self.engine.send(command);
                            }
                            Err(what) => {
                                let what = format!("decode a command: {what}");
                                self.send(wire::message(Reply::Failed(what)));
                            }
                        },
                    },
                    Some(Ok(pb::CoordinatorMessage { body: None })) => {}
                    Some(Err(status)) => return Err(AgentError::Lost(status.message().to_owned())),
                    None => return Err(AgentError::Lost("it closed the stream".to_owned())),
                },
                Some(reply) = self.replied.recv() => {
                    if let Reply::Failed(message) = &reply {
                        warn!(%message, "a command failed");
                    }
                    self.watch.reply(&reply);
                    self.send(wire::message(reply));
                }
                _ = self.heartbeat.tick() => self.beat(),
            }
        }
    }

    /// Whatever it says, the coordinator lives.
    fn hear(&mut self, body: Down) -> Down {
        self.watch.heard();
        body
    }

    /// Drops what belongs to the generation so far, and begins the next.
    async fn begin_anew(&mut self, welcome: &pb::Welcome) -> Result<(), AgentError> {
        if !self.retire().await {
            kill_self();
        }
        let watch = Arc::clone(&self.watch);
        *self = Self::begin(self.device, welcome, self.up.clone(), self.here, watch)?;
        self.send(Up::Ready(pb::Ready {}));
        Ok(())
    }

    /// Stops the engine at its next check, with heartbeats going on; false if it did
    /// not stop in time.
    async fn retire(&mut self) -> bool {
        self.engine.ask_to_stop();
        let deadline = tokio::time::Instant::now() + STOP_GRACE;
        while !self.engine.has_stopped() && tokio::time::Instant::now() < deadline {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
                _ = self.heartbeat.tick() => self.beat(),
            }
        }
        self.engine.has_stopped()
    }

    fn beat(&mut self) {
        self.send(Up::Heartbeat(pb::Heartbeat { resident_bytes: resident_bytes() }));
    }
}

/// As `--device` spells it.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Resident memory of this process; 0 where the system does not tell.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}
