//! Bytes that one worker takes in each phase.

use super::shape::Shape;
use crate::config::Sharding;

/// Logits in existence at once (`worker/src/train/head.rs`).
const LOGITS: u64 = 64 << 20;
/// Buffers as long as a block (`gradients.rs`): one that backward fills, one whose sum is
/// on its way, and one for what the others send of it.
const EXCHANGED: u64 = 3;
/// Pieces of weights that are gathered at once (`weights.rs`).
const GATHERED: u64 = 3;
/// Elements of a piece, at most (`LARGEST_PIECE` in `worker/src/train/types.rs`).
const LARGEST_PIECE: u64 = 1 << 26;
/// Tokens of prompts that one step of sampling reads (`sample/`).
const PROMPT_CHUNK: u64 = 512;

/// Where a worker computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On a GPU.
    Gpu,
    /// On a CPU; with instructions for bf16, or without.
    Cpu {
        /// Whether it multiplies bf16.
        bf16: bool,
    },
}

/// What is kept of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All.
    All,
    /// As many blocks' as these bytes hold, and every block's input.
    Budget(u64),
    /// Every block's input.
    Inputs,
}

/// What one worker does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Workers.
    pub ranks: u64,
    /// Where they compute.
    pub place: Place,
    /// Bytes of a weight: 2 or 4.
    pub weight: u64,
    /// Running means of the optimiser: RMSprop 1, AdamW 2.
    pub moments: u64,
    /// What is divided among the workers.
    pub sharding: Sharding,
    /// What forward keeps.
    pub keep: Keep,
    /// Packed tokens of a training pass.
    pub tokens: u64,
    /// Response tokens among them.
    pub responses: u64,
    /// Bytes of the sampler's cache.
    pub cache: u64,
    /// Replies in the making.
    pub rows: u64,
    /// Tokens of one of them with its prompt, at most.
    pub row_tokens: u64,
}

impl Work {
    /// Whether operands of products are widened to fp32 (`worker/src/model/ops/product.rs`).
    fn widens(&self) -> bool {
        self.place == Place::Cpu { bf16: false } && self.weight == 2
    }
}

/// What a phase takes, item by item.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Phase {
    /// Its name.
    pub name: &'static str,
    /// Bytes, by what they are for.
    pub items: Vec<(&'static str, u64)>,
}

impl Phase {
    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.items.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What a worker takes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Footprint {
    /// Sampling, scoring and training.
    pub phases: Vec<Phase>,
}

impl Footprint {
    /// Counts it.
    pub fn of(shape: &Shape, work: &Work) -> Self {
        Self { phases: vec![sampling(shape, work), scoring(shape, work), training(shape, work)] }
    }

