//! Settings: embedded default < file < `DRIFT__…` environment < flags; checked, then frozen.

mod check;
mod load;
mod presets;
mod settings;
mod table;
mod types;

pub use check::{ConfigProblem, Problems};
pub use load::{Base, ConfigError, DEMO_CONFIG, DEMO_CORPUS, Layers};
pub use presets::presets;
pub use settings::{
    DataSettings, LaunchSettings, OptionRow, RewardSettings, RunSettings, SamplingSettings,
    Settings, TextSettings, TrainingSettings, options,
};
pub use table::table;
pub use types::{
    ByteSize, DType, DeviceChoice, Guidance, HeldOutSetting, LogFormat, Loss, Method, OneOrMany,
    OptimizerChoice, Overlong, PoisonShard, Recompute, Reference, Schedule, Sharding, StartWorkers,
    Tls,
};
