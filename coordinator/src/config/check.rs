//! What was typed becomes what can run: each value in its range, and the ones
//! that depend on each other agreeing.

use std::fmt;
use std::net::SocketAddr;

use tokio_rustls::rustls::pki_types::ServerName;

use super::{Guidance, Loss, Method, OptimizerChoice, Recompute, Settings, StartWorkers};

/// One setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The keys concerned.
    pub keys: &'static [&'static str],
    /// What is wrong and what would be right.
    pub message: String,
}

/// Everything wrong with a configuration, so that one run of the program tells all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<ConfigProblem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration cannot run:")?;
        for problem in &self.0 {
            write!(f, "\n  {}: {}", problem.keys.join(", "), problem.message)?;
        }
        Ok(())
    }
}

impl Settings {
    /// Checks every value and every pair of values that must agree.
    pub fn check(&self) -> Result<(), Problems> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, keys: &'static [&'static str], message: String| {
            if !holds {
                problems.push(ConfigProblem { keys, message });
            }
        };
        let (data, text, sampling) = (&self.data, &self.text, &self.sampling);
        let (training, launch) = (&self.training, &self.launch);

        require(!self.model.is_empty(), &["model"], "name a model folder or a hub name".into());
        require(
            !self.corpus.0.is_empty() || training.iterations == 0,
            &["corpus"],
            "name at least one file of conversations".into(),
        );
        require(
            (1..=1024).contains(&self.workers),
            &["workers"],
            format!("{} workers; from 1 to 1024 can join a run", self.workers),
        );
        require(
            (0.0..=1.0).contains(&data.max_malformed),
            &["data.max_malformed"],
            format!("{} is no share; take one from 0 to 1", data.max_malformed),
        );
        let format = crate::run::driver::named_format(&data.format);
        require(
            format.is_ok(),
            &["data.format"],
            format.err().map(|e| e.to_string()).unwrap_or_default(),
        );
        require(
            text.max_prompt_tokens < text.max_length,
            &["text.max_prompt_tokens", "text.max_length"],
            format!(
                "a prompt of {} tokens leaves no room for a reply within {}",
                text.max_prompt_tokens, text.max_length
            ),
        );
        require(
            text.max_prompt_tokens > 0,
            &["text.max_prompt_tokens"],
            "a prompt needs at least one token".into(),
        );
        require(
            text.today.is_empty() || text.today.parse::<jiff::civil::Date>().is_ok(),
            &["text.today"],
            format!("{:?} is no date; write YYYY-MM-DD", text.today),
        );
        require(
            sampling.temperature >= 0.0 && sampling.temperature.is_finite(),
            &["sampling.temperature"],
            format!("{} is no temperature; 0 is greedy, 1 unchanged", sampling.temperature),
        );
        require(
            sampling.top_p > 0.0 && sampling.top_p <= 1.0,
            &["sampling.top_p"],
            format!("{} is outside (0, 1]", sampling.top_p),
        );
        require(
            (0.0..=1.0).contains(&sampling.min_p),
            &["sampling.min_p"],
            format!("{} is outside [0, 1]", sampling.min_p),
        );
        require(
            sampling.repetition_penalty > 0.0 && sampling.repetition_penalty.is_finite(),
            &["sampling.repetition_penalty"],
            format!("{} is not above 0; 1 does nothing", sampling.repetition_penalty),
        );
        require(
            sampling.min_new_tokens <= sampling.max_new_tokens,
            &["sampling.min_new_tokens", "sampling.max_new_tokens"],
            format!(
                "a reply of at least {} and at most {} tokens cannot be",
                sampling.min_new_tokens, sampling.max_new_tokens
            ),
        );
        require(
            sampling.stop_strings.iter().all(|stop| !stop.is_empty()),
            &["sampling.stop_strings"],
            "an empty text stands at every reply's start: leave it out".into(),
        );
        require(
            sampling.max_rows > 0 && sampling.cache_budget.0 > 0,
            &["sampling.max_rows", "sampling.cache_budget"],
            "must be above 0".to_owned(),
        );
        require(
            sampling.max_new_tokens > 0 && sampling.max_prompt_tokens > 0,
            &["sampling.max_new_tokens", "sampling.max_prompt_tokens"],
            "both need at least one token".into(),
        );
        require(
            sampling.shard_prompts > 0,
            &["sampling.shard_prompts"],
            "a shard needs at least one prompt".into(),
        );
        require(
            training.warm_start_epochs > 0 || training.iterations > 0,
            &["training.warm_start_epochs", "training.iterations"],
            "both are 0: nothing would be trained".into(),
        );
        require(
            training.epochs > 0 || training.iterations == 0,
            &["training.epochs"],
            "an iteration needs at least one epoch".into(),
        );
        require(
            training.pair_iterations > 0,
            &["training.pair_iterations"],
            "an iteration needs pairs of its own; take 1, or 2 for those before it too".into(),
        );
        let names_reward_model = !self.reward.model.is_empty();
        require(
            self.method == Method::IterDpo || !names_reward_model,
            &["reward.model", "method"],
            "only \"iter-dpo\" lets samples be rated; take it, or name no reward model".into(),
        );
        require(
            self.method != Method::IterDpo
                || sampling.guidance == Guidance::On
                || names_reward_model,
            &["reward.model", "sampling.guidance"],
            "of two unguided replies only a reward model tells the better one; name one, such as \"OpenAssistant/reward-model-deberta-v3-large-v2\", or take guidance = \"on\"".into(),
        );
        require(
            self.reward.batch > 0,
            &["reward.batch"],
            "a batch needs at least one sample".into(),
        );
        require(
            training.pairs_per_worker > 0,
            &["training.pairs_per_worker"],
            "a step needs at least one pair per worker".into(),
        );
        require(
            training.max_tokens >= 2 * text.max_length,
            &["training.max_tokens", "text.max_length"],
            format!(
                "a pass of {} packed tokens cannot hold a pair of two replies within {} each; take at least {}",
                training.max_tokens,
                text.max_length,
                2 * text.max_length
            ),
        );
        for (key, value) in [
            (&["training.learning_rate"] as &'static [_], training.learning_rate),
            (&["training.beta"], training.beta),
            (&["training.rmsprop_epsilon"], training.rmsprop_epsilon),
            (&["training.adamw_epsilon"], training.adamw_epsilon),
            (&["launch.start_timeout"], launch.start_timeout),
            (&["launch.heartbeat"], launch.heartbeat),
            (&["launch.collective_timeout"], launch.collective_timeout),
        ] {
            require(value > 0.0 && value.is_finite(), key, format!("{value} must be above 0"));
        }
        for (key, value) in [
            (&["training.rpo_alpha"] as &'static [_], training.rpo_alpha),
            (&["training.max_grad_norm"], training.max_grad_norm),
            (&["training.weight_decay"], training.weight_decay),
        ] {
            require(
                value >= 0.0 && value.is_finite(),
                key,
                format!("{value} must not be negative"),
            );
        }
        require(
            (0.0..=1.0).contains(&training.warmup_ratio),
            &["training.warmup_ratio"],
            format!("{} is no share; take one from 0 to 1", training.warmup_ratio),
        );
        for (key, value) in [
            (&["training.rmsprop_alpha"] as &'static [_], training.rmsprop_alpha),
            (&["training.adamw_beta1"], training.adamw_beta1),
            (&["training.adamw_beta2"], training.adamw_beta2),
        ] {
            require((0.0..1.0).contains(&value), key, format!("{value} is outside [0, 1)"));
        }
        require(
            training.weight_decay == 0.0 || training.optimizer == OptimizerChoice::AdamW,
            &["training.weight_decay", "training.optimizer"],
            "weight decay is AdamW's; take \"adamw\", or leave it at 0".into(),
        );
        require(
            (0.0..0.5).contains(&training.label_smoothing),
            &["training.label_smoothing"],
            format!(
                "{} is outside [0, 0.5): with half of them flipped, labels say nothing",
                training.label_smoothing
            ),
        );
        require(
            training.label_smoothing == 0.0 || training.loss == Loss::Robust,
            &["training.label_smoothing", "training.loss"],
            "labels are smoothed by the loss \"robust\" alone; take it, or leave it at 0".into(),
        );
        require(
            training.signal_threshold > 0.0 && training.signal_threshold < 1.0,
            &["training.signal_threshold"],
            format!("{} is outside (0, 1), where σ(−s) lies", training.signal_threshold),
        );
        require(
            training.activation_budget.0 > 0 || training.recompute != Recompute::Auto,
            &["training.activation_budget", "training.recompute"],
            "\"auto\" needs a budget above 0; with none, take \"all\"".into(),
        );
        require(
            launch.heartbeat_deadline > 2.0 * launch.heartbeat,
            &["launch.heartbeat_deadline", "launch.heartbeat"],
            format!(
                "a deadline of {} s is missed by one late heartbeat; take more than twice {} s",
                launch.heartbeat_deadline, launch.heartbeat
            ),
        );
        require(
            launch.listen.parse::<SocketAddr>().is_ok(),
            &["launch.listen"],
            format!("{:?} is no address; write IP:PORT, port 0 for any", launch.listen),
        );
        require(
            launch.advertise.is_empty() || ServerName::try_from(launch.advertise.as_str()).is_ok(),
            &["launch.advertise"],
            format!("{:?} is no host name and no IP; write it without a port", launch.advertise),
        );
        require(
            launch.worker.is_empty() || launch.start != StartWorkers::None,
            &["launch.worker", "launch.start"],
            "with \"none\" no worker is started; take \"local\", or name no program".into(),
        );
        require(
            launch.interface.is_empty() || launch.start != StartWorkers::None,
            &["launch.interface", "launch.start"],
            "with \"none\" no worker is started; give each of them --interface".into(),
        );
        if problems.is_empty() { Ok(()) } else { Err(Problems(problems)) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sound() -> Settings {
        let mut settings = Settings { model: "m".into(), ..Settings::default() };
        settings.corpus.0.push("c".into());
        settings
    }

    #[test]
    fn the_recipe_itself_is_sound() {
        sound().check().unwrap();
    }

    #[test]
    fn errors_across_fields_name_both_and_all_are_told_at_once() {
        let mut settings = sound();
        settings.text.max_prompt_tokens = 4096;
        settings.launch.listen = "0.0.0.0".into();
        let Problems(problems) = settings.check().unwrap_err();
        assert_eq!(problems.len(), 2);
        assert_eq!(problems[0].keys, ["text.max_prompt_tokens", "text.max_length"]);
        assert!(problems[1].message.contains("IP:PORT"));
    }

    #[test]
    fn what_another_choice_would_ignore_is_refused_with_both_names() {
        let keys = |change: fn(&mut Settings)| -> Vec<&'static [&'static str]> {
            let mut settings = sound();
            change(&mut settings);
            let problems = settings.check().err().map_or(Vec::new(), |Problems(all)| all);
            problems.into_iter().map(|problem| problem.keys).collect()
        };
        let smoothed = ["training.label_smoothing", "training.loss"];
        assert_eq!(keys(|s| s.training.label_smoothing = 0.1), [smoothed]);
        assert_eq!(
            keys(|s| {
                s.training.loss = Loss::Robust;
                s.training.label_smoothing = 0.5;
            }),
            [["training.label_smoothing"]]
        );
        assert!(
            keys(|s| {
                s.training.loss = Loss::Robust;
                s.training.label_smoothing = 0.499;
            })
            .is_empty()
        );
        let unguided: fn(&mut Settings) = |s| {
            s.method = Method::IterDpo;
            s.sampling.guidance = Guidance::Off;
        };
        assert_eq!(keys(unguided), [["reward.model", "sampling.guidance"]]);
        assert!(
            keys(|s| {
                s.method = Method::IterDpo;
                s.sampling.guidance = Guidance::Off;
                s.reward.model = "r".into();
            })
            .is_empty()
        );
        assert_eq!(keys(|s| s.reward.model = "r".into()), [["reward.model", "method"]]);
        assert_eq!(keys(|s| s.reward.batch = 0), [["reward.batch"]]);
        let decayed = ["training.weight_decay", "training.optimizer"];
        assert_eq!(keys(|s| s.training.weight_decay = 0.01), [decayed]);
        let empty: fn(&mut Settings) = |s| s.sampling.stop_strings = vec!["###".into(), "".into()];
        assert_eq!(keys(empty), [["sampling.stop_strings"]]);
        let budget = ["training.activation_budget", "training.recompute"];
        let no_budget: fn(&mut Settings) = |s| {
            s.training.recompute = Recompute::Auto;
            s.training.activation_budget = crate::config::ByteSize(0);
        };
        assert_eq!(keys(no_budget), [budget]);
        assert_eq!(keys(|s| s.training.signal_threshold = 1.0), [["training.signal_threshold"]]);
        let unused: fn(&mut Settings) = |s| {
            s.launch.start = StartWorkers::None;
            s.launch.worker = "/bin/worker".into();
        };
        assert_eq!(keys(unused), [["launch.worker", "launch.start"]]);
        assert_eq!(keys(|s| s.launch.advertise = "node7:7000".into()), [["launch.advertise"]]);
        assert!(keys(|s| s.launch.advertise = "node7".into()).is_empty());
    }
}
