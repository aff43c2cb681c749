//! Commands handed out, and answers awaited.

use std::collections::VecDeque;

use super::Effect;
use crate::run::command::{Command, Rank};

/// A set of commands that must all be answered before the run goes on.
///
/// Commands are either bound to a rank or shared: a shared one goes to whichever
/// worker is free. A worker holds at most `depth` unanswered commands.
#[derive(Debug, Clone)]
pub(super) struct Stage {
    bound: Vec<VecDeque<Command>>,
    shared: VecDeque<Command>,
    unanswered: Vec<usize>,
    depth: usize,
}

/// Enough that a worker finds its next command when it ends one, and little
/// enough that a stop has few to take back.
const BOUND_DEPTH: usize = 2;

impl Stage {
    /// Each rank's own list.
    pub(super) fn bound(commands: Vec<Vec<Command>>) -> Self {
        Self {
            unanswered: vec![0; commands.len()],
            bound: commands.into_iter().map(VecDeque::from).collect(),
            shared: VecDeque::new(),
            depth: BOUND_DEPTH,
        }
    }

    /// One command to rank 0 alone.
    pub(super) fn first(world_size: usize, command: Command) -> Self {
        let mut commands = vec![Vec::new(); world_size];
        commands[0].push(command);
        Self::bound(commands)
    }

    /// Commands for whichever worker is free, in this order, one each at a time.
    pub(super) fn shared(world_size: usize, commands: Vec<Command>) -> Self {
        Self {
            bound: vec![VecDeque::new(); world_size],
            shared: commands.into(),
            unanswered: vec![0; world_size],
            depth: 1,
        }
    }

    /// Hands out what the workers have room for.
    pub(super) fn dispatch(&mut self, effects: &mut Vec<Effect>) {
        for rank in 0..self.bound.len() {
            while self.unanswered[rank] < self.depth {
                let Some(command) =
                    self.bound[rank].pop_front().or_else(|| self.shared.pop_front())
                else {
                    break;
                };
                self.unanswered[rank] += 1;
                effects.push(Effect::Send(Rank(rank as u32), command));
            }
        }
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
        match self.unanswered.get_mut(rank.index()) {
            Some(open) if *open > 0 => {
                *open -= 1;
                true
            }
            _ => false,
        }
    }

    /// Whether everything was handed out and answered.
    pub(super) fn is_done(&self) -> bool {
        self.shared.is_empty()
            && self.bound.iter().all(VecDeque::is_empty)
            && self.unanswered.iter().all(|&open| open == 0)
    }
}
