//! A world for the machine: workers whose weights are a number that every step
//! changes, a disk, and a dice that decides what happens next.

use std::collections::VecDeque;

use super::*;
use crate::domain::ShardId;

/// Numbers from a seed, the same for ever.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n.max(1)
    }
}

/// What is on disk: all that outlives everybody.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Disk {
    commits: Vec<(u32, CommittedPhase, Option<u32>)>,
    /// Who drew a shard's samples: the weights.
    pub(super) shards: BTreeMap<(Iteration, ShardId), u64>,
    /// What was rated, by batch and place in it.
    pub(super) ratings: BTreeMap<(Iteration, u64, usize), u64>,
    references: BTreeMap<(Iteration, PairId), u64>,
    steps: BTreeMap<(Iteration, Step), (Epoch, u64)>,
    /// Weights of checkpoints, and of snapshots with the steps done.
    checkpoints: BTreeMap<Iteration, u64>,
    models: BTreeMap<(Iteration, Epoch), u64>,
    states: BTreeMap<SnapshotId, (u64, u64)>,
}

#[derive(Debug, Default)]
struct Worker {
    weights: Option<u64>,
    /// Steps done since training began.
    trained: Option<u64>,
    group: u64,
    commands: VecDeque<Command>,
    /// A background snapshot that is not on disk yet.
    writing: Option<Step>,
}

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Happening {
    Answer(usize),
    StepTogether,
    PeerIsGone(usize),
    Written(usize),
    Start(usize),
    Ready(usize),
    ThreadDone,
    Loss(usize),
    Crash,
}

pub(super) struct World {
    pub(super) shape: RunShape,
    pub(super) disk: Disk,
    workers: Vec<Option<Worker>>,
    starting: BTreeSet<usize>,
    called: BTreeSet<usize>,
    thread: Option<Event>,
    now: Now,
    pub(super) losses: usize,
    pub(super) crashes: usize,
    /// The run is asked to leave once in so many happenings, and gone on with; 0: never.
    pub(super) leave_rarity: usize,
    pub(super) leaves: usize,
    /// Steps that were computed, and shards, over all lives.
    pub(super) computed: (usize, usize),
    pub(super) outcome: Option<Outcome>,
}

/// Weights after a step: they depend on all before it.
fn stepped(weights: u64, k: Iteration, step: Step) -> u64 {
    (weights ^ ((u64::from(k.0) << 32) | (step.0 + 1))).wrapping_mul(0x0100_0000_01B3)
}

const BASE: u64 = 0xcbf2_9ce4;

impl World {
    pub(super) fn new(shape: RunShape) -> Self {
        Self {
            workers: (0..shape.world_size).map(|_| None).collect(),
            starting: (0..shape.world_size).collect(),
            shape,
            disk: Disk::default(),
            called: BTreeSet::new(),
            thread: None,
            now: Duration::ZERO,
            losses: 0,
            crashes: 0,
            leave_rarity: 0,
            leaves: 0,
            computed: (0, 0),
            outcome: None,
        }
    }

    /// Runs to the end. Each happening is a fault once in `rarity`; 0 means never.
    pub(super) fn run(&mut self, dice: &mut Dice, rarity: usize) {
        let mut machine = Machine::new(self.now, self.shape.clone(), self.resume());
        for _ in 0..200_000 {
            if self.outcome.is_some() {
                return;
            }
            self.now += Duration::from_millis(40);
            let is_fault = rarity > 0 && dice.below(rarity) == 0;
            let happening = self.choose(dice, is_fault);
            if happening == Some(Happening::Crash) {
                self.crash();
                machine = Machine::new(self.now, self.shape.clone(), self.resume());
                continue;
            }
            let events = match happening {
                Some(happening) => self.happen(happening, dice),
                None => Vec::new(),
            };
            for event in events.into_iter().chain([Event::Tick]) {
                self.feed(&mut machine, event);
            }
            if self.leave_rarity > 0 && dice.below(self.leave_rarity) == 0 {
                self.feed(&mut machine, Event::LeaveRequested);
            }
            if self.outcome == Some(Outcome::Stopped) {
                self.outcome = None;
                self.leaves += 1;
                self.restart();
                machine = Machine::new(self.now, self.shape.clone(), self.resume());
            }
        }
        panic!("the run does not end: {machine:?}");
    }

