//! Numbers of a step and of an evaluation, under TRL's names.

use serde::{Deserialize, Serialize};

use super::objective::{Objective, sigmoid};
use super::plan::PairSize;
use crate::domain::{PairId, ReferenceLogps};

/// One pair in one optimiser step, as its worker computed it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairOutcome {
    /// Which pair.
    pub id: PairId,
    /// Its loss, RPO term included.
    pub loss: f64,
    /// log π(y⁺|x) and log π(y⁻|x), in nats.
    pub logps: ReferenceLogps,
    /// β (log π − log π_ref) of the chosen side.
    pub reward_chosen: f64,
    /// β (log π − log π_ref) of the rejected side.
    pub reward_rejected: f64,
    /// Mean logit over the chosen side's tokens and the vocabulary.
    pub logits_chosen: f64,
    /// Mean logit over the rejected side's tokens and the vocabulary.
    pub logits_rejected: f64,
}

/// A pair of a step with what its metrics need besides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepPair {
    /// As its worker computed it.
    pub outcome: PairOutcome,
    /// Its lengths.
    pub size: PairSize,
    /// log π_ref of both sides.
    pub reference: ReferenceLogps,
}

/// Where a step stands in its iteration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Rate of this step.
    pub learning_rate: f64,
    /// Epochs done with this step.
    pub epoch: f64,
    /// Tokens computed so far in this iteration.
    pub num_tokens: u64,
}

/// One optimiser step over all ranks; TRL's names, so that dashboards know them,
/// and behind them what DPO's gradient, −βσ(−s)[∇log π(y⁺) − ∇log π(y⁻)], says of
/// a step (DRIFT paper, Eq. 4 and Lemma 1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Mean loss.
    pub loss: f64,
    /// Norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Rate of this step.
    pub learning_rate: f64,
    /// Epochs done with this step.
    pub epoch: f64,
    /// Tokens computed so far in this iteration.
    pub num_tokens: u64,
    /// Mean reward of the chosen side.
    #[serde(rename = "rewards/chosen")]
    pub rewards_chosen: f64,
    /// Mean reward of the rejected side.
    #[serde(rename = "rewards/rejected")]
    pub rewards_rejected: f64,
    /// Share of pairs whose chosen reward is strictly higher.
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Mean difference of the rewards.
    #[serde(rename = "rewards/margins")]
    pub rewards_margins: f64,
    /// Mean log π(y⁺|x).
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    /// Mean log π(y⁻|x).
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
    /// Mean logit on the chosen side.
    #[serde(rename = "logits/chosen")]
    pub logits_chosen: f64,
    /// Mean logit on the rejected side.
    #[serde(rename = "logits/rejected")]
    pub logits_rejected: f64,
    /// Mean σ(−s): the weight of the pairs' gradients.
    #[serde(rename = "signal/mean")]
    pub signal_mean: f64,
    /// Share of pairs with σ(−s) of at least the threshold: p₀ of Lemma 1.
    #[serde(rename = "signal/p0")]
    pub signal_p0: f64,
    /// σ(−s) of each pair, in the order of [`Self::pairs`].
    #[serde(rename = "signal/pairs")]
    pub signal_pairs: Vec<f64>,
    /// The step's pairs, by their ids in `pairs.parquet`, ascending.
    pub pairs: Vec<PairId>,
    /// Variance of s over the step's pairs: the mean square from their mean.
    #[serde(rename = "margins/var")]
    pub margins_var: f64,
    /// Mean log π(y⁺|x) − log π_ref(y⁺|x).
    #[serde(rename = "logps/chosen_drift")]
    pub chosen_drift: f64,
    /// Mean log π(y⁻|x) − log π_ref(y⁻|x).
    #[serde(rename = "logps/rejected_drift")]
    pub rejected_drift: f64,
}