    /// The largest phase's bytes.
    pub fn peak(&self) -> u64 {
        self.phases.iter().map(Phase::total).max().unwrap_or(0)
    }
}

fn sampling(shape: &Shape, work: &Work) -> Phase {
    let widened = work.widens();
    let kind = if widened { 4 } else { work.weight };
    let tokens = PROMPT_CHUNK + work.rows;
    let cache = work.cache.min(work.rows * work.row_tokens * shape.cached() * kind);
    let mut items = vec![("weights", work.weight * shape.parameters())];
    if work.place != Place::Gpu {
        // A copy (`worker/src/model/ops/packed.rs`), but for the embedding.
        let embedding = if shape.tied { 0 } else { shape.table() };
        items.push(("weights packed", kind * (shape.parameters() - embedding)));
    }
    if widened {
        items.push(("embedding in fp32", kind * shape.table()));
    }
    items.extend([
        ("keys and values", cache),
        // A block's activations, and the logits of all rows with what choosing makes of them.
        ("a step", tokens * shape.kept() * kind + work.rows * shape.vocabulary * 4 * 3),
        ("libraries", libraries(work.place)),
    ]);
    Phase { name: "sampling", items }
}

fn scoring(shape: &Shape, work: &Work) -> Phase {
    let items = vec![
        ("weights", work.weight * shape.parameters()),
        ("a block", work.tokens * (shape.kept() + shape.hidden) * work.weight),
        ("head", head(shape, work)),
        ("libraries", libraries(work.place)),
    ];
    Phase { name: "scoring", items }
}

fn training(shape: &Shape, work: &Work) -> Phase {
    let Work { ranks, weight, moments, .. } = *work;
    let sharded = work.sharding == Sharding::Zero2 && ranks > 1;
    let parameters = shape.parameters();
    let share = if sharded { parameters.div_ceil(ranks) } else { parameters };
    let masters = if weight == 4 { 0 } else { 4 * share };
    let mut items = vec![
        ("weights", weight * parameters),
        ("gradients", 4 * share),
        ("masters", masters),
        ("optimiser state", 4 * moments * share),
    ];
    if sharded {
        // Head and embedding take turns with a buffer that is no block's.
        let whole = 4 * shape.table() + EXCHANGED * 4 * shape.block();
        let piece = shape.block().min(LARGEST_PIECE);
        let gathered = GATHERED * weight * (piece + piece / ranks);
        items.push(("buckets on their way", whole + gathered));
    }
    items.push(("activations", activations(shape, work)));
    items.push(("a block's backward", backward(shape, work)));
    items.push(("head", head(shape, work)));
    if work.place == Place::Gpu {
        // The update's two scratch buffers are as long as the largest bucket's share.
        let largest = shape.table().max(shape.block());
        let share = if sharded { largest.div_ceil(ranks) } else { largest };
        items.push(("update", 2 * 4 * share));
    }
    items.push(("libraries", libraries(work.place)));
    Phase { name: "training", items }
}

/// What forward leaves for backward.
fn activations(shape: &Shape, work: &Work) -> u64 {
    let inputs = shape.layers * work.tokens * shape.hidden * work.weight;
    let block = work.tokens * shape.kept() * work.weight;
    match work.keep {
        Keep::All => shape.layers * block,
        Keep::Inputs => inputs,
        Keep::Budget(bytes) => {
            let whole = (bytes.saturating_sub(inputs) / block.max(1)).min(shape.layers);
            let rest = shape.layers - whole;
            whole * block + rest * work.tokens * shape.hidden * work.weight
        }
    }
}

/// What comes and goes beside that, at most.
fn backward(shape: &Shape, work: &Work) -> u64 {
    let again = match work.keep {
        Keep::All => 0,
        Keep::Inputs | Keep::Budget(_) => work.tokens * shape.kept() * work.weight,
    };
    let passing = work.tokens * (2 * shape.hidden + 2 * shape.intermediate) * work.weight;
    // The largest matrix's gradient, ahead of its sum.
    let matrix = 2 * shape.intermediate * shape.hidden;
    let widened = match work.widens() {
        true => (work.tokens * (2 * shape.intermediate + shape.hidden) + matrix) * 4,
        false => 0,
    };
    again + passing + matrix * work.weight + widened
}

/// Logits of a chunk, whose place their gradient takes, and the states that predict
/// responses.
fn head(shape: &Shape, work: &Work) -> u64 {
    let logits = (work.responses * shape.vocabulary * work.weight).min(LOGITS);
    logits + work.responses * shape.hidden * (2 * work.weight + 4)
}

/// What is there before the first weight: contexts of CUDA, cuBLAS and NCCL, or libtorch.
fn libraries(place: Place) -> u64 {
    match place {
        Place::Gpu => 3 << 29,
        Place::Cpu { .. } => 240 << 20,
    }
}

/// Settings that fit.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Fit {
    /// `training.sharding`.
    pub sharding: Sharding,
    /// `training.recompute`: none, auto or all.
    pub recompute: &'static str,
    /// `training.activation_budget`, where it is auto.
    pub activation_budget: Option<u64>,
    /// `training.max_tokens`.
    pub max_tokens: u64,
    /// `sampling.cache_budget`.
    pub cache_budget: u64,
}

/// Share of a worker's memory that is left alone: fragments, and what is not counted.
const SPARE: f64 = 0.06;

