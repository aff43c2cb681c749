//! What training holds in memory, and buffers that are used again.

use tch::{Device, Kind, TchError, Tensor};

/// Bytes that one rank holds between steps. Activations and the allocator's own
/// needs come on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryReport {
    /// The policy's weights, all of them on every rank.
    pub weights: u64,
    /// fp32 gradients that last until the update: this rank's share.
    pub gradients: u64,
    /// fp32 masters of this rank's share; none where the weights are fp32 themselves.
    pub masters: u64,
    /// The optimiser's moments of this rank's share.
    pub optimizer_state: u64,
    /// Whole buckets on their way between ranks: grows during the first step,
    /// and is used again by those that follow.
    pub buffers: u64,
}

/// Bytes of a tensor's elements.
pub(super) fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

/// Flat buffers that outlive their use, so that steps neither grow nor fault
/// pages in anew.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Vec<Tensor>,
    bytes: u64,
}

/// A flat buffer; on loan, where it came from a [`Pool`].
#[derive(Debug)]
pub(super) struct Buffer {
    /// As many elements as were asked for.
    pub(super) values: Tensor,
    /// All there are.
    all: Tensor,
}

impl Buffer {
    /// All of `tensor`.
    pub(super) fn of(tensor: Tensor) -> Self {
        Self { values: tensor.shallow_clone(), all: tensor }
    }

    /// The same memory, for as long as the loan lasts.
    pub(super) fn share(&self) -> Self {
        Self { values: self.values.shallow_clone(), all: self.all.shallow_clone() }
    }
}

impl Pool {
    /// A buffer of `length` elements with arbitrary content: the smallest free one that
    /// is at most an eighth too long, so that head and embedding, which differ by a
    /// norm's weight, share one.
    pub(super) fn take(
        &mut self,
        length: i64,
        kind: Kind,
        device: Device,
    ) -> Result<Buffer, TchError> {
        let fitting = length..=length + length / 8;
        let fits = |free: &Tensor| fitting.contains(&(free.numel() as i64)) && free.kind() == kind;
        let free = self.free.iter().enumerate().filter(|(_, free)| fits(free));
        let all = match free.min_by_key(|(_, free)| free.numel()).map(|(at, _)| at) {
            Some(at) => self.free.swap_remove(at),
            None => {
                let made = Tensor::f_empty([length], (kind, device))?;
                self.bytes += bytes(&made);
                made
            }
        };
        Ok(Buffer { values: all.f_narrow(0, 0, length)?, all })
    }

    /// Gives a buffer back that [`Self::take`] gave.
    pub(super) fn give(&mut self, buffer: Buffer) {
        self.free.push(buffer.all);
    }

    /// Bytes of all buffers made, in use or not.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn buffers_serve_again_where_they_are_hardly_too_long() {
        let mut pool = Pool::default();
        let mut take = |length, kind| {
            let buffer = pool.take(length, kind, Device::Cpu).unwrap();
            assert_eq!(buffer.values.size(), [length]);
            pool.give(buffer);
            pool.bytes()
        };
        assert_eq!(take(900, Kind::Float), 3600);
        assert_eq!(take(800, Kind::Float), 3600, "an eighth too long");
        assert_eq!(take(799, Kind::Float), 3600 + 3196, "more than that");
        assert_eq!(take(800, Kind::BFloat16), 3600 + 3196 + 1600, "another kind");
        assert_eq!(take(901, Kind::Float), 3600 + 3196 + 1600 + 3604, "too short");
    }
}
