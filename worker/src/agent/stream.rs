//! One stream, kept: commands down, replies and heartbeats up.

use std::time::Duration;

use drift_proto::v1::{
    self as pb, coordinator_client::CoordinatorClient, coordinator_message::Body as Down,
    worker_message::Body as Up,
};
use drift_proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION};
use tch::Device;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
use tonic::{Request, Streaming};
use tracing::{info, warn};

use super::engine::{Engine, Place, Reply};
use super::wire;

/// How a worker finds its coordinator and what it brings.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// `http://HOST:PORT`.
    pub coordinator: String,
    /// The run's join token.
    pub token: String,
    /// Number that the launcher gave this process.
    pub slot: u32,
    /// Where it computes.
    pub device: Device,
    /// Threads it computes with.
    pub threads: u32,
    /// Name of this machine.
    pub host: String,
}

/// Why a worker ends other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The address is none.
    #[error("--coordinator {0:?}: expected http://HOST:PORT")]
    Address(String),
    /// The token cannot be sent.
    #[error("the join token holds characters that no token has")]
    Token,
    /// Nobody answers.
    #[error("connect to the coordinator at {address}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The coordinator does not let this worker in.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// The stream ended; the coordinator is gone, or gave this worker up.
    #[error("lost the coordinator: {0}")]
    Lost(String),
    /// The engine's thread cannot be started.
    #[error("start the engine's thread: {0}")]
    Engine(std::io::Error),
}

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// The engine has this long to reach its next check after a stop.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Serves one run: attaches, carries out commands, and returns when told to leave.
///
/// # Errors
/// The coordinator cannot be reached, refuses, or is lost.
pub async fn run(options: AgentOptions) -> Result<(), AgentError> {
    let (up, outbound) = mpsc::unbounded_channel();
    let mut inbound = attach(&options, &up, outbound).await?;
    let welcome = match inbound.next().await {
        Some(Ok(pb::CoordinatorMessage { body: Some(Down::Welcome(welcome)) })) => welcome,
        Some(Err(status)) => return Err(AgentError::Refused(status.message().to_owned())),
        _ => return Err(AgentError::Refused("it sent no welcome".to_owned())),
    };
    let mut session = Session::begin(options.device, &welcome, up)?;
    let ended = session.serve(&mut inbound).await;
    if !session.retire().await {
        kill_self();
    }
    ended
}

/// The engine is inside libtorch, perhaps in a collective whose peer is gone: nothing
/// there is worth waiting for, and an orderly exit would wait.
fn kill_self() {
    warn!("the engine did not stop in time; the process kills itself");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// Connects, proves itself, and opens the stream with a greeting.
async fn attach(
    options: &AgentOptions,
    up: &UnboundedSender<pb::WorkerMessage>,
    outbound: UnboundedReceiver<pb::WorkerMessage>,
) -> Result<Streaming<pb::CoordinatorMessage>, AgentError> {
    let channel = Endpoint::from_shared(options.coordinator.clone())
        .map_err(|_| AgentError::Address(options.coordinator.clone()))?
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .tcp_nodelay(true)
        .connect()
        .await
        .map_err(|source| AgentError::Connect { address: options.coordinator.clone(), source })?;
    let hello = pb::Hello {
        protocol_version: PROTOCOL_VERSION,
        slot: options.slot,
        pid: std::process::id(),
        host: options.host.clone(),
        device: device_name(options.device),
        threads: options.threads,
        libtorch_version: crate::LIBTORCH_VERSION.to_owned(),
    };
    let _ = up.send(pb::WorkerMessage { generation: 0, body: Some(Up::Hello(hello)) });
    let mut request = Request::new(UnboundedReceiverStream::new(outbound));
    let token: MetadataValue<Ascii> =
        format!("Bearer {}", options.token).parse().map_err(|_| AgentError::Token)?;
    request.metadata_mut().insert("authorization", token);
    CoordinatorClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
        .attach(request)
        .await
        .map(tonic::Response::into_inner)
        .map_err(|status| AgentError::Refused(status.message().to_owned()))
}

/// A generation that this worker belongs to, and the engine that computes in it.
struct Session {
    device: Device,
    engine: Engine,
    replied: UnboundedReceiver<Reply>,
    up: UnboundedSender<pb::WorkerMessage>,
    generation: u64,
    heartbeat: tokio::time::Interval,
}

impl Session {
    fn begin(
        device: Device,
        welcome: &pb::Welcome,
        up: UnboundedSender<pb::WorkerMessage>,
    ) -> Result<Self, AgentError> {
        let place = Place { rank: welcome.rank, world_size: welcome.world_size };
        let generation = welcome.generation;
        info!(rank = place.rank, world_size = place.world_size, generation, "attached");
        let (replies, replied) = mpsc::unbounded_channel();
        let engine = Engine::start(device, place, replies).map_err(AgentError::Engine)?;
        let period = Duration::try_from_secs_f64(welcome.heartbeat_seconds)
            .unwrap_or(Duration::from_secs(1));
        let mut heartbeat = tokio::time::interval(period);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Ok(Self { device, engine, replied, up, generation, heartbeat })
    }

    fn send(&self, body: Up) {
        let message = pb::WorkerMessage { generation: self.generation, body: Some(body) };
        let _ = self.up.send(message);
    }

    /// Passes commands to the engine and its replies up, until told to leave.
    async fn serve(
        &mut self,
        inbound: &mut Streaming<pb::CoordinatorMessage>,
    ) -> Result<(), AgentError> {
        loop {
            tokio::select! {
                message = inbound.next() => match message {
                    Some(Ok(pb::CoordinatorMessage { body: Some(body) })) => match body {
                        Down::Shutdown(_) => return Ok(()),
                        Down::Abort(_) => {
                            info!("told to stop");
                            return Ok(());
                        }
                        Down::Heartbeat(_) => {}
                        Down::Welcome(welcome) => self.begin_anew(&welcome).await?,
                        body => match wire::command(body) {
                            Ok(command) => self.engine.send(command),
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
                    self.send(wire::message(reply));
                }
                _ = self.heartbeat.tick() => self.beat(),
            }
        }
    }

    /// Drops what belongs to the generation so far, and begins the next.
    async fn begin_anew(&mut self, welcome: &pb::Welcome) -> Result<(), AgentError> {
        if !self.retire().await {
            kill_self();
        }
        *self = Self::begin(self.device, welcome, self.up.clone())?;
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

    fn beat(&self) {
        self.send(Up::Heartbeat(pb::Heartbeat { resident_bytes: resident_bytes() }));
    }
}

fn device_name(device: Device) -> String {
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
