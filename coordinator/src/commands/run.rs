//! `coordinator`: start a run, or go on with one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result, bail};
use drift_proto::watch::serve;
use sha2::{Digest, Sha256};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::model::Named;
use super::reading::ReadingBar;
use crate::cli::{RunArguments, SettingsArguments};
use crate::config::{Base, ConfigError, Layers, Settings};
use crate::hub::DatasetFile;
use crate::run::driver::{Prepared, Session, Stop, Watch, drive, prepare, salvage, summarise};
use crate::run::machine::Outcome;
use crate::store::journal::torn_at;
use crate::store::manifest::hex;
use crate::store::publish::write_file;
use crate::store::{FileEntry, Journal, RunDir, RunMeta, names};
use crate::ui::Progress;
use crate::ui::logging::{self, LogFile};
use crate::ui::summary::{Glyphs, render};

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The run finished, or there was nothing to run.
    Finished,
    /// It failed; the error is told.
    Failed,
    /// A signal stopped it; this is its number.
    Stopped(i32),
}

/// Runs what the arguments say.
///
/// # Errors
/// What keeps a run from beginning. What ends it later is told, and in [`Exit`].
pub fn run(arguments: &RunArguments) -> Result<Exit> {
    let arguments = &arguments.settled();
    let mut settings = if arguments.resume {
        let dir = arguments.run_dir.as_deref().context("--resume needs --run-dir")?;
        frozen(dir, arguments)?
    } else {
        let layers = Layers {
            base: base(&arguments.settings)?,
            overrides: arguments.overrides(),
            ignore_environment: false,
        };
        layers.load()?
    };
    match &arguments.run_dir {
        Some(dir) if arguments.resume => settings.check().with_context(|| {
            let path = dir.join(names::CONFIG);
            format!("{}: not the settings that the run began with; restore it", path.display())
        })?,
        _ => settings.check()?,
    }
    // A run that goes on keeps its settings, and its batches with them.
    let workers =
        arguments.settings.workers.filter(|_| arguments.resume).unwrap_or(settings.workers);
    Settings { workers, ..settings.clone() }.check()?;
    if arguments.print_config {
        print(&settings.to_toml()?)?;
        return Ok(Exit::Finished);
    }
    let progress = Progress::stderr();
    let log = logging::init(&progress, settings.run.log_format, &log_filter())?;
    // First of all, so that a large corpus is not read unseen.
    let watch = Arc::new(Watch::new()?);
    if let Some(address) = arguments.metrics {
        let address = serve(address, Arc::clone(&watch) as _)?;
        info!(%address, "show /healthz, /readyz and /metrics");
    }
    let Opened { inputs, run, journal, run_id } = if arguments.resume {
        reopen(&settings, workers, &progress, &log)?
    } else {
        complete(&mut settings, arguments)?;
        begin(&settings, &progress, &log)?
    };
    let session = Session {
        settings,
        workers,
        model_dir: inputs.model_dir,
        prepared: Arc::new(inputs.prepared),
        run,
        journal: journal.into(),
        run_id,
        progress,
        watch,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let (outcome, mut session, signal) = runtime.block_on(watched(session))?;
    let dir = session.run.root().display().to_string();
    match outcome {
        Outcome::Finished => {
            let summary = summarise(&mut session)?;
            let json = summary.to_json()?;
            write_file(&session.run.summary_path(), &json)?;
            session.journal.journal()?.record_file(names::SUMMARY, &FileEntry::of_bytes(&json))?;
            print(&render(&summary, Glyphs::from_environment()))?;
            Ok(Exit::Finished)
        }
        Outcome::Stopped => {
            info!("stopped; go on with: coordinator --run-dir {dir} --resume");
            Ok(Exit::Stopped(signal))
        }
        Outcome::Failed(why) => {
            error!("the run cannot go on: {why}");
            error!(
                "what is committed stands; once mended, go on with: coordinator --run-dir {dir} --resume"
            );
            Ok(Exit::Failed)
        }
    }
}

/// A file that is named; the recipe for whoever brings data; else the demo.
pub(super) fn base(arguments: &SettingsArguments) -> Result<Base, ConfigError> {
    match &arguments.config {
        Some(name) => Base::named(name),
        None if arguments.corpus.is_empty() => Ok(Base::Demo),
        None => Ok(Base::Recipe),
    }
}

/// Drives the session. SIGINT and SIGTERM stop it; SIGUSR1 does once what is under way
/// is saved.
async fn watched(session: Session) -> Result<(Outcome, Session, i32)> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut leave = signal(SignalKind::user_defined1()).context("listen for SIGUSR1")?;
    let (stop, stops) = mpsc::channel(1);
    let last = Arc::new(AtomicI32::new(0));
    let told = Arc::clone(&last);
    tokio::spawn(async move {
        loop {
            let (number, how) = tokio::select! {
                _ = interrupt.recv() => (2, Stop::Now),
                _ = terminate.recv() => (15, Stop::Now),
                _ = leave.recv() => (10, Stop::Soon),
            };
            told.store(number, Ordering::Relaxed);
            if stop.send(how).await.is_err() || how == Stop::Now {
                break;
            }
        }
    });
    let (session, outcome) = drive(session, stops).await?;
    Ok((outcome, session, last.load(Ordering::Relaxed)))
}

