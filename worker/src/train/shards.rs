//! Reading a training state that is spread over files: all are checked before a
//! value is taken from any.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use tch::{Kind, Tensor};

use super::error::TrainError;
use super::state::{ELEMENT_BYTES, FORMAT, Identity, Run, file_name};

/// A longer header is not one of ours.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// State passes through host memory in pieces of this many elements.
const PIECE_ELEMENTS: i64 = 4 << 20;

/// What to do about a state that is not whole.
const OTHER_SNAPSHOT: &str = "resume from another snapshot";

/// A whole training state, in files that belong together.
#[derive(Debug)]
pub(super) struct Snapshot {
    files: Vec<StateFile>,
    /// Per tensor, its runs in order: they cover it without gap or overlap.
    tensors: BTreeMap<String, Vec<Stored>>,
    steps: u64,
}

/// A run of a tensor's elements, and where it is stored.
#[derive(Debug)]
struct Stored {
    elements: Range<i64>,
    /// Index of the file.
    file: usize,
    /// First byte in it.
    position: u64,
}

impl Snapshot {
    /// Opens the state in `dir`, which must be of `identity` and consist of the
    /// tensors in `lengths` (name → elements).
    pub(super) fn open(
        dir: &Path,
        identity: &Identity,
        lengths: &BTreeMap<String, i64>,
    ) -> Result<Self, TrainError> {
        let files: Vec<StateFile> =
            find(dir)?.into_iter().map(StateFile::open).collect::<Result<_, _>>()?;
        let steps = files.first().map_or(Ok(0), StateFile::steps)?;
        let mut tensors: BTreeMap<String, Vec<Stored>> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            file.check(identity)?;
            if file.steps()? != steps {
                let of = files[0].path.display();
                return Err(file.refuse(format!(
                    "a state after {} steps, and {of} is one after {steps}; {OTHER_SNAPSHOT}",
                    file.steps()?
                )));
            }
            for (name, info) in file.metadata.tensors() {
                let (tensor, elements) = file.run(&name, info, lengths)?;
                let position = file.data_start + info.data_offsets.0 as u64;
                let stored = Stored { elements, file: index, position };
                tensors.entry(tensor).or_default().push(stored);
            }
        }
        let mut snapshot = Self { files, tensors, steps };
        snapshot.check_whole(dir, lengths)?;
        Ok(snapshot)
    }

    /// Updates done when it was saved.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Copies `run` from the files to its place in memory.
    #[expect(clippy::disallowed_methods, reason = "what was saved is read back")]
    pub(super) fn read(&self, run: &Run) -> Result<(), TrainError> {
        let mut buffer = Vec::new();
        for stored in self.tensors.get(&run.tensor).into_iter().flatten() {
            let end = run.elements.end.min(stored.elements.end);
            let mut at = run.elements.start.max(stored.elements.start);
            while at < end {
                let count = PIECE_ELEMENTS.min(end - at);
                buffer.resize(count as usize * ELEMENT_BYTES, 0);
                let skipped = (at - stored.elements.start) as u64 * ELEMENT_BYTES as u64;
                self.files[stored.file].read(&mut buffer, stored.position + skipped)?;
                let values = Tensor::f_from_data_size(&buffer, &[count], Kind::Float)?;
                let mut place = run.values.f_narrow(0, at - run.elements.start, count)?;
                tch::no_grad(|| place.f_copy_(&values))?;
                at += count;
            }
        }
        Ok(())
    }

    /// Sorts the runs, and checks that they cover each tensor once.
    fn check_whole(
        &mut self,
        dir: &Path,
        lengths: &BTreeMap<String, i64>,
    ) -> Result<(), TrainError> {
        for (name, &length) in lengths {
            let mut covered = 0;
            if let Some(runs) = self.tensors.get_mut(name) {
                runs.sort_by_key(|run| run.elements.start);
                for run in runs.iter() {
                    let Range { start, end } = run.elements;
                    if start != covered {
                        let what = if start < covered { "twice" } else { "nowhere" };
                        let (from, to) = (start.min(covered), start.max(covered));
                        return Err(self.files[run.file].refuse(format!(
                            "tensor {name}: elements {from} to {to} are {what} in the state's \
                             files; {OTHER_SNAPSHOT}"
                        )));
                    }
                    covered = end;
                }
            }
            if covered != length {
                let reason = format!(
                    "tensor {name}: {covered} of {length} elements are in the state's files; \
                     {OTHER_SNAPSHOT}"
                );
                return Err(TrainError::State { path: dir.to_path_buf(), reason });
            }
        }
        Ok(())
    }
}

/// The paths of all files of the state in `dir`, in order.
fn find(dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let failed = |source| TrainError::File { action: "list", path: dir.to_path_buf(), source };
    let mut found = Vec::new();
    for entry in dir.read_dir().map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        found.extend(name.to_str().and_then(parse_name));
    }
    found.sort_unstable();
    let refuse = |path: PathBuf, reason: String| Err(TrainError::State { path, reason });
    let Some(&(_, count)) = found.first() else {
        let reason = "no training_state-…-of-….safetensors in it; name a snapshot's directory";
        return refuse(dir.to_path_buf(), reason.to_owned());
    };
    if let Some(&(number, other)) = found.iter().find(|(_, other)| *other != count) {
        let path = dir.join(file_name(number, other));
        let reason = format!(
            "one of {other} files, and beside it are some of {count}: two states in one directory; \
             {OTHER_SNAPSHOT}"
        );
        return refuse(path, reason);
    }
    for number in 1..=count {
        if !found.contains(&(number, count)) {
            let reason = format!("missing, of {count} files; copy it here, or {OTHER_SNAPSHOT}");
            return refuse(dir.join(file_name(number, count)), reason);
        }
    }
    Ok(found.into_iter().map(|(number, count)| dir.join(file_name(number, count))).collect())
}

