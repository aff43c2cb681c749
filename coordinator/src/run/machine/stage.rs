//! Commands handed out, and answers awaited.

use std::collections::{BTreeSet, VecDeque};

use super::Effect;
use super::members::Members;
use crate::domain::{ShardId, Step};
use crate::run::command::{Command, Rank};

/// A set of commands that must all be answered before the run goes on.
///
/// Commands are either bound to a rank or shared: a shared one goes to whichever
/// worker is free. A worker holds at most `depth` unanswered commands; what a worker
/// held when it was lost comes back, to its successor or to whoever is free.
#[derive(Debug, Clone)]
pub(super) struct Stage {
    bound: Vec<VecDeque<Command>>,
    shared: VecDeque<Command>,
    /// Oldest first.
    asked: Vec<VecDeque<Asked>>,
    depth: usize,
    /// Ranks that hold fewer, so that an answer costs as much among thousands of
    /// workers as among a few.
    room: BTreeSet<Rank>,
    /// Commands were taken back for good: when the rest is answered, the phase is not
    /// over.
    is_cut: bool,
}

/// A command that was handed out, and whose it is.
#[derive(Debug, Clone)]
struct Asked {
    command: Command,
    owner: Owner,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// One rank and its successors.
    Rank,
    /// Whoever is free.
    Anybody,
    /// One process: it brings a successor up to date, and is made anew for the next.
    Process,
}

/// Enough that a worker finds its next command when it ends one, and little
/// enough that a stop has few to take back.
const BOUND_DEPTH: usize = 2;

impl Stage {
    /// Each rank's own list.
    pub(super) fn bound(commands: Vec<Vec<Command>>) -> Self {
        let bound = commands.into_iter().map(VecDeque::from).collect();
        Self::new(bound, VecDeque::new(), BOUND_DEPTH)
    }

    /// One command to rank 0 alone.
    pub(super) fn first(world_size: usize, command: Command) -> Self {
        let mut commands = vec![Vec::new(); world_size];
        commands[0].push(command);
        Self::bound(commands)
    }

    /// Commands for whichever worker is free, in this order, one each at a time.
    pub(super) fn shared(world_size: usize, commands: Vec<Command>) -> Self {
        Self::new(vec![VecDeque::new(); world_size], commands.into(), 1)
    }

    fn new(bound: Vec<VecDeque<Command>>, shared: VecDeque<Command>, depth: usize) -> Self {
        let room = (0..bound.len() as u32).map(Rank).collect();
        let asked = vec![VecDeque::new(); bound.len()];
        Self { bound, shared, asked, depth, room, is_cut: false }
    }

    /// Hands out what the workers that are here have room for. One that is fresh, and
    /// has something to do, begins with the command of `welcome`.
    pub(super) fn dispatch(
        &mut self,
        members: &mut Members,
        welcome: &dyn Fn(&Self, Rank) -> Command,
        effects: &mut Vec<Effect>,
    ) {
        let room: Vec<_> =
            self.room.iter().copied().filter(|&rank| members.is_here(rank)).collect();
        for rank in room {
            let has_work = !self.bound[rank.index()].is_empty() || !self.shared.is_empty();
            if has_work && members.take_fresh(rank) {
                let command = welcome(self, rank);
                self.hand_out(rank, command, Owner::Process, effects);
            }
            while self.asked[rank.index()].len() < self.depth {
                let own = self.bound[rank.index()].pop_front();
                let Some((command, owner)) = own
                    .map(|command| (command, Owner::Rank))
                    .or_else(|| self.shared.pop_front().map(|command| (command, Owner::Anybody)))
                else {
                    break;
                };
                self.hand_out(rank, command, owner, effects);
            }
        }
    }

    fn hand_out(&mut self, rank: Rank, command: Command, owner: Owner, effects: &mut Vec<Effect>) {
        let asked = &mut self.asked[rank.index()];
        asked.push_back(Asked { command: command.clone(), owner });
        if asked.len() >= self.depth {
            self.room.remove(&rank);
        }
        effects.push(Effect::Send(rank, command));
    }

