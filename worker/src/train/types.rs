//! What goes into the engine, and what comes out.

/// A preference pair as token ids.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenPair {
    /// The pair's id, given back with its results.
    pub pair: u64,
    /// x; at least one token, since the last one predicts the first of each reply.
    pub prompt: Vec<u32>,
    /// y⁺; at least one token.
    pub chosen: Vec<u32>,
    /// y⁻; at least one token, but for scoring, which without it is that of y⁺ alone.
    pub rejected: Vec<u32>,
    /// Log-probabilities under π_ref; needed for training, ignored by scoring.
    pub reference: Option<ReferenceLogps>,
}

/// Log-probabilities of a pair's replies under the reference policy: sums over
/// response tokens, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReferenceLogps {
    /// log π_ref(y⁺|x).
    pub chosen: f64,
    /// log π_ref(y⁻|x).
    pub rejected: f64,
}

/// Pairs that one forward and backward pass computes together.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MicroBatch {
    /// At least one pair.
    pub pairs: Vec<TokenPair>,
}

/// Log-probabilities of a pair's replies under the current weights: sums over
/// response tokens, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLogps {
    /// The pair's id.
    pub pair: u64,
    /// log π(y⁺|x).
    pub chosen: f64,
    /// log π(y⁻|x).
    pub rejected: f64,
}

/// How a pair's margin becomes a loss. With the log-ratios
/// Δ = log π − log π_ref of both replies, s = β (Δ⁺ − Δ⁻).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PreferenceLoss {
    /// −log σ(s): DPO (Rafailov et al. 2023, Eq. 7).
    Sigmoid,
    /// max(0, 1 − s): SLiC (Zhao et al. 2023), with DPO's margin.
    Hinge,
    /// (Δ⁺/|y⁺| − Δ⁻/|y⁻| − 1/2β)²: IPO (Azar et al. 2023, Eq. 17), by means over
    /// tokens, as its authors computed it and TRL does.
    Ipo,
    /// [−(1 − ε) log σ(s) + ε log σ(−s)] / (1 − 2ε): robust DPO (Chowdhury et al.
    /// 2024), for labels of which a share ε is flipped.
    Robust {
        /// ε, in [0, 0.5).
        label_smoothing: f64,
    },
    /// −log σ(β (Δ⁺/|y⁺| − Δ⁻/|y⁻|)): DPO by means over tokens, TRL's `sigmoid_norm`.
    SigmoidNorm,
}

/// The loss: that of preferences, and a share of plain likelihood if wished.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// The loss of a pair.
    pub loss: PreferenceLoss,
    /// β; IPO's τ.
    pub beta: f64,
    /// Weight of the chosen replies' negative log-likelihood (RPO). It is a mean
    /// over all chosen tokens of a rank's share of the step, as TRL takes it over
    /// a device's batch (`loss_type=["sigmoid", "sft"]`,
    /// `loss_weights=[1, rpo_alpha]`).
    pub rpo_alpha: f64,
}

/// How gradients become updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Algorithm {
    /// As `torch.optim.RMSprop`.
    RmsProp {
        /// Smoothing constant of the squared gradient's mean.
        alpha: f64,
        /// Added to its root.
        epsilon: f64,
    },
    /// As `torch.optim.AdamW`; norms and biases do not decay, as `transformers` has it.
    AdamW {
        /// Smoothing constant of the gradient's mean.
        beta1: f64,
        /// Smoothing constant of the squared gradient's mean.
        beta2: f64,
        /// Added to its root.
        epsilon: f64,
        /// Decoupled weight decay, times the learning rate.
        weight_decay: f64,
    },
}

/// The optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSettings {
    /// How gradients become updates.
    pub algorithm: Algorithm,
    /// Bound on the norm of the mean gradient over all ranks; 0 leaves it unbounded.
    pub max_grad_norm: f64,
}

/// What each rank holds of gradients, masters and optimiser state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharding {
    /// All of it; gradients are all-reduced.
    #[default]
    None,
    /// A share (ZeRO stage 2): gradients are reduce-scattered, updated weights all-gathered.
    Zero2,
}

/// What a block keeps between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recompute {
    /// All that backward needs.
    #[default]
    None,
    /// Its input; the rest is computed again.
    All,
    /// All that backward needs in as many blocks as fit into so many bytes, the
    /// input in the others.
    Auto {
        /// Bytes that one micro-batch's activations may take.
        budget_bytes: u64,
    },
}

/// In what kind gradients are summed over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReduceKind {
    /// As they were accumulated.
    #[default]
    Float,
    /// Rounded to bf16: half the bytes.
    BFloat16,
}

/// How the engine goes about it; none of it changes what is computed, but for rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineSettings {
    /// What each rank holds.
    pub sharding: Sharding,
    /// What a block keeps.
    pub recompute: Recompute,
    /// In what kind gradients are summed over ranks.
    pub reduce: ReduceKind,
    /// Under sharding, most elements of a bucket that pass between ranks at once.
    pub largest_piece: i64,
}

/// What [`EngineSettings::largest_piece`] is by default, 256 MiB of gradients: more
/// makes no link faster.
pub const LARGEST_PIECE: i64 = 1 << 26;

/// All that is settled when training begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingSettings {
    /// The loss.
    pub objective: Objective,
    /// The optimiser.
    pub optimizer: OptimizerSettings,
    /// How the engine goes about it.
    pub engine: EngineSettings,
}

/// One optimiser step, as this rank sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainStep {
    /// Counts from 0 within an iteration.
    pub step: u64,
    /// The step's learning rate; the schedule is the coordinator's.
    pub learning_rate: f64,
    /// Pairs of this step over all ranks: what sums of gradients are divided by.
    pub global_pairs: u32,
    /// This rank's share; may be empty in a short last batch.
    pub micro_batches: Vec<MicroBatch>,
}

/// What a step meant for one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairOutcome {
    /// The pair's id.
    pub pair: u64,
    /// The pair's loss. The mean over a step's pairs is the step's loss.
    pub loss: f64,
    /// log π(y⁺|x) before the update, in nats.
    pub logp_chosen: f64,
    /// log π(y⁻|x) before the update, in nats.
    pub logp_rejected: f64,
    /// β · (log π(y⁺|x) − log π_ref(y⁺|x)).
    pub reward_chosen: f64,
    /// β · (log π(y⁻|x) − log π_ref(y⁻|x)).
    pub reward_rejected: f64,
    /// Mean of the logits over y⁺'s tokens and the vocabulary. TRL's figure for a
    /// batch weighs pairs by their response tokens.
    pub logits_chosen: f64,
    /// Mean of the logits over y⁻'s tokens and the vocabulary.
    pub logits_rejected: f64,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Norm of the mean gradient over all ranks, before clipping.
    pub grad_norm: f64,
    /// This rank's pairs, in the order given.
    pub pairs: Vec<PairOutcome>,
    /// Packed tokens that this rank computed.
    pub tokens: u64,
    /// How long this rank's reductions took.
    pub reduction: ReductionTimes,
}

/// What summing gradients over ranks cost in one step, and under
/// [`Sharding::Zero2`] gathering the updated weights.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ReductionTimes {
    /// Seconds during which such an operation was under way, a peer's delay included.
    pub busy: f64,
    /// Seconds of these in which this rank did nothing but wait for it.
    pub exposed: f64,
}
