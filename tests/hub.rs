//! Models and corpora by their names on the hub, from a local server that speaks its
//! endpoints: downloads, cut connections, tokens, and what is not there.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::support::{demo_model, ended, python, root, small, small_model, succeeds};

const TOKEN: &str = "hf_letmein";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a hub has, and what befell it.
#[derive(Default)]
struct Shelf {
    /// By `OWNER/NAME/FILE`, data sets behind `datasets/`.
    files: BTreeMap<String, Vec<u8>>,
    /// Whether it wants the token.
    is_gated: bool,
    /// How often a file's transfer is still to be cut in the middle.
    cuts: usize,
    /// Path and `Range` of each request.
    requests: Vec<(String, String)>,
}

/// A server; it ends with the test's process.
struct Hub {
    address: String,
    shelf: Arc<Mutex<Shelf>>,
}

impl Hub {
    fn start(shelf: Shelf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let shelf = Arc::new(Mutex::new(shelf));
        let shared = Arc::clone(&shelf);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shelf = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream, &shelf));
            }
        });
        Self { address, shelf }
    }

    fn change(&self, change: impl FnOnce(&mut Shelf)) {
        change(&mut self.shelf.lock().unwrap());
    }

    /// Requests of a file's bytes, from where on.
    fn ranges(&self, file: &str) -> Vec<String> {
        let shelf = self.shelf.lock().unwrap();
        let of = shelf.requests.iter().filter(|(path, _)| path.ends_with(file));
        of.map(|(_, range)| range.clone()).filter(|range| range != "bytes=0-0").collect()
    }
}

/// One request a connection, as a plain HTTP/1.1 server answers it.
fn serve(mut stream: TcpStream, shelf: &Mutex<Shelf>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
    let headers: BTreeMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        })
        .collect();
    let range = headers.get("range").cloned().unwrap_or_default();
    let mut shelf = shelf.lock().unwrap();
    shelf.requests.push((path.clone(), range.clone()));
    let mut plain = |status: &str, body: &str| {
        let length = body.len();
        let _ = write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
    };
    let expected = format!("Bearer {TOKEN}");
    if shelf.is_gated && headers.get("authorization") != Some(&expected) {
        return plain("401 Unauthorized", "");
    }
    if let Some(repo) = path.strip_prefix("api/models/") {
        let repo = repo.split("/revision/").next().unwrap();
        let names = shelf.files.keys().filter_map(|file| file.strip_prefix(repo));
        let files: Vec<_> = names
            .map(|name| serde_json::json!({ "rfilename": name.trim_start_matches('/') }))
            .collect();
        if files.is_empty() {
            return plain("404 Not Found", "");
        }
        let listed = serde_json::json!({ "siblings": files, "sha": COMMIT });
        return plain("200 OK", &listed.to_string());
    }
    let Some(bytes) = shelf.files.get(&path.replace("/resolve/main", "")).cloned() else {
        return plain("404 Not Found", "");
    };
    let mut bounds = range.trim_start_matches("bytes=").split('-');
    let first: usize = bounds.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let last = bounds.next().and_then(|n| n.parse().ok()).unwrap_or(bytes.len() - 1);
    if first >= bytes.len() {
        return plain("416 Range Not Satisfiable", "");
    }
    let part = &bytes[first..=last.min(bytes.len() - 1)];
    let _ = write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\n\
         ETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
        part.len(),
        bytes.len(),
        etag(&path),
    );
    let is_cut = shelf.cuts > 0 && part.len() > 100_000;
    shelf.cuts -= usize::from(is_cut);
    drop(shelf);
    let _ = stream.write_all(if is_cut { &part[..part.len() / 3] } else { part });
}

fn etag(path: &str) -> String {
    path.bytes().map(|byte| format!("{byte:02x}")).collect::<String>()[..40].to_owned()
        + &path.len().to_string()
}

fn shelf(folder: &Path) -> Shelf {
    let model = folder.join("small");
    small_model::write(&demo_model(), &model).unwrap();
    let mut shelf = Shelf::default();
    for entry in model.read_dir().unwrap().flatten().filter(|entry| entry.path().is_file()) {
        let name = entry.file_name().into_string().unwrap();
        shelf.files.insert(format!("acme/tiny/{name}"), std::fs::read(entry.path()).unwrap());
    }
    let corpus = std::fs::read(root().join("configs/demo/corpus.json")).unwrap();
    shelf.files.insert("datasets/acme/talks/data/corpus.json".to_owned(), corpus);
    shelf
}

/// A run of what the hub has, with a cache of its own.
fn run_from(hub: &Hub, folder: &Path, run: &str) -> Command {
    let mut command = small(&folder.join(run), "1", Path::new("acme/tiny"));
    command.args(["--corpus", "hf://datasets/acme/talks/data/corpus.json"]);
    command.env("HF_HOME", folder.join("home")).env("HF_ENDPOINT", &hub.address);
    command.env_remove("HF_TOKEN");
    command
}

