//! What it takes to train: pairs that are made up, and micro-batches of them.

use std::path::Path;

use drift_worker::model::Decoder;
use drift_worker::train::{MicroBatch, TokenPair, Trainer};
use tch::{Device, Kind};

/// A trainer of the model in `dir`, computing in `kind`.
pub(crate) fn load(dir: &Path, kind: Kind) -> Trainer {
    Trainer::new(Decoder::load(dir, kind, Device::Cpu).unwrap())
}

/// Pairs of many lengths.
pub(crate) fn random_pairs(count: usize, vocabulary: u32) -> Vec<TokenPair> {
    let mut draw = noise(1);
    (0..count as u64)
        .map(|id| {
            let lengths = [(1, 40), (1, 20), (1, 20)]
                .map(|(shortest, spread)| (shortest + draw(spread)) as usize);
            pair(id, lengths, vocabulary)
        })
        .collect()
}

/// A pair with a prompt, a chosen and a rejected reply of the given lengths: of a
/// vocabulary's ids beyond the special ones, and with a padding id (2) here and
/// there, as chat templates have it. The same for an id, each time.
pub(crate) fn pair(id: u64, lengths: [usize; 3], vocabulary: u32) -> TokenPair {
    let mut draw = noise(id + 2);
    let [prompt, chosen, rejected] = lengths.map(|length| {
        (0..length).map(|_| if draw(12) == 0 { 2 } else { 3 + draw(vocabulary - 3) }).collect()
    });
    TokenPair { pair: id, prompt, chosen, rejected, reference: None }
}

/// `pairs` in order, at most `count` to a micro-batch.
pub(crate) fn micro_batches(pairs: &[TokenPair], count: usize) -> Vec<MicroBatch> {
    pairs.chunks(count).map(|pairs| MicroBatch { pairs: pairs.to_vec() }).collect()
}

/// Numbers below a bound, the same ones for a seed.
fn noise(seed: u64) -> impl FnMut(u32) -> u32 {
    let mut state = seed;
    move |bound| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as u32) % bound
    }
}
