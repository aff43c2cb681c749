//! Every setting, its default and its sentence, in one place: the structs, the
//! README's table and `--print-config` all come from this file.

use serde::{Deserialize, Serialize};

use super::types::{
    ByteSize, DType, DeviceChoice, Guidance, HeldOutSetting, LogFormat, Loss, Method, OneOrMany,
    OptimizerChoice, Overlong, PoisonShard, Recompute, Reference, Schedule, Sharding, StartWorkers,
    Tls,
};
use crate::text::DEFAULT_INSTRUCTION;

/// One row of the table of options.
#[derive(Debug, Clone, PartialEq)]
pub struct OptionRow {
    /// Dotted key, as in `training.beta`.
    pub key: String,
    /// Default, as TOML writes it.
    pub default: String,
    /// What it does.
    pub what: String,
}

macro_rules! settings {
    (
        $(#[doc = $section_doc:literal])+
        $name:ident($section:literal) {
            $( $(#[doc = $doc:literal])+ $field:ident: $ty:ty = $default:expr; )*
            $( table $table:ident: $table_ty:ident; )*
        }
    ) => {
        $(#[doc = $section_doc])+
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $ty, )*
            $(
                #[doc = concat!("Table `[", stringify!($table), "]`.")]
                pub $table: $table_ty,
            )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )* $( $table: $table_ty::default(), )* }
            }
        }

        impl $name {
            fn rows(rows: &mut Vec<OptionRow>) {
                let defaults = Self::default();
                $(
                    rows.push(OptionRow {
                        key: if $section.is_empty() {
                            stringify!($field).to_owned()
                        } else {
                            concat!($section, ".", stringify!($field)).to_owned()
                        },
                        default: in_toml(&defaults.$field),
                        what: [$($doc),+].map(str::trim).join(" "),
                    });
                )*
                $( $table_ty::rows(rows); )*
            }
        }
    };
}

settings! {
    /// Where samples come from and what is kept of them.
    DataSettings("data") {
        /// Shape of the corpus files: `auto` tells by content; else `utterances`
        /// (WildFeedback's annotation), `dsat`, `pairs` (WildFeedback's pairs,
        /// UltraFeedback) or `messages` (own conversations, WildChat).
        format: String = "auto".to_owned();
        /// Share of malformed records above which a file is refused.
        max_malformed: f64 = 0.01;
        /// Use at most this many of what the method trains on (DSAT turns, SAT turns,
        /// or pairs), by a seeded draw (0: all).
        limit: usize = 0;
        /// Use at most this many seed pairs, by a seeded draw (0: all).
        seed_limit: usize = 0;
        /// Prompts held out of training for evaluation, of the seed pairs and of what
        /// the method trains on each: a count (`100`) or a share (`0.05`); a fifth of
        /// them at most.
        held_out: HeldOutSetting = HeldOutSetting::Pairs(100);
    }
}

settings! {
    /// How conversations become token ids.
    TextSettings("text") {
        /// File with a Jinja chat template, in place of the model's own.
        chat_template: String = String::new();
        /// Date that templates see as today (`YYYY-MM-DD`; empty: the day the run
        /// was created). Frozen with the run, so that resuming changes no byte.
        today: String = String::new();
        /// Appended to the dissatisfied turn of a guided prompt.
        instruction: String = DEFAULT_INSTRUCTION.to_owned();
        /// Tokens of a prompt and one reply together; replies are cut at the end.
        max_length: usize = 2048;
        /// Tokens of a training prompt; the end is kept.
        max_prompt_tokens: usize = 1024;
        /// What becomes of a pair that is longer: `cut`, as the recipe has it, or
        /// `drop`, which leaves it out and counts it.
        overlong: Overlong = Overlong::Cut;
    }
}

settings! {
    /// How fresh replies are drawn.
    SamplingSettings("sampling") {
        /// Softmax temperature; 0 is greedy.
        temperature: f64 = 0.7;
        /// Smallest set of tokens with at least this probability; 1 keeps all.
        top_p: f64 = 0.9;
        /// Most probable tokens that are drawn from, by number; 0 keeps all.
        top_k: u32 = 0;
        /// Least probability of a token that is drawn from, as a share of the most
        /// probable one's; 0 keeps all.
        min_p: f64 = 0.0;
        /// Makes tokens that prompt or reply have less likely, as in transformers; 1
        /// does nothing.
        repetition_penalty: f64 = 1.0;
        /// Tokens a reply has before it may end.
        min_new_tokens: u32 = 0;
        /// Texts that end a reply, which is cut ahead of the first of them. Tokens behind it
        /// are drawn and thrown away: workers see no text.
        stop_strings: Vec<String> = Vec::new();
        /// Tokens of a reply at most.
        max_new_tokens: u32 = 512;
        /// Tokens of a sampling prompt; the end is kept.
        max_prompt_tokens: usize = 2048;
        /// `on`: sample from the whole conversation with the complaint and the
        /// instruction; `off`: from the bare prompt. SPIN and corpora of pairs, which
        /// hold no complaints, take the bare prompt always.
        guidance: Guidance = Guidance::On;
        /// Prompts that are handed to a worker together, each with all its samples, and
        /// recorded together, at most.
        shard_prompts: usize = 64;
        /// Replies that a worker has in the making at once, at most.
        max_rows: u32 = 64;
        /// Bytes that the keys and values of these may take on each worker.
        cache_budget: ByteSize = ByteSize(8 << 30);
        /// Whether a reply's next tokens are guessed, by what followed the last ones
        /// before, where a guess costs next to nothing. It changes no token.
        drafting: bool = true;
    }
}