    /// Adds a command for every rank but one.
    pub(super) fn add_for_others(&mut self, command: &Command, except: Rank) {
        for (rank, queue) in self.bound.iter_mut().enumerate() {
            if rank != except.index() {
                queue.push_back(command.clone());
            }
        }
    }

    /// Takes a rank's final answer; false if nothing was asked of it.
    pub(super) fn answered(&mut self, rank: Rank) -> bool {
        let Some(asked) = self.asked.get_mut(rank.index()) else { return false };
        let was_asked = asked.pop_front().is_some();
        if asked.len() < self.depth {
            self.room.insert(rank);
        }
        was_asked
    }

    /// A rank's worker is lost: what it was asked is to be done again, before
    /// anything else. Returns the shards that it held.
    pub(super) fn lost(&mut self, rank: Rank) -> Vec<ShardId> {
        let mut held = Vec::new();
        self.room.insert(rank);
        for Asked { command, owner } in
            std::mem::take(&mut self.asked[rank.index()]).into_iter().rev()
        {
            if let Command::Sample { shard, .. } = command {
                held.push(shard);
            }
            match owner {
                Owner::Rank => self.bound[rank.index()].push_front(command),
                Owner::Anybody => self.shared.push_front(command),
                Owner::Process => {}
            }
        }
        held
    }

    /// Takes a shard back for good; false if it is not waiting to be handed out.
    pub(super) fn withdraw(&mut self, withdrawn: ShardId) -> bool {
        let before = self.shared.len();
        self.shared.retain(
            |command| !matches!(command, Command::Sample { shard, .. } if *shard == withdrawn),
        );
        self.shared.len() < before
    }

    /// Adds a command for every rank, behind the last step that any of them was
    /// handed; returns that step. Nothing where no step is left behind it.
    pub(super) fn insert_behind_steps(
        &mut self,
        command: &dyn Fn(Step) -> Command,
    ) -> Option<Step> {
        let step_of = |command: &Command| match command {
            Command::TrainStep { step, .. } => Some(*step),
            _ => None,
        };
        let last = self.asked.iter().flatten().filter_map(|a| step_of(&a.command)).max()?;
        let is_behind = |command: &Command| step_of(command).is_some_and(|step| step > last);
        let places: Option<Vec<_>> =
            self.bound.iter().map(|queue| queue.iter().position(is_behind)).collect();
        for (queue, place) in self.bound.iter_mut().zip(places?) {
            queue.insert(place, command(last));
        }
        Some(last)
    }

    /// As [`Self::insert_behind_steps`], and takes back all that comes after it.
    pub(super) fn end_behind_steps(&mut self, command: &dyn Fn(Step) -> Command) -> Option<Step> {
        let last = self.insert_behind_steps(command)?;
        let end = command(last);
        for queue in &mut self.bound {
            let place = queue.iter().position(|waiting| *waiting == end);
            queue.truncate(place.map_or(queue.len(), |place| place + 1));
        }
        self.is_cut = true;
        Some(last)
    }

    /// Takes back the shared commands that nobody was handed yet.
    pub(super) fn withhold_shared(&mut self) {
        self.is_cut |= !self.shared.is_empty();
        self.shared.clear();
    }

    /// Whether commands were taken back for good.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Whether a rank has something left to do, or to answer.
    pub(super) fn needs(&self, rank: Rank) -> bool {
        !self.bound[rank.index()].is_empty() || !self.asked[rank.index()].is_empty()
    }

    /// Whether a command of this kind waits for a rank.
    pub(super) fn waits(&self, rank: Rank, is_it: impl Fn(&Command) -> bool) -> bool {
        self.bound[rank.index()].iter().any(is_it)
    }

    /// How many commands wait to be handed out, and how many answers are awaited.
    pub(super) fn counts(&self) -> (usize, usize) {
        let all = |queues: &[VecDeque<Command>]| queues.iter().map(VecDeque::len).sum::<usize>();
        let asked = self.asked.iter().map(VecDeque::len).sum();
        (self.shared.len() + all(&self.bound), asked)
    }

    /// Whether everything was handed out and answered.
    pub(super) fn is_done(&self) -> bool {
        self.shared.is_empty()
            && self.bound.iter().all(VecDeque::is_empty)
            && self.asked.iter().all(VecDeque::is_empty)
    }
}