impl Fit {
    /// The settings that cost least time among those with which `work` fits into `memory`
    /// bytes a worker; none where nothing does. `pairs` is how many tokens a worker's share
    /// of a step has, `longest` those of one pair, which no pass can split.
    pub fn find(shape: &Shape, work: &Work, memory: u64, longest: u64) -> Option<(Self, Work)> {
        let usable = (memory as f64 * (1.0 - SPARE)) as u64;
        let shardings: &[Sharding] = match work.ranks {
            1 => &[Sharding::None],
            _ => &[Sharding::None, Sharding::Zero2],
        };
        let response_share = work.responses as f64 / work.tokens.max(1) as f64;
        // Halved passes cost little; to compute blocks again costs a third of the time.
        let passes = std::iter::successors(Some(work.tokens.max(longest)), |&tokens| {
            (tokens > longest).then(|| (tokens / 2).max(longest))
        });
        let passes: Vec<u64> = passes.collect();
        for &sharding in shardings {
            for keep in [Keep::All, Keep::Budget(0), Keep::Inputs] {
                for &tokens in &passes {
                    let responses = (tokens as f64 * response_share).ceil() as u64;
                    let mut tried = Work { sharding, keep, tokens, responses, ..*work };
                    if let Keep::Budget(_) = keep {
                        // All that is left; worth it where half of the blocks keep all they want.
                        let without =
                            training(shape, &Work { keep: Keep::Inputs, ..tried }).total();
                        let inputs = activations(shape, &Work { keep: Keep::Inputs, ..tried });
                        let left = usable.saturating_sub(without) + inputs;
                        tried.keep = Keep::Budget(left);
                        if activations(shape, &tried)
                            < activations(shape, &Work { keep: Keep::All, ..tried }) / 2
                        {
                            continue;
                        }
                    }
                    if training(shape, &tried).total() > usable
                        || scoring(shape, &tried).total() > usable
                    {
                        continue;
                    }
                    let bare = sampling(shape, &Work { cache: 0, ..tried }).total();
                    tried.cache = tried.cache.min(usable.saturating_sub(bare));
                    if tried.cache == 0 {
                        continue;
                    }
                    let (recompute, activation_budget) = match tried.keep {
                        Keep::All => ("none", None),
                        Keep::Budget(bytes) => ("auto", Some(bytes)),
                        Keep::Inputs => ("all", None),
                    };
                    let fit = Self {
                        sharding,
                        recompute,
                        activation_budget,
                        max_tokens: tokens,
                        cache_budget: tried.cache,
                    };
                    return Some((fit, tried));
                }
            }
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::shape::tests::QWEN_14B;
    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    fn work(ranks: u64) -> Work {
        Work {
            ranks,
            place: Place::Gpu,
            weight: 2,
            moments: 1,
            sharding: Sharding::Zero2,
            keep: Keep::Inputs,
            tokens: 16_384,
            responses: 8_192,
            cache: 8 << 30,
            rows: 64,
            row_tokens: 2_560,
        }
    }

    /// 2 bytes a weight; an eighth of 4 for each of gradients, masters and state; 16,384
    /// tokens of 5,120 numbers ahead of each of 48 blocks.
    #[test]
    fn a_14b_model_takes_what_was_counted_by_hand() {
        let shape = Shape::parse(QWEN_14B).unwrap();
        let phase = training(&shape, &work(8));
        let item = |name| {
            let (_, bytes) = phase.items.iter().find(|(item, _)| *item == name).unwrap();
            *bytes as f64 / 1e9
        };
        assert!((item("weights") - 29.54).abs() < 0.01, "{}", item("weights"));
        assert!((item("masters") + item("optimiser state") - 14.77).abs() < 0.01);
        assert!((item("gradients") - 7.39).abs() < 0.01);
        assert!((item("activations") - 8.05).abs() < 0.01, "{}", item("activations"));
    }

    #[test]
    fn what_does_not_fit_whole_is_sharded_and_then_computed_again() {
        let shape = Shape::parse(QWEN_14B).unwrap();
        let gpu = 80u64 << 30;
        let (fit, tried) = Fit::find(&shape, &work(8), gpu, 2_560).unwrap();
        assert_eq!(fit.sharding, Sharding::Zero2, "16 bytes a weight are 236 GB");
        let footprint = Footprint::of(&shape, &tried);
        assert!(footprint.peak() < gpu, "{:.1}", footprint.peak() as f64 / GIB);
        // One GPU cannot hold it in any way.
        assert_eq!(Fit::find(&shape, &work(1), gpu, 2_560), None);
        // A machine with more memory recomputes less.
        let keeps = |memory: u64| {
            let (_, tried) = Fit::find(&shape, &work(8), memory, 2_560).unwrap();
            activations(&shape, &tried)
        };
        assert!(keeps(gpu) <= keeps(141 << 30));
    }

    #[test]
    fn a_budget_keeps_as_many_blocks_as_it_holds() {
        let shape = Shape::parse(QWEN_14B).unwrap();
        let bytes = |keep| activations(&shape, &Work { keep, ..work(8) });
        let (least, most) = (bytes(Keep::Inputs), bytes(Keep::All));
        assert!(least * 5 < most);
        assert_eq!(bytes(Keep::Budget(0)), least);
        assert_eq!(bytes(Keep::Budget(2 * most)), most);
        let half = bytes(Keep::Budget(most / 2));
        assert!(least < half && half <= most / 2, "{half} {most}");
    }
}