settings! {
    /// What tells the better of two samples.
    RewardSettings("reward") {
        /// Reward model, a folder or a name on the hub, which rates samples of `iter-dpo`
        /// where no complaint guides one of them: in a corpus of pairs, and with
        /// `sampling.guidance = "off"`. A DeBERTa-v2, or any decoder for sequence
        /// classification with one label.
        model: String = String::new();
        /// Tokens that it reads of a prompt and a reply; 0: as many as it has positions.
        max_length: usize = 0;
        /// Samples that are handed to a worker together, those of like length.
        batch: usize = 16;
        /// Its compute type. `bf16` halves its memory, and rates more replies alike.
        dtype: DType = DType::F32;
    }
}

settings! {
    /// The recipe: defaults are the paper's published ones.
    TrainingSettings("training") {
        /// Iterations after the warm start (K).
        iterations: u32 = 2;
        /// Epochs over the seed pairs in the warm start; 0 skips it.
        warm_start_epochs: u32 = 3;
        /// Epochs over each iteration's pairs.
        epochs: u32 = 1;
        /// Iterations whose samples an iteration's pairs are made of: 1, its own; 2, those
        /// of the iteration before it too, as SPIN's authors do.
        pair_iterations: u32 = 1;
        /// Pairs of one optimiser step for each worker that the run begins with; the
        /// step's pairs are dealt out so that workers have like work.
        pairs_per_worker: usize = 4;
        /// Packed tokens of one forward and backward pass at most; a worker's
        /// heavier share is split into several passes with the same gradient.
        max_tokens: usize = 16384;
        /// Peak learning rate.
        learning_rate: f64 = 5e-7;
        /// Share of an iteration's steps over which the learning rate rises.
        warmup_ratio: f64 = 0.1;
        /// `linear`, `cosine` or `constant` after the warm-up.
        schedule: Schedule = Schedule::Linear;
        /// Bound on the global gradient norm; 0 leaves it unbounded.
        max_grad_norm: f64 = 1.0;
        /// How a pair's margin becomes its loss, by TRL's names: `sigmoid` (DPO),
        /// `hinge` (SLiC), `ipo`, `robust` (DPO for labels of which
        /// `training.label_smoothing` are flipped), `sigmoid_norm` (DPO by means
        /// over tokens).
        loss: Loss = Loss::Sigmoid;
        /// DPO's β; IPO's τ.
        beta: f64 = 0.1;
        /// Share of preferences taken to be the wrong way round, from 0 to below
        /// 0.5; for `training.loss = "robust"` alone.
        label_smoothing: f64 = 0.0;
        /// Weight of the chosen replies' negative log-likelihood, a mean over the
        /// chosen tokens of a worker's share of the step (RPO; the authors' files
        /// use 0.001).
        rpo_alpha: f64 = 0.0;
        /// π_ref: `iteration` is the policy at the iteration's start, `initial`
        /// the model the run began with.
        reference: Reference = Reference::Iteration;
        /// τ of the learning signal: a pair counts in `signal/p0` where σ(−s) is at
        /// least this, s being its margin.
        signal_threshold: f64 = 0.1;
        /// `rmsprop` (the recipe) or `adamw`, as PyTorch has them.
        optimizer: OptimizerChoice = OptimizerChoice::RmsProp;
        /// RMSprop's smoothing constant.
        rmsprop_alpha: f64 = 0.99;
        /// RMSprop's ε.
        rmsprop_epsilon: f64 = 1e-8;
        /// AdamW's smoothing constant of the gradient's mean.
        adamw_beta1: f64 = 0.9;
        /// AdamW's smoothing constant of the squared gradient's mean.
        adamw_beta2: f64 = 0.999;
        /// AdamW's ε.
        adamw_epsilon: f64 = 1e-8;
        /// AdamW's weight decay, which norms and biases are spared; RMSprop has none.
        weight_decay: f64 = 0.0;
        /// Compute and checkpoint type: `bf16` or `f32`. Masters are always f32.
        dtype: DType = DType::Bf16;
        /// In what type gradients are summed over workers: `f32`, or `bf16` for
        /// half the traffic.
        reduce_dtype: DType = DType::F32;
        /// `none`: every worker holds all gradients, masters and optimiser state;
        /// `zero2`: each holds its share of them.
        sharding: Sharding = Sharding::None;
        /// What is computed again in backward instead of being kept: `none`, `all`
        /// (a block keeps its input alone), `auto` (as many blocks keep everything
        /// as `training.activation_budget` allows).
        recompute: Recompute = Recompute::None;
        /// Bytes that the activations of one pass may take on each worker, for
        /// `training.recompute = "auto"`.
        activation_budget: ByteSize = ByteSize::gib(8);
    }
}

