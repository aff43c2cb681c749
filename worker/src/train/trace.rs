//! When things happened in a step: for people, as a trace, and for the report.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::error::TrainError;
use super::types::ReductionTimes;
use crate::collective::Work;

/// How often a rank that waits for its peers looks whether it should stop.
const STOP_INTERVAL: Duration = Duration::from_millis(5);

/// Who did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    /// The thread that computes.
    Engine,
    /// The group, while that thread may be computing.
    Group,
}

/// Something that took time.
#[derive(Debug, Clone)]
struct Event {
    name: String,
    lane: Lane,
    start: Instant,
    end: Instant,
}

#[derive(Debug, Default)]
struct Recording {
    on: bool,
    events: Vec<Event>,
}

/// A handle on the trainer's recording; clones record to the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct Tracer(Arc<Mutex<Recording>>);

impl Tracer {
    /// Begins or ends recording; what was recorded stays until it is taken.
    pub(super) fn record(&self, on: bool) {
        self.lock().on = on;
    }

    /// Takes what was recorded.
    pub(super) fn take(&self) -> Trace {
        Trace { events: std::mem::take(&mut self.lock().events) }
    }

    /// Records, if recording is on, what the calling thread does until the span
    /// is dropped. `name` is called only if so.
    #[must_use = "the span ends where it is dropped"]
    pub(super) fn span(&self, name: impl FnOnce() -> String) -> Span<'_> {
        let name = self.lock().on.then(name);
        Span { tracer: self, name, start: Instant::now() }
    }

    fn event(&self, lane: Lane, name: impl FnOnce() -> String, start: Instant, end: Instant) {
        let mut recording = self.lock();
        if recording.on {
            recording.events.push(Event { name: name(), lane, start, end });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Recording> {
        // An event is pushed whole or not at all.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something under way on the engine's thread.
#[derive(Debug)]
pub(super) struct Span<'a> {
    tracer: &'a Tracer,
    name: Option<String>,
    start: Instant,
}

impl Drop for Span<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            self.tracer.event(Lane::Engine, || name, self.start, Instant::now());
        }
    }
}

/// What a trainer did and when: blocks and updates of the engine's thread,
/// beside the operations over ranks.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    events: Vec<Event>,
}

impl Trace {
    /// Writes Chrome's trace-event JSON, which Perfetto and `chrome://tracing`
    /// show; `rank` becomes the process. Operations over ranks overlap one
    /// another, and so are asynchronous events with ids.
    ///
    /// # Errors
    /// What `out` says.
    pub fn write_chrome(&self, out: &mut dyn Write, rank: u32) -> io::Result<()> {
        let origin = self.events.iter().map(|event| event.start).min();
        let since = |at: Instant| {
            let passed = origin.map_or(Duration::ZERO, |origin| at.duration_since(origin));
            passed.as_secs_f64() * 1e6
        };
        let mut events = Vec::new();
        for (id, Event { name, lane, start, end }) in self.events.iter().enumerate() {
            let (start, end) = (since(*start), since(*end));
            match lane {
                Lane::Engine => events.push(json!({
                    "name": name, "cat": "engine", "ph": "X", "pid": rank, "tid": 0,
                    "ts": start, "dur": end - start,
                })),
                Lane::Group => events.extend([("b", start), ("e", end)].map(|(phase, at)| {
                    json!({
                        "name": name, "cat": "group", "ph": phase, "pid": rank, "tid": 1,
                        "id": id, "ts": at,
                    })
                })),
            }
        }
        serde_json::to_writer(&mut *out, &json!({ "traceEvents": events }))?;
        out.write_all(b"\n")
    }
}

/// Waits for operations over ranks, and keeps account of what they took.
#[derive(Debug, Default)]
pub(super) struct Exchanges {
    pub(super) tracer: Tracer,
    intervals: Vec<(Instant, Instant)>,
    exposed: Duration,
}

impl Exchanges {
    /// An account whose operations are recorded by `tracer` too.
    pub(super) fn new(tracer: &Tracer) -> Self {
        Self { tracer: tracer.clone(), ..Self::default() }
    }

    /// Waits until `work`, called `name` in traces, has ended.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] soon after `stop` says so; what the group says.
    pub(super) fn wait(
        &mut self,
        name: impl Fn() -> String,
        work: Work,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainError> {
        let waiting = Instant::now();
        while !work.ended_within(STOP_INTERVAL) {
            if stop() {
                return Err(TrainError::Stopped);
            }
        }
        if let Some((start, end)) = work.interval() {
            self.tracer.event(Lane::Group, &name, start, end);
            self.intervals.push((start, end));
            let waited = end.saturating_duration_since(waiting.max(start));
            if !waited.is_zero() {
                self.tracer.event(Lane::Engine, || format!("wait for {}", name()), waiting, end);
                self.exposed += waited;
            }
        }
        Ok(work.wait()?)
    }

    /// The account since it was last taken.
    pub(super) fn take(&mut self) -> ReductionTimes {
        let busy = union(std::mem::take(&mut self.intervals)).as_secs_f64();
        let exposed = std::mem::take(&mut self.exposed).as_secs_f64();
        ReductionTimes { busy, exposed: exposed.min(busy) }
    }
}

/// Time covered by at least one of `intervals`.
fn union(mut intervals: Vec<(Instant, Instant)>) -> Duration {
    intervals.sort_unstable();
    let mut covered = Duration::ZERO;
    let mut until: Option<Instant> = None;
    for (start, end) in intervals {
        let start = until.map_or(start, |until| start.max(until));
        covered += end.saturating_duration_since(start);
        until = until.max(Some(end));
    }
    covered
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_count_once_and_gaps_not_at_all() {
        let origin = Instant::now();
        let at = |second: u64| origin + Duration::from_secs(second);
        let intervals = vec![(at(7), at(9)), (at(0), at(4)), (at(1), at(2)), (at(3), at(5))];
        assert_eq!(union(intervals), Duration::from_secs(7));
        assert_eq!(union(Vec::new()), Duration::ZERO);
    }

    #[test]
    fn a_trace_is_what_viewers_read() {
        let tracer = Tracer::default();
        drop(tracer.span(|| unreachable!("nobody records")));
        tracer.record(true);
        let start = Instant::now();
        drop(tracer.span(|| "update".to_owned()));
        tracer.event(Lane::Group, || "reduce 3".to_owned(), start, Instant::now());
        let mut written = Vec::new();
        tracer.take().write_chrome(&mut written, 5).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&written).unwrap();
        let phases: Vec<_> = read["traceEvents"].as_array().unwrap().iter().collect();
        assert_eq!(phases.len(), 3);
        assert_eq!((&phases[0]["ph"], &phases[0]["name"]), (&json!("X"), &json!("update")));
        assert_eq!((&phases[1]["ph"], &phases[2]["ph"]), (&json!("b"), &json!("e")));
        assert!(phases.iter().all(|event| event["pid"] == 5 && event["ts"].is_f64()));
        assert!(tracer.take().events.is_empty());
    }
}
