use super::*;
use crate::config::Loss;

const DPO: Objective = Objective { loss: Loss::Sigmoid, beta: 0.1, label_smoothing: 0.0 };
const PROGRESS: Progress = Progress { learning_rate: 1e-6, epoch: 0.5, num_tokens: 7 };

fn logps(chosen: f64, rejected: f64) -> ReferenceLogps {
    ReferenceLogps { chosen, rejected }
}

fn size(chosen: usize, rejected: usize) -> PairSize {
    PairSize { id: PairId(0), tokens: 9, chosen, rejected }
}

/// A pair that has drifted by so much on both sides.
fn step_pair(id: u64, chosen_drift: f64, rejected_drift: f64) -> StepPair {
    let reference = logps(-30.0, -40.0);
    let policy = logps(-30.0 + chosen_drift, -40.0 + rejected_drift);
    let size = PairSize { id: PairId(id), ..size(2, 4) };
    let outcome = PairOutcome {
        id: PairId(id),
        loss: DPO.loss_at(DPO.margin(&policy, &reference, &size)),
        logps: policy,
        reward_chosen: DPO.beta * chosen_drift,
        reward_rejected: DPO.beta * rejected_drift,
        logits_chosen: 1.0,
        logits_rejected: 2.0,
    };
    StepPair { outcome, size, reference }
}

#[test]
fn equal_policies_lose_ln_2_and_win_nothing() {
    let same = logps(-12.5, -80.0);
    let scored = ScoredPair { policy: same, reference: same, size: size(3, 5) };
    let metrics = EvaluationMetrics::of(&[scored; 7], &DPO).unwrap();
    assert_eq!(metrics.eval_loss, std::f64::consts::LN_2);
    assert_eq!(metrics.rewards_margins, 0.0);
    assert_eq!(metrics.rewards_accuracies, 0.0, "a tie is no win");
    assert!(EvaluationMetrics::of(&[], &DPO).is_none());
}

#[test]
fn an_evaluation_follows_the_loss_that_trains() {
    let scored = ScoredPair {
        policy: logps(-10.0, -20.0),
        reference: logps(-12.5, -17.0),
        size: size(5, 8),
    };
    let loss = |loss| {
        let objective = Objective { loss, beta: 0.1, label_smoothing: 0.2 };
        EvaluationMetrics::of(&[scored], &objective).unwrap()
    };
    assert!((loss(Loss::Hinge).eval_loss - 0.45).abs() < 1e-12);
    assert!((loss(Loss::Ipo).eval_loss - 17.015625).abs() < 1e-12);
    assert!((loss(Loss::Robust).eval_loss - 0.2721591481300043).abs() < 1e-12);
    assert!((loss(Loss::SigmoidNorm).eval_loss - 0.6503539066627487).abs() < 1e-12);
    // Rewards are sums over tokens under every loss, as TRL has them.
    assert!((loss(Loss::Ipo).rewards_margins - 0.55).abs() < 1e-12);
}

#[test]
fn a_step_tells_what_is_left_of_the_signal() {
    let pairs = vec![step_pair(9, 40.0, -20.0), step_pair(2, 0.0, 0.0), step_pair(5, -3.0, -13.0)];
    let metrics = StepMetrics::join(pairs, 2.0, PROGRESS, &DPO, 0.1);
    assert_eq!(metrics.pairs, [PairId(2), PairId(5), PairId(9)], "by id, whoever computed them");
    let expected = [0.5, sigmoid(-1.0), sigmoid(-6.0)];
    for (weight, expected) in metrics.signal_pairs.iter().zip(expected) {
        assert!((weight - expected).abs() < 1e-12);
    }
    assert!((metrics.signal_mean - expected.iter().sum::<f64>() / 3.0).abs() < 1e-12);
    assert_eq!(metrics.signal_p0, 2.0 / 3.0);
    // s is 0, 1 and 6.
    assert!((metrics.margins_var - 62.0 / 9.0).abs() < 1e-12);
    assert!((metrics.chosen_drift - 37.0 / 3.0).abs() < 1e-12);
    assert!((metrics.rejected_drift + 11.0).abs() < 1e-12);
}

#[test]
fn the_signal_is_that_of_the_margin_which_the_loss_sees() {
    let by_tokens = Objective { loss: Loss::SigmoidNorm, ..DPO };
    let metrics = StepMetrics::join(vec![step_pair(0, 4.0, -8.0)], 1.0, PROGRESS, &by_tokens, 0.1);
    assert!((metrics.signal_mean - sigmoid(-0.1 * (4.0 / 2.0 + 8.0 / 4.0))).abs() < 1e-12);
}

#[test]
fn joined_losses_of_equal_policies_are_ln_2_to_the_last_bit() {
    for pairs in 1..40 {
        let metrics = StepMetrics::join(
            (0..pairs).map(|id| step_pair(id, 0.0, 0.0)).collect(),
            1.0,
            PROGRESS,
            &DPO,
            0.1,
        );
        assert_eq!(metrics.loss, std::f64::consts::LN_2, "{pairs} pairs");
        assert_eq!((metrics.signal_mean, metrics.signal_p0, metrics.margins_var), (0.5, 1.0, 0.0));
    }
}

#[test]
fn names_are_trls() {
    let mut pair = step_pair(0, 1.0, 3.0);
    pair.size = size(1, 3);
    let mut long = pair;
    long.outcome.logits_chosen = 5.0;
    long.size.chosen = 3;
    let metrics = StepMetrics::join(vec![pair, long], 2.0, PROGRESS, &DPO, 0.1);
    assert_eq!(metrics.logits_chosen, (1.0 + 3.0 * 5.0) / 4.0, "a mean over tokens");
    assert_eq!(metrics.rewards_accuracies, 0.0);
    assert!((metrics.rewards_margins + 0.2).abs() < 1e-12);
    let json = serde_json::to_value(&metrics).unwrap();
    for name in [
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "num_tokens",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "signal/mean",
        "signal/p0",
        "signal/pairs",
        "pairs",
        "margins/var",
        "logps/chosen_drift",
        "logps/rejected_drift",
    ] {
        assert!(json.get(name).is_some(), "{name}");
    }
    assert_eq!(serde_json::from_value::<StepMetrics>(json).unwrap(), metrics);
}
