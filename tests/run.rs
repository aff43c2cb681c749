//! Real coordinators and workers: real data, starts, refusals.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::demo::answers_as_in_transformers;
use crate::support::{
    coordinator, data, demo_model, ended, first_steps_are_ln_2, metrics, program, resume, short,
    signalled_at, succeeds,
};

/// The binary of the demo on dialogues that users of the project bring.
#[test]
fn public_dialogues_train_through_two_iterations() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let corpus = data("sat_dsat_annotation.json");
    let seeds = data("wildfeedback.json");
    let began = Instant::now();
    let ended = succeeds({
        let mut command = coordinator(&["--workers", "2", "--run-dir", run.to_str().unwrap()]);
        command.args(["--model", demo_model().to_str().unwrap()]);
        command.args(["--corpus", corpus.to_str().unwrap(), "--seeds", seeds.to_str().unwrap()]);
        for setting in [
            "data.limit=64",
            "data.seed_limit=24",
            "text.max_length=192",
            "text.max_prompt_tokens=128",
            "sampling.max_prompt_tokens=192",
            "sampling.max_new_tokens=24",
            "training.warm_start_epochs=1",
        ] {
            command.args(["--set", setting]);
        }
        command
    });
    eprintln!("{} s\n{}", began.elapsed().as_secs(), ended.stdout);
    first_steps_are_ln_2(&run, 2);
    for k in [1, 2] {
        let pairs = run.join(format!("iterations/{k:02}/pairs.parquet"));
        let rows = drift_coordinator::store::pairs::read_pairs(&pairs).unwrap();
        assert!(rows.len() >= 56, "iteration {k}: {} of 64 samples made pairs", rows.len());
        assert!(rows.iter().any(|row| row.held_out) && rows.iter().any(|row| !row.held_out));
    }
    answers_as_in_transformers(&run.join("iterations/02/checkpoint"), "bfloat16");
}

/// Begun with two workers, stopped after the warm start; one goes on, and is
/// stopped when it has scored; then two again. What it scored is scored anew, since
/// only the very same numbers give a first loss of ln 2, and the batch stays.
#[test]
fn a_run_goes_on_with_fewer_and_with_more_workers() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let with = |workers: &str| {
        let mut command = resume(&run);
        command.args(["--workers", workers]);
        command
    };
    for (command, line, workers) in [
        (short(&run, "2"), " committed iteration=0 phase=published", "workers=2"),
        (with("1"), " committed iteration=1 phase=scored", "workers=1"),
    ] {
        let ended = signalled_at(command, line, "TERM").expect(line);
        assert_eq!(ended.code, Some(143), "{}", ended.stderr);
        assert!(ended.stderr.contains(workers), "{workers} is not in: {}", ended.stderr);
    }
    let last = succeeds(with("2"));
    assert!(last.stderr.contains(" committed iteration=1 phase=scored"), "{}", last.stderr);
    assert!(last.stdout.contains("2 workers"), "{}", last.stdout);
    first_steps_are_ln_2(&run, 1);
    for k in [0, 1] {
        let steps: Vec<_> =
            metrics(&run, k).into_iter().filter(|row| row.get("loss").is_some()).collect();
        let pairs = drift_coordinator::store::pairs::read_pairs(
            &run.join(format!("iterations/{k:02}/pairs.parquet")),
        );
        let trained = pairs.unwrap().iter().filter(|pair| !pair.held_out).count();
        let in_first = steps[0]["pairs"].as_array().unwrap().len();
        assert_eq!(in_first, trained.min(8), "four pairs for each of two workers");
    }
}