/// Number and count in the name of a state's file.
fn parse_name(name: &str) -> Option<(i64, i64)> {
    let numbers = name.strip_prefix("training_state-")?.strip_suffix(".safetensors")?;
    let (number, count) = numbers.split_once("-of-")?;
    let (number, count) = (number.parse().ok()?, count.parse().ok()?);
    (file_name(number, count) == name).then_some((number, count))
}

/// An open file of a state, whose header is sound.
#[derive(Debug)]
struct StateFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl StateFile {
    fn open(path: PathBuf) -> Result<Self, TrainError> {
        let failed = |action| {
            let path = path.clone();
            move |source| TrainError::File { action, path, source }
        };
        let damaged = |reason| TrainError::State { path: path.clone(), reason };
        let mut file = File::open(&path).map_err(failed("open"))?;
        let size = file.metadata().map_err(failed("look at"))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(failed("read the header's length in"))?;
        let header_length = u64::from_le_bytes(length);
        if header_length > MAX_HEADER_BYTES.min(size.saturating_sub(8)) {
            return Err(damaged(format!(
                "the header claims {header_length} bytes of a file of {size}; the file is damaged, \
                 {OTHER_SNAPSHOT}"
            )));
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(failed("read the header of"))?;
        // Deserialising checks that tensors follow one another without gap or overlap.
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|e| damaged(format!("not a safetensors header: {e}; {OTHER_SNAPSHOT}")))?;
        let data_start = 8 + header_length;
        let expected = data_start + metadata.data_len() as u64;
        if size != expected {
            return Err(damaged(format!(
                "{size} bytes, and the header calls for {expected}; the file was cut short, \
                 {OTHER_SNAPSHOT}"
            )));
        }
        Ok(Self { path, file, metadata, data_start })
    }

    fn label(&self, key: &str) -> &str {
        let labels = self.metadata.metadata().as_ref();
        labels.and_then(|labels| labels.get(key)).map_or("missing", String::as_str)
    }

    fn steps(&self) -> Result<u64, TrainError> {
        let steps = self.label("steps");
        steps.parse().map_err(|_| {
            self.refuse(format!(
                "__metadata__.steps is {steps}, expected a number; {OTHER_SNAPSHOT}"
            ))
        })
    }

    /// Checks that the file is one of ours, and of the training that has begun.
    fn check(&self, Identity { model, moments }: &Identity) -> Result<(), TrainError> {
        let format = self.label("format");
        if format != FORMAT {
            return Err(self.refuse(format!(
                "__metadata__.format is {format}, expected {FORMAT}; resume with the release that \
                 wrote it"
            )));
        }
        let found = self.label("moments");
        if found != moments {
            return Err(self.refuse(format!(
                "__metadata__.moments is {found:?}, expected {moments:?}; go on with the optimiser \
                 that wrote it"
            )));
        }
        if self.label("model") != model {
            return Err(self.refuse(
                "__metadata__.model lists other tensors than the policy has; is this the state of \
                 the model that is loaded?"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// A tensor of the file as a run: the whole tensor's name, and its elements.
    fn run(
        &self,
        name: &str,
        info: &TensorInfo,
        lengths: &BTreeMap<String, i64>,
    ) -> Result<(String, Range<i64>), TrainError> {
        let parse = || {
            let (tensor, range) = name.strip_suffix(']')?.rsplit_once('[')?;
            let (start, end) = range.split_once(':')?;
            Some((tensor, start.parse::<i64>().ok()?..end.parse::<i64>().ok()?))
        };
        let known = parse().and_then(|(tensor, run)| Some((tensor, run, *lengths.get(tensor)?)));
        let Some((tensor, Range { start, end }, length)) = known else {
            let reason = format!("tensor {name} is none of this training's; {OTHER_SNAPSHOT}");
            return Err(self.refuse(reason));
        };
        let sound = 0 <= start && start < end && end <= length;
        if !sound || info.dtype != Dtype::F32 || info.shape != [(end - start) as usize] {
            return Err(self.refuse(format!(
                "tensor {name} is {:?} {:?}, expected a run of {length} F32 elements; \
                 {OTHER_SNAPSHOT}",
                info.dtype, info.shape
            )));
        }
        Ok((tensor.to_owned(), start..end))
    }

    fn read(&self, buffer: &mut [u8], position: u64) -> Result<(), TrainError> {
        let failed = |source| TrainError::File { action: "read", path: self.path.clone(), source };
        self.file.read_exact_at(buffer, position).map_err(failed)
    }

    fn refuse(&self, reason: String) -> TrainError {
        TrainError::State { path: self.path.clone(), reason }
    }
}
