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

impl Pool {
    /// A buffer of `length` elements with arbitrary content.
    pub(super) fn take(
        &mut self,
        length: i64,
        kind: Kind,
        device: Device,
    ) -> Result<Tensor, TchError> {
        let fits = |free: &Tensor| free.numel() as i64 == length && free.kind() == kind;
        if let Some(at) = self.free.iter().rposition(fits) {
            return Ok(self.free.swap_remove(at));
        }
        let made = Tensor::f_empty([length], (kind, device))?;
        self.bytes += bytes(&made);
        Ok(made)
    }

    /// Gives a buffer back that [`Self::take`] gave.
    pub(super) fn give(&mut self, buffer: Tensor) {
        self.free.push(buffer);
    }

    /// Bytes of all buffers made, in use or not.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}