/// Settings of the run in `dir`, as it froze them.
fn frozen(dir: &Path, arguments: &RunArguments) -> Result<Settings> {
    let path = dir.join("config.toml");
    if !path.is_file() {
        bail!(
            "no run in {}: config.toml is missing; check --run-dir, or start a new run without --resume",
            dir.display()
        );
    }
    let mut settings = Settings::frozen(&path)?;
    settings.run.dir = dir.display().to_string();
    settings.run.log_steps |= arguments.log_steps;
    Ok(settings)
}

/// Fills in what the run itself decides: its directory, its date, and absolute
/// paths, so that it can go on from any folder.
fn complete(settings: &mut Settings, arguments: &RunArguments) -> Result<()> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    if settings.text.today.is_empty() {
        settings.text.today = now.date().to_string();
    }
    if settings.run.dir.is_empty() {
        let name = match base(&arguments.settings)? {
            Base::Demo => "demo".to_owned(),
            Base::Recipe => "drift".to_owned(),
            Base::Preset(name) => name,
            Base::File(path) => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        };
        settings.run.dir = format!("runs/{name}-{}", now.strftime("%Y%m%d-%H%M%S"));
    }
    // A hub name stays one; a folder is the same from anywhere.
    for model in [&mut settings.model, &mut settings.reward.model] {
        if Path::new(&*model).is_dir() {
            *model = std::path::absolute(&*model)?.display().to_string();
        }
    }
    for name in settings.corpus.0.iter_mut().chain(&mut settings.seeds.0) {
        if name != "demo" && DatasetFile::parse(name)?.is_none() {
            *name = std::path::absolute(&*name)?.display().to_string();
        }
    }
    for path in [&mut settings.text.chat_template, &mut settings.models_dir] {
        if !path.is_empty() {
            *path = std::path::absolute(&*path)?.display().to_string();
        }
    }
    Ok(())
}

/// What a run computes from.
struct Inputs {
    model_dir: PathBuf,
    prepared: Prepared,
}

/// A run's inputs, and what of it is durable.
struct Opened {
    inputs: Inputs,
    run: RunDir,
    journal: Journal,
    run_id: String,
}