/// Runs that cannot begin say which file or setting is wrong and what to do, and
/// leave no directory behind.
#[test]
fn what_cannot_begin_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let model = demo_model();
    let refused = |args: &[&str], run: &Path, code: i32, words: &[&str]| {
        let mut command = coordinator(&["--workers", "1", "--run-dir", run.to_str().unwrap()]);
        let ended = ended({
            command.args(args);
            command
        });
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{word:?} is not in: {}", ended.stderr);
        }
    };
    let run = path("run");

    refused(&["--model", "/no/such/model"], &run, 1, &["/no/such/model", "no such folder"]);
    refused(&["--set", "training.bta=1"], &run, 2, &["bta", "README"]);
    refused(&["--set", "launch.listen=0.0.0.0"], &run, 2, &["launch.listen", "IP:PORT"]);

    let mute = path("mute");
    std::fs::create_dir(&mute).unwrap();
    for file in std::fs::read_dir(&model).unwrap().flatten() {
        std::fs::copy(file.path(), mute.join(file.file_name())).unwrap();
    }
    let config = mute.join("tokenizer_config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("chat_template");
    std::fs::write(&config, json.to_string()).unwrap();
    let _ = std::fs::remove_file(mute.join("chat_template.jinja"));
    let mute_words = &["chat template", "mute", "text.chat_template"];
    refused(&["--model", mute.to_str().unwrap()], &run, 1, mute_words);

    let content = path("content.jsonl");
    std::fs::write(
        &content,
        r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"},{"role":"user","content":"Thanks!","label":"sat"}]}"#,
    )
    .unwrap();
    let contented = ["--corpus", content.to_str().unwrap(), "--model", model.to_str().unwrap()];
    refused(&contented, &run, 1, &["no DSAT turn", "content.jsonl"]);
    refused(&contented[..2], &run, 2, &["model: name a model folder"]);
    assert!(!run.exists(), "a refused run leaves nothing behind");

    refused(&[], Path::new("/proc/run"), 1, &["/proc/run"]);
    // A worker that dies at its start shows its last words.
    let script = path("worker.sh");
    std::fs::write(&script, "#!/bin/sh\necho 'no GPU, no luck' >&2\nexit 3\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    let dead = format!("launch.worker={}", script.display());
    let words = &["worker 0 did not start", "exit status: 3", "no GPU, no luck", "--resume"];
    refused(&["--set", &dead], &path("dead"), 1, words);
    refused(&[], &path("dead"), 1, &["holds a run already", "--resume"]);
    let missing = path("nothing");
    let ended = ended(coordinator(&["--run-dir", missing.to_str().unwrap(), "--resume"]));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("no run in"), "{}", ended.stderr);
}

/// Weights that a copy cut short are told of by name, and not loaded.
#[test]
fn truncated_weights_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(demo_model()).unwrap().flatten() {
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let weights = model.join("model.safetensors");
    let length = std::fs::metadata(&weights).unwrap().len();
    std::fs::File::options().write(true).open(&weights).unwrap().set_len(length / 2).unwrap();
    let ended = ended(coordinator(&[
        "--workers",
        "2",
        "--run-dir",
        run.to_str().unwrap(),
        "--model",
        model.to_str().unwrap(),
    ]));
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("model.safetensors"), "{}", ended.stderr);
}

/// A process that does not hold the run's token gets nothing, and the run goes on.
#[test]
fn a_stranger_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let command = coordinator(&["--workers", "1", "--run-dir", run.to_str().unwrap()]);
    let stranger = std::cell::RefCell::new(None);
    let ended = with_address(command, |address| {
        let worker = Command::new(program("worker"))
            .args(["--coordinator", address, "--slot", "0", "--device", "cpu"])
            .env("DRIFT_JOIN_TOKEN", "0".repeat(64))
            .output()
            .unwrap();
        *stranger.borrow_mut() = Some(worker);
    });
    let stranger = stranger.into_inner().expect("the coordinator told its address");
    assert_eq!(stranger.status.code(), Some(1));
    let words = String::from_utf8_lossy(&stranger.stderr).into_owned();
    assert!(words.contains("refused this worker: refused"), "{words}");
    assert!(!words.contains("protocol"), "it is told nothing else: {words}");
    assert_eq!(ended, Some(143), "the run itself was going on until it was stopped");
}

/// Starts a coordinator, gives its address to `visit`, stops it, returns its status.
fn with_address(mut command: Command, visit: impl FnOnce(&str)) -> Option<i32> {
    use std::io::{BufRead, BufReader};
    let mut child = command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut visit = Some(visit);
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(address) = line.split("address=").nth(1)
            && let Some(visit) = visit.take()
        {
            visit(&format!("http://{}", address.split_whitespace().next().unwrap()));
            let pid = child.id().to_string();
            assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
        }
    }
    child.wait().unwrap().code()
}

/// The program that runs on login nodes starts at once and has no libtorch in it.
#[test]
fn the_coordinator_is_light() {
    let program = program("coordinator");
    let linked = Command::new("ldd").arg(&program).output().unwrap();
    let linked = String::from_utf8_lossy(&linked.stdout).into_owned();
    assert!(linked.contains("libc.so"), "{linked}");
    assert!(!linked.contains("torch") && !linked.contains("c10"), "{linked}");
    let fastest = (0..10)
        .map(|_| {
            let began = Instant::now();
            succeeds(coordinator(&["--help"]));
            began.elapsed()
        })
        .min()
        .unwrap();
    eprintln!("--help: {fastest:?}");
    assert!(fastest < Duration::from_millis(50), "{fastest:?}");
}

/// The settings that `--print-config` shows give themselves again.
#[test]
fn printed_settings_are_settings() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("printed.toml");
    let first = succeeds(coordinator(&["--print-config", "--set", "training.beta=0.25"])).stdout;
    std::fs::write(&file, &first).unwrap();
    let second =
        succeeds(coordinator(&["--print-config", "--config", file.to_str().unwrap()])).stdout;
    assert_eq!(first, second);
    assert!(first.contains("beta = 0.25"), "{first}");
    // Nothing was started: no line of a run is in its log.
    assert!(signalled_at(coordinator(&["--print-config"]), "new run", "TERM").is_none());
}
