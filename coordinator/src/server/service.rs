//! Decode, call, encode: the service behind the door.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use drift_proto::v1::{
    self as pb, coordinator_message::Body as Down, coordinator_server, worker_message::Body as Up,
};
use drift_proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use super::accept::accept;
use super::connection::Caller;
use super::limits::{Limits, raise_open_files};
use super::opening::{Opening, WayIn};
use super::refusal::{Refusal, RefusalLog};
use super::wire::{Incoming, Outgoing, incoming};
use crate::run::command::{Rank, Report};

/// What the run tells a worker that comes in.
#[derive(Debug, Clone)]
pub struct AttachPlan {
    /// Of the membership.
    pub generation: u64,
    /// Ranks there are.
    pub world_size: u32,
    /// Seconds between heartbeats.
    pub heartbeat: f64,
    /// Where the run lies: weights go through files in it.
    pub run_directory: String,
    /// SHA-256 of its `config.toml`, by which a worker knows it.
    pub config_sha256: Vec<u8>,
}

/// The way down to one worker. Its queue is bounded by the state machine, which
/// keeps at most two commands unanswered.
#[derive(Debug, Clone)]
pub struct Link(mpsc::UnboundedSender<Result<pb::CoordinatorMessage, Status>>);

impl Link {
    /// Greets a worker that is admitted, before its first command, or calls it into
    /// a new generation.
    pub fn welcome(&self, rank: Rank, plan: AttachPlan) {
        let welcome = pb::Welcome {
            generation: plan.generation,
            rank: rank.0,
            world_size: plan.world_size,
            heartbeat_seconds: plan.heartbeat,
            run_directory: plan.run_directory,
            config_sha256: plan.config_sha256,
        };
        let _ = self.0.send(Ok(pb::CoordinatorMessage { body: Some(Down::Welcome(welcome)) }));
    }

    /// Sends a command; a closed stream is noticed by its `Lost` event instead.
    pub fn send(&self, outgoing: Outgoing) {
        let _ = self.0.send(Ok(outgoing.into()));
    }
}

/// Tells one stream from every other, before and after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkId(u64);

/// Where a message comes from: a message of another stream, or of another generation
/// than the rank is in, is stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The rank it was started for.
    pub rank: Rank,
    /// Its stream.
    pub link: LinkId,
    /// The generation that the message names.
    pub generation: u64,
}

/// What comes from workers.
#[derive(Debug)]
pub enum WorkerEvent {
    /// A worker greets. The answer says whether it may take its place.
    Attach {
        /// The rank it was started for.
        rank: Rank,
        /// What it runs on, for people.
        about: String,
        /// Name of its machine.
        host: String,
        /// Its stream.
        id: LinkId,
        /// The way down to it.
        link: Link,
        /// Whether it has a place.
        answer: oneshot::Sender<Result<(), NoPlace>>,
    },
    /// It tells something.
    Report(Origin, Report),
    /// It dropped what it held, and begins the generation.
    Ready(Origin),
    /// It lives.
    Heartbeat(Rank, LinkId),
    /// Its stream is closed.
    Lost(Rank, LinkId, String),
}

/// Why a worker has no place in the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPlace {
    /// There is none, whenever it asks.
    Never(String),
    /// Another has it. It may be the forerunner, whose end nobody has noticed yet: who
    /// asks again is let in then.
    Taken(String),
}

/// The listening server.
#[derive(Debug)]
pub struct Server {
    /// How workers get in.
    pub way: Arc<WayIn>,
    refusals: RefusalLog,
}

impl Server {
    /// Takes in workers at `opening`'s door, `workers` of them, until the runtime
    /// ends.
    pub fn start(
        opening: Opening,
        workers: u32,
        events: mpsc::UnboundedSender<WorkerEvent>,
    ) -> Self {
        let Opening { listener, token, tls, way, .. } = opening;
        raise_open_files(workers);
        let refusals = RefusalLog::default();
        let connections = accept(listener, tls, Limits::of(workers), refusals.clone());
        let service = coordinator_server::CoordinatorServer::new(Service {
            events,
            links: AtomicU64::new(0),
        })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
        // A worker has one connection, and one stream on it.
        let server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .max_concurrent_streams(4)
            .http2_max_header_list_size(8 << 10)
            .http2_max_pending_accept_reset_streams(Some(8))
            .http2_max_local_error_reset_streams(Some(8))
            .max_frame_size(16 << 10)
            // Every path is behind the token, those that do not exist too.
            .layer(tonic::service::InterceptorLayer::new(token))
            .add_service(service)
            .serve_with_incoming(ReceiverStream::new(connections));
        tokio::spawn(async move {
            if let Err(error) = server.await {
                warn!(%error, "the server ended");
            }
        });
        let told = refusals.clone();
        tokio::spawn(async move {
            let mut period = tokio::time::interval(RefusalLog::PERIOD);
            loop {
                period.tick().await;
                told.tell();
            }
        });
        Self { way: Arc::new(way), refusals }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.refusals.tell();
    }
}