#[test]
fn a_run_by_names_downloads_and_goes_on_where_a_connection_was_cut() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::start(shelf(folder.path()));
    hub.change(|shelf| shelf.cuts = usize::MAX);
    let cut = ended(run_from(&hub, folder.path(), "run"));
    assert_eq!(cut.code, Some(1), "{}", cut.stderr);
    for word in ["acme/tiny", "download ", "goes on where it was cut"] {
        assert!(cut.stderr.contains(word), "{word:?} is not in: {}", cut.stderr);
    }
    assert!(!folder.path().join("run").exists());

    // One more cut on the way, which the next attempt makes good by itself.
    hub.change(|shelf| {
        shelf.cuts = 1;
        shelf.requests.clear();
    });
    let whole = succeeds(run_from(&hub, folder.path(), "run"));
    assert!(whole.stderr.contains("downloading model.safetensors"), "{}", whole.stderr);
    let requests = hub.shelf.lock().unwrap().requests.clone();
    let resumed = requests.iter().filter(|(_, range)| {
        let from = range.trim_start_matches("bytes=").split('-').next().unwrap();
        from.parse::<u64>().is_ok_and(|from| from > 0)
    });
    assert!(resumed.count() >= 2, "one from the cut run, one from the cut in this: {requests:?}");
    let cached = folder.path().join("home/hub/models--acme--tiny/snapshots").join(COMMIT);
    for file in ["model.safetensors", "tokenizer.json"] {
        let (here, there) = (cached.join(file), folder.path().join("small").join(file));
        assert_eq!(std::fs::read(here).unwrap(), std::fs::read(there).unwrap(), "{file}");
    }

    // Now all of it is in the cache: a hub that is gone is no matter.
    hub.change(|shelf| shelf.requests.clear());
    let mut offline = run_from(&hub, folder.path(), "offline");
    offline.env("HF_ENDPOINT", "http://127.0.0.1:9");
    succeeds(offline);
    assert!(hub.ranges("corpus.json").is_empty());
}

#[test]
fn who_may_not_and_what_is_not_there_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::start(shelf(folder.path()));
    let refused = |mut command: Command, words: &[&str]| {
        command.env("HF_HOME", folder.path().join("empty"));
        let ended = ended(command);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{word:?} is not in: {}", ended.stderr);
        }
        assert!(!folder.path().join("run").exists());
    };
    let run = || run_from(&hub, folder.path(), "run");
    hub.change(|shelf| shelf.is_gated = true);
    refused(run(), &["acme/tiny", "401", "HF_TOKEN"]);
    let mut wrong = run();
    wrong.env("HF_TOKEN", "hf_wrong");
    refused(wrong, &["acme/tiny", "401", "HF_TOKEN"]);

    hub.change(|shelf| {
        shelf.files.remove("datasets/acme/talks/data/corpus.json");
    });
    let mut right = run();
    right.env("HF_TOKEN", TOKEN);
    refused(right, &["hf://datasets/acme/talks/data/corpus.json", "404", "check its name"]);
    let mut nothing = run();
    nothing.env("HF_TOKEN", TOKEN).args(["--set", "model=acme/nothing"]);
    refused(nothing, &["acme/nothing", "404", "check its name"]);
    let mut short = run();
    short.args(["--set", "corpus=hf://datasets/acme"]);
    refused(short, &["hf://datasets/OWNER/NAME/PATH"]);
}

#[test]
fn a_reward_model_comes_from_the_hub_too_and_its_lack_is_told_as_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let judge = folder.path().join("judge");
    let small = folder.path().join("small");
    let mut shelf = shelf(folder.path());
    python("reward_text.py", &["chat", judge.to_str().unwrap(), small.to_str().unwrap()]);
    for entry in judge.read_dir().unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        shelf.files.insert(format!("acme/judge/{name}"), std::fs::read(entry.path()).unwrap());
    }
    let hub = Hub::start(shelf);
    let run = |run: &str, judge: &str| {
        let mut command = run_from(&hub, folder.path(), run);
        for setting in ["method=iter-dpo", "sampling.guidance=off", "launch.start_timeout=60"] {
            command.args(["--set", setting]);
        }
        command.args(["--set", &format!("reward.model={judge}")]);
        command
    };
    let lacks = ended(run("lacks", "acme/nobody"));
    assert_eq!(lacks.code, Some(1), "{}", lacks.stderr);
    for word in ["acme/nobody", "404", "--set reward.model="] {
        assert!(lacks.stderr.contains(word), "{word:?} is not in: {}", lacks.stderr);
    }
    assert!(!folder.path().join("lacks").exists());

    let whole = succeeds(run("run", "acme/judge"));
    assert!(whole.stderr.contains("phase=Rating"), "{}", whole.stderr);
    assert!(!hub.ranges("judge/resolve/main/model.safetensors").is_empty());
}
