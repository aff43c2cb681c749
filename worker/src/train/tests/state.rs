//! Training state written and read, by as many ranks and by others.

use super::sharded::{ADAMW, dealt, distance, run, settings, values};
use super::*;
use crate::model::SavedFile;

/// Trains on `ranks` ranks from the state in `from`, if any, over `steps`, and
/// saves to `to`. Gives rank 0's weights, in bytes and in fp64.
fn leg(
    model: &Path,
    (ranks, sharding): (u32, Sharding),
    kind: Kind,
    from: Option<&Path>,
    steps: std::ops::Range<u64>,
    to: &Path,
) -> (Vec<u8>, Vec<(String, Tensor)>) {
    let (model, to) = (model.to_path_buf(), to.to_path_buf());
    let from = from.map(Path::to_path_buf);
    let work = move |group: Option<&ProcessGroup>| {
        let mut trainer = trainer(&model, kind);
        trainer.begin(settings(sharding), group).unwrap();
        if let Some(from) = &from {
            trainer.load_state(from).unwrap();
        }
        run(&mut trainer, steps.clone(), group);
        let files = trainer.save_state(&to).unwrap();
        check_files(&files, &to, group);
        (weights(&trainer), values(&trainer))
    };
    match ranks {
        1 => work(None),
        _ => on_ranks(ranks, move |group| work(Some(group))).swap_remove(0),
    }
}

/// One file a rank, whether or not it owns a share.
fn check_files(files: &[SavedFile], dir: &Path, group: Option<&ProcessGroup>) {
    let (rank, ranks) = group.map_or((0, 1), |group| (group.rank(), group.world_size()));
    let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, [format!("training_state-{:05}-of-{ranks:05}.safetensors", rank + 1)]);
    for file in files {
        assert_eq!(file.bytes, fs::metadata(dir.join(&file.name)).unwrap().len());
    }
}

#[test]
fn resuming_equals_going_on() {
    let dir = model();
    for kind in [Kind::BFloat16, Kind::Float] {
        for place in [(1, Sharding::None), (2, Sharding::Zero2), (2, Sharding::None)] {
            let [state, end] = [(); 2].map(|()| tempfile::tempdir().unwrap());
            let (undisturbed, _) = leg(dir.path(), place, kind, None, 0..6, end.path());
            let scrap = tempfile::tempdir().unwrap();
            leg(dir.path(), place, kind, None, 0..3, state.path());
            let (resumed, _) = leg(dir.path(), place, kind, Some(state.path()), 3..6, scrap.path());
            assert!(resumed == undisturbed, "{place:?} {kind:?}");
        }
    }
}

#[test]
fn any_number_of_ranks_reads_what_any_number_wrote() {
    let dir = model();
    let one = (1, Sharding::None);
    let [two, three] = [2, 3].map(|ranks| (ranks, Sharding::Zero2));
    let end = tempfile::tempdir().unwrap();
    let (_, expected) = leg(dir.path(), one, Kind::Float, None, 0..8, end.path());

    let states: Vec<_> = (0..6).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut from = None;
    let route = [one, two, three, one, (2, Sharding::None), (3, Sharding::Zero2)];
    // Two steps at each of the first four; the last two continue the second's.
    for (at, place) in route.into_iter().enumerate().take(4) {
        let steps = at as u64 * 2..at as u64 * 2 + 2;
        let to = states[at].path();
        let (_, reached) = leg(dir.path(), place, Kind::Float, from, steps, to);
        from = Some(to);
        if at == 3 {
            let distance = distance(&reached, &expected);
            assert!(distance < 1e-5, "1 → 2 → 3 → 1: {distance}");
        }
    }
    for (at, place) in route.into_iter().enumerate().skip(4) {
        let from = Some(states[1].path());
        let (_, reached) = leg(dir.path(), place, Kind::Float, from, 4..8, states[at].path());
        let distance = distance(&reached, &expected);
        assert!(distance < 1e-5, "2 → {place:?}: {distance}");
    }
}

#[test]
fn the_state_of_a_step_does_not_depend_on_who_holds_it() {
    let dir = model();
    let [whole, shards, again] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (bytes, _) = leg(dir.path(), (1, Sharding::None), Kind::BFloat16, None, 0..3, whole.path());
    // Through three ranks and back, without a step between.
    let three = (3, Sharding::Zero2);
    let from = Some(whole.path());
    let (passed, _) = leg(dir.path(), three, Kind::BFloat16, from, 3..3, shards.path());
    assert!(passed == bytes);
    let from = Some(shards.path());
    leg(dir.path(), (1, Sharding::Zero2), Kind::BFloat16, from, 3..3, again.path());
    let file = "training_state-00001-of-00001.safetensors";
    let read = |dir: &TempDir| fs::read(dir.path().join(file)).unwrap();
    assert!(read(&whole) == read(&again));
}

/// The state after a step, in three files; and a trainer to load it.
fn three_files(model: &Path) -> (TempDir, Trainer) {
    let state = tempfile::tempdir().unwrap();
    leg(model, (3, Sharding::Zero2), Kind::BFloat16, None, 0..1, state.path());
    (state, begun(model, Kind::BFloat16))
}

