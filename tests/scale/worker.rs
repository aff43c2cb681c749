//! One worker, as the wire knows it: it sleeps where an engine would compute.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use drift_proto::v1::{
    self as pb, coordinator_client::CoordinatorClient, coordinator_message::Body as Down,
    worker_message::Body as Up,
};
use drift_proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Streaming};

use crate::fleet::Fleet;

/// As the real one tells of a shard under way.
const PROGRESS_PERIOD: Duration = Duration::from_millis(900);

/// Why a worker's session ended, other than by a fault of its own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It closed its connection, as was planned.
    Lost,
    /// The coordinator is gone, or told it to leave.
    Dismissed,
}

/// A worker that is attached.
struct Session<'a> {
    fleet: &'a Fleet,
    up: UnboundedSender<pb::WorkerMessage>,
    generation: u64,
    rank: u32,
    /// As the real one's: due a period after whatever was said last.
    heartbeat: Interval,
    /// The lease in hand, and when it is sampled.
    lease: Option<(pb::SampleShard, tokio::time::Instant)>,
    /// Since when it has waited for one.
    idle: Option<Instant>,
}

/// Attaches, and serves until the stream ends.
pub(crate) async fn attend(fleet: &Fleet, slot: u32) -> Result<Ended> {
    let (up, outbound) = unbounded_channel();
    let hello = pb::Hello {
        protocol_version: PROTOCOL_VERSION,
        slot,
        pid: std::process::id(),
        host: format!("node{}", slot / 8),
        device: "cpu".to_owned(),
        threads: 1,
        libtorch_version: "none".to_owned(),
    };
    let _ = up.send(pb::WorkerMessage { generation: 0, body: Some(Up::Hello(hello)) });
    let mut request = Request::new(UnboundedReceiverStream::new(outbound));
    request.metadata_mut().insert("authorization", fleet.bearer.clone());
    let mut client = CoordinatorClient::new(connect(&fleet.address).await?)
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let mut inbound = client.attach(request).await.context("attach")?.into_inner();
    let welcome = match inbound.next().await {
        Some(Ok(pb::CoordinatorMessage { body: Some(Down::Welcome(welcome)) })) => welcome,
        other => bail!("no welcome, but {other:?}"),
    };
    let period = Duration::try_from_secs_f64(welcome.heartbeat_seconds).context("heartbeat")?;
    let session = Session {
        fleet,
        up,
        generation: welcome.generation,
        rank: welcome.rank,
        heartbeat: every(period),
        lease: None,
        idle: None,
    };
    session.serve(&mut inbound).await
}

/// With the settings of a real worker's connection.
async fn connect(address: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(address.to_owned()).context("the address")?;
    let endpoint = endpoint
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true);
    endpoint.connect().await.context("connect")
}

impl Session<'_> {
    async fn serve(mut self, inbound: &mut Streaming<pb::CoordinatorMessage>) -> Result<Ended> {
        let mut progress = every(PROGRESS_PERIOD);
        loop {
            let done = self.lease.as_ref().map(|(_, at)| *at);
            tokio::select! {
                message = inbound.next() => match message {
                    Some(Ok(pb::CoordinatorMessage { body: Some(Down::Shutdown(_) | Down::Abort(_)) }))
                    | Some(Err(_)) | None => return Ok(Ended::Dismissed),
                    Some(Ok(pb::CoordinatorMessage { body })) => self.told(body)?,
                },
                () = sleep_until(done.unwrap_or_else(tokio::time::Instant::now)), if done.is_some() => {
                    let Some((lease, _)) = self.lease.take() else { continue };
                    if self.fleet.loses(lease.shard) {
                        self.fleet.tally.lost(lease.shard);
                        return Ok(Ended::Lost);
                    }
                    let replies = self.fleet.replies(&lease);
                    self.send(Up::SampleResult(replies));
                    self.idle = Some(Instant::now());
                }
                _ = self.heartbeat.tick() => self.send(Up::Heartbeat(pb::Heartbeat { resident_bytes: 1 })),
                _ = progress.tick() => if let Some((lease, _)) = &self.lease {
                    let shard = lease.shard;
                    self.send(Up::SampleProgress(pb::SampleProgress { shard, tokens: 1, finished: 0 }));
                },
            }
        }
    }

    /// Answers as an engine does that is done at once, but for sampling.
    fn told(&mut self, body: Option<Down>) -> Result<()> {
        match body {
            Some(Down::Sample(lease)) => {
                if self.lease.is_some() {
                    bail!("worker {} was given a second lease", self.rank);
                }
                self.fleet.tally.leased(lease.shard, self.idle.take().map(|idle| idle.elapsed()));
                let done = tokio::time::Instant::now() + self.fleet.takes(&lease);
                self.lease = Some((lease, done));
            }
            Some(Down::OpenGroup(open)) => {
                if open.store_address.is_empty() {
                    let address = "127.0.0.1:1".to_owned();
                    self.send(Up::StoreListening(pb::StoreListening { address }));
                }
                self.send(Up::Done(pb::Done {}));
            }
            Some(Down::LoadModel(_)) => {
                self.send(Up::ModelReady(pb::ModelReady { parameters: 1 }));
            }
            Some(Down::Welcome(welcome)) => {
                self.generation = welcome.generation;
                (self.lease, self.idle) = (None, None);
                self.send(Up::Ready(pb::Ready {}));
            }
            Some(Down::Heartbeat(_)) | None => {}
            Some(other) => bail!("worker {} cannot do this: {other:?}", self.rank),
        }
        Ok(())
    }

    fn send(&mut self, body: Up) {
        let _ = self.up.send(pb::WorkerMessage { generation: self.generation, body: Some(body) });
        self.heartbeat.reset();
    }
}

fn every(period: Duration) -> Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