/// A new run. Everything that can be refused is refused before its directory exists.
fn begin(settings: &Settings, progress: &Progress, log: &LogFile) -> Result<Opened> {
    let inputs = read(settings, progress)?;
    let run = RunDir::create(Path::new(&settings.run.dir))?;
    log.open(&run.coordinator_log())?;
    let toml = settings.to_toml()?;
    write_file(&run.config_path(), toml.as_bytes())?;
    let run_id = run_id(settings)?;
    let meta = RunMeta {
        run_id: run_id.clone(),
        config_sha256: hex(&Sha256::digest(toml.as_bytes())),
        created_at: jiff::Timestamp::now().as_millisecond() as f64 / 1000.0,
        drift_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let mut journal = Journal::create(&run.journal_path(), &meta)?;
    for counts in &inputs.prepared.counts {
        journal.record_counts(&format!("corpus {}", counts.file), &serde_json::json!(counts))?;
    }
    journal.record_counts(INPUTS, &serde_json::json!(inputs.prepared.fingerprint()))?;
    info!(dir = %run.root().display(), run_id, "new run");
    Ok(Opened { inputs, run, journal, run_id })
}

/// A run that began before.
fn reopen(settings: &Settings, workers: u32, progress: &Progress, log: &LogFile) -> Result<Opened> {
    let run = RunDir::open(Path::new(&settings.run.dir))?;
    log.open(&run.coordinator_log())?;
    let unmerged = run.root().join(names::JOURNAL_LOG);
    if let Some(byte) = torn_at(&unmerged)? {
        warn!(
            file = %unmerged.display(),
            "does not check from byte {byte} on, where it was cut or changed, or its process died as it wrote; what it held behind is done again"
        );
    }
    let (mut journal, meta) = Journal::open(&run.journal_path())?;
    let bytes = std::fs::read(run.config_path()).context("read the frozen config.toml")?;
    if hex(&Sha256::digest(&bytes)) != meta.config_sha256 {
        bail!(
            "{} was changed since the run began; restore it, or start a new run with it by --config",
            run.config_path().display()
        );
    }
    let inputs = read(settings, progress)?;
    let fingerprint = serde_json::json!(inputs.prepared.fingerprint());
    let began_with = journal.counts()?.into_iter().find(|(kind, _)| kind == INPUTS);
    if began_with.is_some_and(|(_, began_with)| began_with != fingerprint) {
        bail!(
            "the corpus or the tokenizer is not what the run began with, and its replies belong to other prompts; restore {} and {}, or start a new run",
            settings.corpus.0.join(", "),
            inputs.model_dir.display()
        );
    }
    info!(dir = %run.root().display(), run_id = meta.run_id, "go on with a run");
    salvage(&run, &mut journal, &meta.run_id, &inputs.prepared, settings, workers, progress)?;
    Ok(Opened { inputs, run, journal, run_id: meta.run_id })
}

/// Journal's name for the fingerprint of a run's inputs.
const INPUTS: &str = "inputs";

/// Finds the model, and reads and tokenises the corpora.
fn read(settings: &Settings, progress: &Progress) -> Result<Inputs> {
    let model_dir = Named::model(settings).find(progress)?;
    let reward = Named::reward(settings);
    let reward_dir = reward.map(|named| named.find(progress)).transpose()?;
    for name in settings.corpus.0.iter().chain(&settings.seeds.0) {
        if let Some(file) = DatasetFile::parse(name)? {
            file.fetch(progress)?;
        }
    }
    let mut bar = ReadingBar::new(progress);
    let prepared =
        prepare(settings, &model_dir, reward_dir.as_deref(), &mut |path, size, bytes| {
            bar.update(path, size, bytes);
        })?;
    bar.close();
    info!(
        method = %prepared.method,
        cases = prepared.cases.len(),
        seeds = prepared.seeds.len(),
        held_out_prompts = prepared.held_out.len(),
        "corpus read"
    );
    Ok(Inputs { model_dir, prepared })
}

/// Which log lines are written: `DRIFT_LOG` in `tracing`'s words, else all from `info` up.
fn log_filter() -> String {
    std::env::var("DRIFT_LOG").unwrap_or_else(|_| "info".to_owned())
}

/// A name that equal runs share, wherever they lie: a hash of the settings that
/// decide their bytes.
fn run_id(settings: &Settings) -> Result<String> {
    let mut same = settings.clone();
    same.run = Default::default();
    same.launch =
        crate::config::LaunchSettings { threads: settings.launch.threads, ..Default::default() };
    same.models_dir = String::new();
    let models = [&mut same.model, &mut same.reward.model];
    for path in same.corpus.0.iter_mut().chain(&mut same.seeds.0).chain(models) {
        *path =
            PathBuf::from(&*path).file_name().unwrap_or_default().to_string_lossy().into_owned();
    }
    Ok(hex(&Sha256::digest(same.to_toml()?.as_bytes()))[..16].to_owned())
}

fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(())
}