impl StepMetrics {
    /// Joins the ranks' pairs, of which there is at least one. They are put in
    /// the order of their ids, so that sums do not depend on who computed what.
    /// Logits are means over tokens, the others over pairs, as TRL has them.
    pub fn join(
        mut pairs: Vec<StepPair>,
        grad_norm: f64,
        progress: Progress,
        objective: &Objective,
        signal_threshold: f64,
    ) -> Self {
        pairs.sort_by_key(|pair| pair.outcome.id);
        let of = |value: &dyn Fn(&PairOutcome) -> f64| mean(&pairs, |pair| value(&pair.outcome));
        let token_mean = |value: &dyn Fn(&PairOutcome) -> f64,
                          tokens: &dyn Fn(&PairSize) -> usize| {
            let total: usize = pairs.iter().map(|pair| tokens(&pair.size)).sum();
            let sum: f64 =
                pairs.iter().map(|pair| value(&pair.outcome) * tokens(&pair.size) as f64).sum();
            sum / total as f64
        };
        let margins: Vec<f64> = pairs
            .iter()
            .map(|pair| objective.margin(&pair.outcome.logps, &pair.reference, &pair.size))
            .collect();
        let signal: Vec<f64> = margins.iter().map(|s| sigmoid(-s)).collect();
        let center = mean(&margins, |s| *s);
        Self {
            loss: of(&|p| p.loss),
            grad_norm,
            learning_rate: progress.learning_rate,
            epoch: progress.epoch,
            num_tokens: progress.num_tokens,
            rewards_chosen: of(&|p| p.reward_chosen),
            rewards_rejected: of(&|p| p.reward_rejected),
            rewards_accuracies: share(&pairs, |pair| {
                pair.outcome.reward_chosen > pair.outcome.reward_rejected
            }),
            rewards_margins: of(&|p| p.reward_chosen - p.reward_rejected),
            logps_chosen: of(&|p| p.logps.chosen),
            logps_rejected: of(&|p| p.logps.rejected),
            logits_chosen: token_mean(&|p| p.logits_chosen, &|size| size.chosen),
            logits_rejected: token_mean(&|p| p.logits_rejected, &|size| size.rejected),
            signal_mean: mean(&signal, |weight| *weight),
            signal_p0: share(&signal, |weight| *weight >= signal_threshold),
            signal_pairs: signal,
            margins_var: mean(&margins, |s| (s - center).powi(2)),
            chosen_drift: mean(&pairs, |p| p.outcome.logps.chosen - p.reference.chosen),
            rejected_drift: mean(&pairs, |p| p.outcome.logps.rejected - p.reference.rejected),
            pairs: pairs.iter().map(|pair| pair.outcome.id).collect(),
        }
    }
}

/// Share of the items of which something holds.
fn share<T>(items: &[T], holds: impl Fn(&T) -> bool) -> f64 {
    items.iter().filter(|item| holds(item)).count() as f64 / items.len() as f64
}

/// Mean of at least one value, by their differences from the first: the mean of
/// equal values is that value to the last bit.
fn mean<T>(items: &[T], value: impl Fn(&T) -> f64) -> f64 {
    let Some(first) = items.first().map(&value) else { return f64::NAN };
    let beyond: f64 = items.iter().map(|item| value(item) - first).sum();
    first + beyond / items.len() as f64
}

/// Held-out pairs at an epoch's end; TRL's names with its `eval_` prefix.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvaluationMetrics {
    /// Pairs evaluated.
    pub eval_pairs: u64,
    /// Mean loss, `training.loss` at the policy's margins; no RPO term.
    pub eval_loss: f64,
    /// Mean reward of the chosen side.
    #[serde(rename = "eval_rewards/chosen")]
    pub rewards_chosen: f64,
    /// Mean reward of the rejected side.
    #[serde(rename = "eval_rewards/rejected")]
    pub rewards_rejected: f64,
    /// Share of pairs whose chosen reward is strictly higher.
    #[serde(rename = "eval_rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Mean difference of the rewards.
    #[serde(rename = "eval_rewards/margins")]
    pub rewards_margins: f64,
    /// Mean log π(y⁺|x).
    #[serde(rename = "eval_logps/chosen")]
    pub logps_chosen: f64,
    /// Mean log π(y⁻|x).
    #[serde(rename = "eval_logps/rejected")]
    pub logps_rejected: f64,
    /// Mean log π_ref(y⁺|x): where the chosen side stood before.
    #[serde(rename = "eval_ref_logps/chosen")]
    pub reference_logps_chosen: f64,
    /// Mean log π_ref(y⁻|x).
    #[serde(rename = "eval_ref_logps/rejected")]
    pub reference_logps_rejected: f64,
}

/// A held-out pair: its policy's and its reference's log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredPair {
    /// log π of both sides.
    pub policy: ReferenceLogps,
    /// log π_ref of both sides.
    pub reference: ReferenceLogps,
    /// Its lengths.
    pub size: PairSize,
}

impl EvaluationMetrics {
    /// Loss and rewards of scored pairs; `None` where nothing is held out.
    pub fn of(scored: &[ScoredPair], objective: &Objective) -> Option<Self> {
        if scored.is_empty() {
            return None;
        }
        let beta = objective.beta;
        let chosen = |p: &ScoredPair| beta * (p.policy.chosen - p.reference.chosen);
        let rejected = |p: &ScoredPair| beta * (p.policy.rejected - p.reference.rejected);
        let margin = |p: &ScoredPair| chosen(p) - rejected(p);
        let loss =
            |p: &ScoredPair| objective.loss_at(objective.margin(&p.policy, &p.reference, &p.size));
        Some(Self {
            eval_pairs: scored.len() as u64,
            eval_loss: mean(scored, loss),
            rewards_chosen: mean(scored, chosen),
            rewards_rejected: mean(scored, rejected),
            rewards_accuracies: share(scored, |p| margin(p) > 0.0),
            rewards_margins: mean(scored, margin),
            logps_chosen: mean(scored, |p| p.policy.chosen),
            logps_rejected: mean(scored, |p| p.policy.rejected),
            reference_logps_chosen: mean(scored, |p| p.reference.chosen),
            reference_logps_rejected: mean(scored, |p| p.reference.rejected),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
