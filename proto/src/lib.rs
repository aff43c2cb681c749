//! The contract between coordinator and workers: generated wire types, the
//! protocol's version, the names both sides must agree on, and the endpoints at
//! which both are watched.

pub mod watch;

/// Messages, client and server of package `drift.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("drift.v1");
}

/// Version a worker names in its `Hello`. Raised by any change that an older
/// peer would misread; the coordinator refuses every other version.
pub const PROTOCOL_VERSION: u32 = 5;

/// Environment variable that hands a worker its run's join token. Never a
/// command-line argument: those are public on a shared machine.
pub const JOIN_TOKEN_ENV: &str = "DRIFT_JOIN_TOKEN";

/// Environment variable that names the process which started a worker: the worker
/// ends with it. [`SLURM_LAUNCHER`] where that is on another machine.
pub const LAUNCHER_ENV: &str = "DRIFT_LAUNCHER";

/// Says in [`LAUNCHER_ENV`] that the coordinator started a worker by way of Slurm,
/// which ends it and tells of its end.
pub const SLURM_LAUNCHER: &str = "slurm";

/// Environment variable that names a worker's join folder, as `--join` does.
pub const JOIN_DIR_ENV: &str = "DRIFT_JOIN_DIR";

/// Files of a join folder: all that a worker needs to be let in. The coordinator
/// writes them anew at each of its starts.
pub mod join {
    /// Where the coordinator listens: `https://HOST:PORT`, or `http://` on loopback.
    pub const ADDRESS: &str = "address";
    /// The join token. Secret.
    pub const TOKEN: &str = "token";
    /// Certificate of the run's own authority, in PEM. With TLS only, as the next two.
    pub const AUTHORITY: &str = "ca.pem";
    /// The workers' certificate, in PEM.
    pub const CERTIFICATE: &str = "worker.pem";
    /// Its private key, in PEM. Secret.
    pub const KEY: &str = "worker.key";
}

/// Largest message either side accepts, in bytes. The largest in use is a
/// batch of token ids: about 1 MiB for 32 pairs of 2,048 tokens.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