    fn feed(&mut self, machine: &mut Machine, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in machine.step(self.now, event) {
                events.extend(self.carry_out(effect));
            }
            // Heartbeats come in time.
            for rank in 0..self.workers.len() {
                machine.step(self.now, Event::Heard(Rank(rank as u32)));
            }
        }
    }

    fn choose(&self, dice: &mut Dice, is_fault: bool) -> Option<Happening> {
        let alive = |n: &usize| self.workers[*n].is_some();
        let all = 0..self.workers.len();
        let mut may: Vec<Happening> = Vec::new();
        if is_fault {
            may.extend(all.clone().filter(alive).map(Happening::Loss));
            may.push(Happening::Crash);
            return Some(may[dice.below(may.len())]);
        }
        let front = |n: usize| self.workers[n].as_ref().and_then(|w| w.commands.front());
        let steps: Vec<_> = all
            .clone()
            .map(|n| match front(n) {
                Some(Command::TrainStep { step, .. }) => Some(*step),
                _ => None,
            })
            .collect();
        if steps.iter().all(|step| step.is_some() && *step == steps[0]) {
            may.push(Happening::StepTogether);
        }
        for n in all {
            if self.called.contains(&n) {
                may.push(Happening::Ready(n));
            } else if self.starting.contains(&n) {
                may.push(Happening::Start(n));
            } else if steps[n].is_some() {
                if self.workers.iter().any(Option::is_none) || !self.called.is_empty() {
                    may.push(Happening::PeerIsGone(n));
                }
            } else if front(n).is_some() {
                may.push(Happening::Answer(n));
            }
            if self.workers[n].as_ref().is_some_and(|w| w.writing.is_some()) {
                may.push(Happening::Written(n));
            }
        }
        if self.thread.is_some() {
            may.push(Happening::ThreadDone);
        }
        (!may.is_empty()).then(|| may[dice.below(may.len())])
    }

    fn crash(&mut self) {
        self.crashes += 1;
        self.restart();
    }

    fn restart(&mut self) {
        self.workers.iter_mut().for_each(|worker| *worker = None);
        self.starting = (0..self.workers.len()).collect();
        self.called.clear();
        self.thread = None;
    }

    fn happen(&mut self, happening: Happening, dice: &mut Dice) -> Vec<Event> {
        let told = |n: usize, report| vec![Event::Told(Rank(n as u32), report)];
        match happening {
            Happening::Loss(n) => {
                self.losses += 1;
                self.workers[n] = None;
                self.called.remove(&n);
                vec![Event::Lost(Rank(n as u32), "killed".into())]
            }
            Happening::Start(n) | Happening::Ready(n) => {
                self.starting.remove(&n);
                self.called.remove(&n);
                self.workers[n] = Some(Worker::default());
                vec![Event::Attached(Rank(n as u32))]
            }
            Happening::ThreadDone => self.thread.take().into_iter().collect(),
            Happening::Written(n) => {
                let step = self.workers[n].as_mut().and_then(|w| w.writing.take());
                let (files, seconds) = (vec![file(&format!("part-{n}"))], SaveSeconds::default());
                told(n, Report::SnapshotWritten { step: step.expect("one"), files, seconds })
            }
            Happening::PeerIsGone(n) => {
                let worker = self.workers[n].as_mut().expect("alive");
                worker.commands.pop_front();
                told(n, Report::Failed("a peer closed its connection".into()))
            }
            Happening::Answer(n) => {
                let mut worker = self.workers[n].take().expect("alive");
                let command = worker.commands.pop_front().expect("a command");
                let mut events = Vec::new();
                if let Command::OpenGroup { store: None, .. } = command {
                    events.extend(told(n, Report::StoreListening("a:1".into())));
                }
                events.extend(told(n, self.answer(n, &mut worker, &command)));
                self.workers[n] = Some(worker);
                events
            }
            Happening::StepTogether => {
                self.computed.0 += 1;
                let weights: BTreeSet<_> = self.alive().map(|w| (w.weights, w.group)).collect();
                assert_eq!(weights.len(), 1, "ranks that step together are alike: {weights:?}");
                let mut events = Vec::new();
                for (n, worker) in self.workers.iter_mut().enumerate() {
                    let worker = worker.as_mut().expect("alive");
                    let command = worker.commands.pop_front().expect("a step");
                    let Command::TrainStep { step, .. } = command else { unreachable!() };
                    assert_eq!(worker.trained, Some(step.0), "no step is left out or doubled");
                    worker.trained = Some(step.0 + 1);
                    let weights = worker.weights.as_mut().expect("weights");
                    *weights = stepped(*weights, self.disk.working_on(), step);
                    events.push(Event::Told(Rank(n as u32), answer(&command)));
                }
                let first = dice.below(events.len());
                events.rotate_left(first);
                events
            }
            Happening::Crash => unreachable!("the caller's"),
        }
    }

    fn alive(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter().flatten()
    }

    fn answer(&mut self, n: usize, worker: &mut Worker, command: &Command) -> Report {
        let weights = || worker.weights.expect("weights are loaded before they are used");
        match command {
            Command::OpenGroup { number, .. } => worker.group = *number,
            Command::LoadModel(source) => {
                worker.trained = None;
                worker.weights = Some(match source {
                    ModelSource::Base => BASE,
                    ModelSource::Checkpoint(k) => self.disk.checkpoints[k],
                    ModelSource::Snapshot(k, epoch) => self.disk.models[&(*k, *epoch)],
                });
            }
            Command::BeginTraining => worker.trained = Some(0),
            Command::LoadState(id) => {
                assert!(worker.trained.is_some(), "training begins before its state is loaded");
                let (weights, steps) = self.disk.states[id];
                (worker.weights, worker.trained) = (Some(weights), Some(steps));
            }
            Command::SaveState(id) => {
                let state = (weights(), worker.trained.expect("training"));
                // Not kept before all have written theirs.
                self.disk.states.insert(*id, state);
                if let SnapshotId::After(_, step) = id {
                    assert_eq!(state.1, step.0 + 1, "taken behind the step it names");
                    worker.writing = Some(*step);
                    return Report::Done;
                }
                return Report::StateSaved(vec![file(&format!("part-{n}"))]);
            }
            Command::SaveModel(k, epoch) => {
                self.disk.models.insert((*k, *epoch), weights());
            }
            Command::Sample { .. } => {
                self.computed.1 += 1;
                let Report::ShardDone { shard, mut samples } = answer(command) else {
                    unreachable!()
                };
                samples[0].tokens = vec![weights() as u32];
                return Report::ShardDone { shard, samples };
            }
            Command::Rate { batch } => {
                // Another model rates: it is there for whoever has the policy's weights.
                assert_eq!(weights(), self.disk.start_of_iteration());
                let Report::Rated { mut ratings, .. } = answer(command) else { unreachable!() };
                ratings.iter_mut().for_each(|rating| *rating += *batch as f64);
                return Report::Rated { batch: *batch, ratings };
            }
            Command::Score { .. } => {
                let Report::Scored { batch, mut logps } = answer(command) else { unreachable!() };
                for (_, logps) in &mut logps {
                    logps.chosen = -((weights() % 1_000_003) as f64);
                }
                return Report::Scored { batch, logps };
            }
            Command::TrainStep { .. } => unreachable!("taken together"),
        }
        answer(command)
    }

    fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Send(rank, command) => {
                let worker = self.workers[rank.index()].as_mut();
                worker.expect("nobody sends to who is gone").commands.push_back(command);
            }
            Effect::Commit { iteration, phase, epoch, .. } => {
                self.disk.commits.push((iteration.0, phase, epoch.map(|epoch| epoch.0)));
            }
            Effect::RecordShard(k, shard, samples) => {
                let by = samples.first().map_or(0, |sample| u64::from(sample.tokens[0]));
                self.disk.shards.entry((k, shard)).or_insert(by);
            }
            Effect::SetAside(k, shard, _) => {
                self.disk.shards.insert((k, shard), 0);
            }
            Effect::RecordRatings(k, batch, ratings) => {
                for (place, rating) in ratings.into_iter().enumerate() {
                    let before = self.disk.ratings.insert((k, batch, place), rating.to_bits());
                    assert_eq!(before, None, "a batch is rated once");
                }
            }
            Effect::RecordReferences(k, logps) => {
                for (id, logps) in logps {
                    self.disk.references.insert((k, id), logps.chosen.to_bits());
                }
            }
            Effect::RecordStep { iteration, epoch, step, metrics, .. } => {
                self.disk.steps.insert((iteration, step), (epoch, metrics.num_tokens));
            }
            Effect::KeepSnapshot(SnapshotId::After(..), files) => {
                assert_eq!(files.len(), self.shape.world_size, "all parts, each once");
            }
            Effect::Lost(rank, _) => {
                self.workers[rank.index()] = None;
                self.called.remove(&rank.index());
            }
            Effect::Start(rank) => {
                assert!(self.workers[rank.index()].is_none(), "one process a rank");
                self.starting.insert(rank.index());
            }
            Effect::Call(ranks) => {
                for rank in ranks {
                    self.workers[rank.index()] = Some(Worker::default());
                    self.called.insert(rank.index());
                }
            }
            Effect::Rewind => return Some(Event::Rewound(Box::new(self.resume()))),
            Effect::PlanRating(_) => {
                self.thread = Some(Event::RatingPlanned(RATING_BATCHES.to_vec()));
            }
            Effect::BuildPairs(_) => {
                if self.shape.is_rated {
                    let k = self.disk.working_on();
                    let rated = self.disk.ratings.keys().filter(|(of, ..)| *of == k).count();
                    let all = if k.0 == 0 { 0 } else { RATING_BATCHES.iter().sum() };
                    assert_eq!(rated, all, "all are rated before they make pairs");
                }
                self.thread = Some(Event::PairsBuilt(pairs()));
            }
            Effect::Publish(k, epoch) => {
                self.disk.checkpoints.insert(k, self.disk.models[&(k, epoch)]);
                self.thread = Some(Event::CheckpointPublished);
            }
            Effect::End(outcome) => self.outcome = Some(outcome),
            _ => {}
        }
        None
    }

    /// As the driver reads it from a run's directory.
    fn resume(&mut self) -> Resume {
        let commits = &self.disk.commits;
        let last = commits.last().map(|&(k, phase, epoch)| Commit {
            iteration: Iteration(k),
            phase,
            epoch: epoch.map(Epoch),
            at: 0.0,
            detail: json!({ "workers": self.shape.world_size, TO_BE_RATED: self.shape.is_rated }),
        });
        let position = self.shape.extent.position(last.as_ref(), self.shape.world_size as u32);
        let mut resume = Resume { position, ..Resume::default() };
        let k = last.as_ref().map_or(Iteration(0), |commit| commit.iteration);
        match position {
            Position::Sampling(k) => {
                resume.shards_done =
                    self.disk.shards.keys().filter(|s| s.0 == k).map(|s| s.1).collect();
            }
            Position::Rating(k) => self.disk.ratings.retain(|(of, ..), _| *of != k),
            Position::Start | Position::Pairing(_) | Position::Finished => {}
            _ => resume.pairs = pairs(),
        }
        if matches!(position, Position::Scoring(_)) {
            self.disk.references.retain(|(of, _), _| *of != k);
        }
        for ((of, pair), &chosen) in &self.disk.references {
            if *of == k {
                let logps = ReferenceLogps { chosen: f64::from_bits(chosen), ..START };
                resume.references.insert(*pair, logps);
            }
        }
        let next = match position {
            Position::Training(_, epoch) => {
                let of_epoch = |step: &Step| {
                    self.disk.steps.get(&(k, *step)).is_some_and(|(e, _)| *e == epoch)
                };
                resume.after = self.disk.kept(k).into_iter().rev().find(of_epoch);
                epoch
            }
            Position::Evaluating(_, epoch) => Epoch(epoch.0 + 1),
            _ => Epoch(u32::MAX),
        };
        let after = resume.after;
        self.disk.steps.retain(|&(of, step), &mut (epoch, _)| {
            of != k || epoch < next || after.is_some_and(|after| step <= after)
        });
        let of_k = self.disk.steps.range((k, Step(0))..=(k, Step(u64::MAX)));
        resume.tokens = of_k.last().map_or(0, |(_, &(_, tokens))| tokens);
        resume
    }
}

impl Disk {
    /// Weights of the policy that the iteration in hand began with.
    fn start_of_iteration(&self) -> u64 {
        self.checkpoints[&Iteration(self.working_on().0 - 1)]
    }

    fn working_on(&self) -> Iteration {
        let last = self.commits.last().expect("committed");
        Iteration(last.0)
    }

    /// Steps with a snapshot that every rank's part is of: here, all of them.
    fn kept(&self, k: Iteration) -> Vec<Step> {
        self.states
            .keys()
            .filter_map(|id| match id {
                SnapshotId::After(of, step) if *of == k => Some(*step),
                _ => None,
            })
            .collect()
    }

    /// What a run leaves: not when it saved on the way.
    pub(super) fn result(mut self) -> Self {
        self.states.clear();
        self
    }
}