fn file(number: u32, count: u32) -> String {
    format!("training_state-{number:05}-of-{count:05}.safetensors")
}

/// Asserts that `trainer` refuses the state in `dir` in words that hold all of
/// `expected`, and is left as it was.
fn assert_refused(trainer: &mut Trainer, dir: &Path, expected: &[&str]) {
    let before = weights(trainer);
    let error = trainer.load_state(dir).unwrap_err();
    assert!(matches!(error, TrainError::State { .. }), "{error}");
    for words in expected {
        assert!(error.to_string().contains(words), "{error}, expected {words:?}");
    }
    assert!(weights(trainer) == before);
}

#[test]
fn a_file_that_is_damaged_is_refused_by_name() {
    let dir = model();
    let (state, mut trainer) = three_files(dir.path());
    let name = file(2, 3);
    let path = state.path().join(&name);
    let sound = fs::read(&path).unwrap();
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = sound.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
        let mut bytes = sound.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    let mut long_header = sound.clone();
    long_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for (bytes, expected) in [
        (sound[..sound.len() - 4].to_vec(), "the file was cut short"),
        (sound[..100].to_vec(), "the header claims"),
        (long_header, "the header claims"),
        (replaced("drift-training-state-2", "drift-training-state-1"), "__metadata__.format"),
        (replaced("\"steps\":\"1\"", "\"steps\":\"2\""), "a state after 2 steps"),
        (replaced("\"steps\":\"1\"", "\"steps\":\"x\""), "expected a number"),
        (replaced("\"square_avg\"", "\"square_agv\""), "__metadata__.moments"),
        (replaced("master.model.norm.weight[", "master.model.norm.height["), "is none of"),
        (
            replaced("master.model.norm.weight[11:22]", "master.model.norm.weight[11:-2]"),
            "a run of",
        ),
        (replaced("master.model.norm.weight[11:22]", "master.model.norm.weight[12:23]"), "nowhere"),
        (replaced("master.model.norm.weight[11:22]", "master.model.norm.weight[10:21]"), "twice"),
        (
            replaced("master.model.norm.weight[11:22]", "master.model.norm.weight[31:42]"),
            "a run of",
        ),
    ] {
        fs::write(&path, bytes).unwrap();
        assert_refused(&mut trainer, state.path(), &[expected]);
        // A gap is told where it ends, in the next file.
        if expected != "nowhere" {
            assert_refused(&mut trainer, state.path(), &[&name]);
        }
    }
    fs::write(&path, sound).unwrap();
    trainer.load_state(state.path()).unwrap();
}

#[test]
fn files_that_do_not_belong_together_are_refused_by_name() {
    let dir = model();
    let (state, mut trainer) = three_files(dir.path());
    let at = |name: String| state.path().join(name);

    fs::rename(at(file(2, 3)), at("aside".to_owned())).unwrap();
    assert_refused(&mut trainer, state.path(), &[&file(2, 3), "missing, of 3 files"]);
    fs::copy(at(file(1, 3)), at(file(2, 3))).unwrap();
    assert_refused(&mut trainer, state.path(), &[&file(2, 3), "twice"]);
    fs::rename(at("aside".to_owned()), at(file(2, 3))).unwrap();

    fs::copy(at(file(1, 3)), at(file(1, 1))).unwrap();
    assert_refused(&mut trainer, state.path(), &["two states in one directory"]);
    fs::remove_file(at(file(1, 1))).unwrap();
    trainer.load_state(state.path()).unwrap();

    let empty = tempfile::tempdir().unwrap();
    assert_refused(&mut trainer, empty.path(), &["no training_state"]);
    let gone = trainer.load_state(&empty.path().join("gone")).unwrap_err();
    assert!(matches!(gone, TrainError::File { action: "list", .. }), "{gone}");
}

#[test]
fn the_state_of_another_model_or_optimiser_is_refused() {
    let dir = model();
    let (state, mut trainer) = three_files(dir.path());
    let mut adamw = SETTINGS;
    adamw.optimizer.algorithm = ADAMW;
    trainer.begin(adamw, None).unwrap();
    assert_refused(&mut trainer, state.path(), &["go on with the optimiser"]);

    let other = model();
    let config = fs::read_to_string(other.path().join("config.json")).unwrap();
    let narrower = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    assert_ne!(config, narrower);
    fs::write(other.path().join("config.json"), narrower).unwrap();
    let weights = other.path().join("model.safetensors");
    let mut tensors = Tensor::read_safetensors(&weights).unwrap();
    tensors.retain(|(name, _)| !name.contains("layers.1"));
    Tensor::write_safetensors(&tensors, &weights).unwrap();
    let mut trainer = begun(other.path(), Kind::BFloat16);
    assert_refused(&mut trainer, state.path(), &["the model that is loaded"]);
    trainer.step(&dealt(0, None), None, &never).unwrap();
}