struct Service {
    events: mpsc::UnboundedSender<WorkerEvent>,
    links: AtomicU64,
}

type Outbound = Pin<Box<dyn Stream<Item = Result<pb::CoordinatorMessage, Status>> + Send>>;

#[tonic::async_trait]
impl coordinator_server::Coordinator for Service {
    type AttachStream = Outbound;

    async fn attach(
        &self,
        request: Request<Streaming<pb::WorkerMessage>>,
    ) -> Result<Response<Outbound>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(|| Status::internal("a connection without a caller"))?;
        let refuse = |refusal, status| {
            caller.refuse(refusal);
            Err(status)
        };
        let mut inbound = request.into_inner();
        let first = inbound.next().await;
        let Some(Ok(pb::WorkerMessage { body: Some(Up::Hello(hello)), generation })) = first else {
            let status = Status::invalid_argument("the first message must be a greeting");
            return refuse(Refusal::NoGreeting, status);
        };
        if hello.protocol_version != PROTOCOL_VERSION {
            let status = Status::failed_precondition(format!(
                "worker speaks protocol {}, coordinator {PROTOCOL_VERSION}; run both from one build",
                hello.protocol_version
            ));
            return refuse(Refusal::Protocol, status);
        }
        if generation != 0 {
            let status = Status::failed_precondition("a greeting belongs to no generation yet");
            return refuse(Refusal::Generation, status);
        }
        caller.greeted();
        let rank = Rank(hello.slot);
        let (down, outbound) = mpsc::unbounded_channel();
        let (answer, answered) = oneshot::channel();
        let about = format!(
            "{} on {} (pid {}, {} threads, libtorch {})",
            hello.device, hello.host, hello.pid, hello.threads, hello.libtorch_version
        );
        let link = Link(down);
        let id = LinkId(self.links.fetch_add(1, Ordering::Relaxed));
        self.tell(WorkerEvent::Attach { rank, about, host: hello.host, id, link, answer })?;
        let answer = answered.await.map_err(|_| Status::unavailable("the run is over"))?;
        match answer {
            Ok(()) => {}
            Err(NoPlace::Never(why)) => {
                return refuse(Refusal::NoPlace, Status::failed_precondition(why));
            }
            Err(NoPlace::Taken(why)) => return refuse(Refusal::Taken, Status::unavailable(why)),
        }
        caller.attached();
        tokio::spawn(listen(inbound, rank, id, self.events.clone()));
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outbound))))
    }
}

impl Service {
    fn tell(&self, event: WorkerEvent) -> Result<(), Status> {
        self.events.send(event).map_err(|_| Status::unavailable("the run is over"))
    }
}

/// Passes a worker's messages on until its stream ends, and then says so.
async fn listen(
    mut inbound: Streaming<pb::WorkerMessage>,
    rank: Rank,
    link: LinkId,
    events: mpsc::UnboundedSender<WorkerEvent>,
) {
    let why = loop {
        let message = match inbound.next().await {
            Some(Ok(message)) => message,
            Some(Err(status)) => break format!("its stream broke: {}", status.message()),
            None => break "it closed its stream".to_owned(),
        };
        let from = Origin { rank, link, generation: message.generation };
        let event = match incoming(message) {
            Ok(Incoming::Heartbeat) => WorkerEvent::Heartbeat(rank, link),
            Ok(Incoming::Ready) => WorkerEvent::Ready(from),
            Ok(Incoming::Report(report)) => WorkerEvent::Report(from, report),
            Err(what) => break format!("it sent {what}"),
        };
        if events.send(event).is_err() {
            return;
        }
    };
    let _ = events.send(WorkerEvent::Lost(rank, link, why));
}