settings! {
    /// How workers are started and watched.
    LaunchSettings("launch") {
        /// Who starts the workers: `local`, the coordinator, on its own machine; `slurm`,
        /// the coordinator, on all nodes of the Slurm job it runs in; `none`, somebody
        /// else: it waits for `workers` of them, which the run directory's `join/` lets in.
        start: StartWorkers = StartWorkers::Local;
        /// Worker program; empty: `worker` beside the coordinator, then on PATH.
        worker: String = String::new();
        /// `auto`, `cpu` or `cuda`. `cuda` gives worker N of a machine GPU N, and takes
        /// a worker built with `--features cuda`; `auto` does so where there is such a
        /// GPU, and computes on the CPU elsewhere.
        device: DeviceChoice = DeviceChoice::Auto;
        /// Threads of each worker on CPU (0: cores ÷ workers).
        threads: usize = 0;
        /// Address the coordinator listens on, as IP:PORT; port 0 is any that is free.
        /// Off loopback the wire has TLS, with certificates on both sides.
        listen: String = "127.0.0.1:0".to_owned();
        /// Name or IP by which workers reach the coordinator; empty: the IP in
        /// `launch.listen`, or the machine's name where that is `0.0.0.0` or `[::]`.
        advertise: String = String::new();
        /// Interface (`eth1`) or address of each worker's machine on which it exchanges
        /// gradients with the others, where the coordinator starts it; empty: the one
        /// that leads to the coordinator.
        interface: String = String::new();
        /// `auto`: TLS on every address but loopback; `always`: there too.
        tls: Tls = Tls::Auto;
        /// Seconds that workers have to start and attach, or to join.
        start_timeout: f64 = 120.0;
        /// Seconds between a worker's heartbeats.
        heartbeat: f64 = 1.0;
        /// Seconds of silence after which a worker counts as lost. A stream that
        /// closes counts at once.
        heartbeat_deadline: f64 = 5.0;
        /// Lost workers, or failed commands, that the run bears before it makes
        /// progress again. Each is made good: the worker is started anew, and what is
        /// lost with it computed again.
        max_losses: u32 = 10;
        /// Workers that may be lost over one shard of prompts.
        shard_tries: u32 = 3;
        /// What follows then: `stop`, or `skip`, which leaves its prompts out of the
        /// iteration and says so.
        poison_shard: PoisonShard = PoisonShard::Stop;
        /// Seconds that forming the process group, or an operation of it, may take.
        collective_timeout: f64 = 600.0;
    }
}

settings! {
    /// Where the run lives and how it talks.
    RunSettings("run") {
        /// Run directory; empty: `runs/NAME-DATE`, where NAME is the settings
        /// file's, `drift` without one, or `demo`.
        dir: String = String::new();
        /// The coordinator's log lines as `text` or `json`.
        log_format: LogFormat = LogFormat::Text;
        /// One line per training step.
        log_steps: bool = false;
        /// Steps after which training state is saved inside an epoch (0: never for
        /// their sake). It is written beside the next steps; what a lost worker costs
        /// is the steps since.
        snapshot_steps: u32 = 0;
        /// Minutes after which it is saved, whichever comes first (0: never for
        /// their sake).
        snapshot_minutes: f64 = 10.0;
    }
}

settings! {
    /// The whole configuration. Keys outside a table come first in TOML.
    Settings("") {
        /// Model to train: a folder in Hugging Face format, or a name on the hub
        /// such as `Qwen/Qwen2.5-7B-Instruct`.
        model: String = String::new();
        /// Folder searched for a named model before the hub is asked.
        models_dir: String = ".cache/models".to_owned();
        /// Files with the conversations, one path or a list. `demo` is the
        /// corpus built into the program.
        corpus: OneOrMany = OneOrMany::default();
        /// Files with seed pairs for the warm start; empty: those found in the corpus.
        seeds: OneOrMany = OneOrMany::default();
        /// What is sampled, and what becomes chosen and rejected: `drift`, `spin` or
        /// `iter-dpo`.
        method: Method = Method::Drift;
        /// Seed of every draw.
        seed: u64 = 42;
        /// Worker processes; each holds the whole model. With `pairs_per_worker` it
        /// makes the batch of a step, which stays when a run goes on with others.
        workers: u32 = 1;
        table data: DataSettings;
        table text: TextSettings;
        table sampling: SamplingSettings;
        table reward: RewardSettings;
        table training: TrainingSettings;
        table launch: LaunchSettings;
        table run: RunSettings;
    }
}

/// Every option in the order of the file.
pub fn options() -> Vec<OptionRow> {
    let mut rows = Vec::new();
    Settings::rows(&mut rows);
    rows
}

/// A value as a person would write it in the file.
fn in_toml<T: Serialize>(value: &T) -> String {
    match toml::Value::try_from(value) {
        Ok(value) => value.to_string(),
        Err(_) => String::new(),
    }
}
