//! Training state on disk: masters and optimiser, in one safetensors file per rank.
//!
//! Rank r of w writes `training_state-0000(r+1)-of-0000w.safetensors` with what it
//! owns; without sharding, where all hold the same, with its part of that, so that each
//! writes as little. A file holds fp32 runs of the
//! tensors that checkpoints name, `{state}.{tensor}[{start}:{end}]`: elements
//! `start` up to `end` of the flattened tensor, where `state` is `master` or one of
//! the optimiser's moments. Buckets, padding and shares leave no mark but where
//! runs begin and end, so any number of ranks can read what any number wrote, as
//! long as the runs of all files together cover each tensor once.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use tch::{Device, TchError, Tensor};

use super::error::TrainError;
use super::sharding::{Segment, segments};
use super::shards::Snapshot;
use super::trainer::{Trainer, Training};
use crate::model::{SavedFile, write_file, write_tensor};

/// Says what the files are, and in which version.
pub(super) const FORMAT: &str = "drift-training-state-2";
/// The state that every algorithm has: fp32 weights.
const MASTER: &str = "master";
pub(super) const ELEMENT_BYTES: usize = 4;

/// A run of elements of one state of one tensor that a checkpoint names.
#[derive(Debug)]
pub(super) struct Run {
    /// `master` or a moment's name, a dot, and the tensor's name.
    pub(super) tensor: String,
    /// Which of its elements.
    pub(super) elements: Range<i64>,
    /// Where they are in this rank's memory, flat: a view.
    pub(super) values: Tensor,
}

/// What all files of a state have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// The model's tensors and their shapes, as JSON.
    pub(super) model: String,
    /// The optimiser's moments.
    pub(super) moments: String,
}

impl Trainer {
    /// Writes this rank's part of masters and optimiser state, with the number
    /// of steps done, to `dir`. All ranks call this, with the same `dir`; the
    /// files written are returned.
    /// They are synced; renaming into place is the caller's.
    ///
    /// # Errors
    /// [`TrainError::NotBegun`]; [`TrainError::Model`] where the file system refuses.
    pub fn save_state(&self, dir: &Path) -> Result<Vec<SavedFile>, TrainError> {
        StateCopy(Part::of(self.training()?, dir)?).write(dir, &|| false)
    }

    /// Copies into host memory what [`Self::save_state`] would write, so that it can be
    /// written while training goes on. `dir` is for errors.
    ///
    /// # Errors
    /// [`TrainError::NotBegun`]; [`TrainError::State`]; libtorch's.
    pub fn copy_state(&self, dir: &Path) -> Result<StateCopy, TrainError> {
        let part = Part::of(self.training()?, dir)?;
        Ok(StateCopy(part.copied()?))
    }

    /// Reads what [`Self::save_state`] wrote to `dir`, on however many ranks,
    /// after [`Self::begin`]: of masters and optimiser state what this rank owns,
    /// and the number of steps done. All of the policy's weights become the
    /// masters', rounded to its kind; no other rank is needed for it.
    ///
    /// # Errors
    /// [`TrainError::NotBegun`]; [`TrainError::State`] where a file is missing,
    /// damaged, of another model, optimiser or step, before anything changes;
    /// [`TrainError::File`] where one cannot be read, after which state and
    /// weights must be loaded again.
    pub fn load_state(&mut self, dir: &Path) -> Result<(), TrainError> {
        let training = self.training_mut()?;
        let snapshot = Snapshot::open(dir, &identity(training)?, &lengths(training))?;
        for run in own_runs(training)?.iter().chain(&others_weights(training)?) {
            snapshot.read(run)?;
        }
        training.optimizer.resume(&training.buckets, snapshot.steps())?;
        Ok(())
    }
}

/// A rank's part of a training state, which nothing changes any more.
#[derive(Debug)]
pub struct StateCopy(Part);

impl StateCopy {
    /// Writes and syncs the part's file in `dir`, unless `stop` says to leave off.
    ///
    /// # Errors
    /// [`TrainError::Model`] where the file system refuses, or it was stopped.
    pub fn write(&self, dir: &Path, stop: &dyn Fn() -> bool) -> Result<Vec<SavedFile>, TrainError> {
        let Part { name, header, values } = &self.0;
        let saved = write_file(dir, name, |out: &mut dyn Write| {
            out.write_all(&(header.len() as u64).to_le_bytes())?;
            out.write_all(header)?;
            let mut buffer = Vec::new();
            for values in values {
                if stop() {
                    return Err(std::io::Error::other("stopped"));
                }
                write_tensor(out, values, &mut buffer)?;
            }
            Ok(())
        })?;
        Ok(vec![saved])
    }
}

/// A state file in the making.
#[derive(Debug)]
struct Part {
    name: String,
    header: Vec<u8>,
    /// In the order of the header.
    values: Vec<Tensor>,
}

impl Part {
    /// Views of what this rank is to write.
    fn of(training: &Training, dir: &Path) -> Result<Self, TrainError> {
        let (rank, ranks) = (i64::from(training.rank), i64::from(training.ranks));
        let name = file_name(rank + 1, ranks);
        let mut runs = own_runs(training)?;
        if !training.partition.is_sharded() {
            runs = part_of(runs, rank, ranks)?;
        }
        let header = header(training, &runs)
            .map_err(|reason| TrainError::State { path: dir.join(&name), reason })?;
        Ok(Self { name, header, values: runs.into_iter().map(|run| run.values).collect() })
    }

    fn copied(self) -> Result<Self, TchError> {
        let copy = |values: &Tensor| -> Result<Tensor, TchError> {
            let mut copy = Tensor::f_empty(values.size(), (values.kind(), Device::Cpu))?;
            copy.f_copy_(values)?;
            Ok(copy)
        };
        let values = tch::no_grad(|| self.values.iter().map(copy).collect::<Result<_, _>>())?;
        Ok(Self { values, ..self })
    }
}

/// The name of file `number`, from 1, of `count`.
pub(super) fn file_name(number: i64, count: i64) -> String {
    format!("training_state-{number:05}-of-{count:05}.safetensors")
}

/// All that this rank owns, bucket by bucket.
fn own_runs(training: &Training) -> Result<Vec<Run>, TchError> {
    let optimizer = &training.optimizer;
    let mut runs = Vec::new();
    for (at, bucket) in training.buckets.list.iter().enumerate() {
        for segment in training.partition.own(bucket) {
            runs_of(&mut runs, &segment, MASTER, &optimizer.master(at, &segment)?)?;
            let moments = optimizer.moments(at, &segment)?;
            for (name, values) in optimizer.algorithm().moments().iter().zip(&moments) {
                runs_of(&mut runs, &segment, name, values)?;
            }
        }
    }
    Ok(runs)
}

/// Of the elements of all runs, in a row, the `rank`th of `ranks` parts of equal length.
fn part_of(runs: Vec<Run>, rank: i64, ranks: i64) -> Result<Vec<Run>, TchError> {
    let total: i64 = runs.iter().map(|run| run.elements.end - run.elements.start).sum();
    let part = total * rank / ranks..total * (rank + 1) / ranks;
    let (mut end, mut own) = (0, Vec::new());
    for Run { tensor, elements: Range { start: first, end: last }, values } in runs {
        let begin = end;
        end += last - first;
        let (start, stop) = (part.start.max(begin), part.end.min(end));
        if start < stop {
            own.push(Run {
                tensor,
                elements: first + start - begin..first + stop - begin,
                values: values.f_narrow(0, start - begin, stop - start)?,
            });
        }
    }
    Ok(own)
}

/// The policy's weights whose masters other ranks own.
fn others_weights(training: &Training) -> Result<Vec<Run>, TchError> {
    let mut runs = Vec::new();
    for bucket in &training.buckets.list {
        for others in training.partition.pieces(bucket).flat_map(|piece| piece.others()) {
            for segment in segments(bucket, others) {
                runs_of(&mut runs, &segment, MASTER, &segment.weight()?)?;
            }
        }
    }
    Ok(runs)
}

/// `values`, a state of `segment`, as runs of the tensors that a checkpoint names.
fn runs_of(
    runs: &mut Vec<Run>,
    segment: &Segment<'_>,
    state: &str,
    values: &Tensor,
) -> Result<(), TchError> {
    let Range { start: first, end: last } = segment.elements;
    for (name, part) in segment.slot.flat_parts() {
        let (start, end) = (part.start.max(first), part.end.min(last));
        if start < end {
            runs.push(Run {
                tensor: format!("{state}.{name}"),
                elements: start - part.start..end - part.start,
                values: values.f_narrow(0, start - first, end - start)?,
            });
        }
    }
    Ok(())
}

fn identity(training: &Training) -> Result<Identity, TrainError> {
    let mut shapes = BTreeMap::new();
    for (_, slot) in training.buckets.slots() {
        for (name, values) in slot.named(&slot.flat_weight()?)? {
            shapes.insert(name, values.size());
        }
    }
    // Strings and integers, which JSON always has words for.
    let model = serde_json::to_string(&shapes).unwrap_or_default();
    Ok(Identity { model, moments: training.optimizer.algorithm().moments().join(" ") })
}

/// Elements of every tensor that a whole state has.
fn lengths(training: &Training) -> BTreeMap<String, i64> {
    let moments = training.optimizer.algorithm().moments();
    let states = || std::iter::once(MASTER).chain(moments.iter().copied());
    let slots = training.buckets.slots().flat_map(|(_, slot)| slot.flat_parts());
    slots
        .flat_map(|(name, part)| {
            states().map(move |state| (format!("{state}.{name}"), part.end - part.start))
        })
        .collect()
}

fn header(training: &Training, runs: &[Run]) -> Result<Vec<u8>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("cannot be described: {error}");
    let mut offset = 0;
    let tensors = runs.iter().map(|Run { tensor, elements: Range { start, end }, .. }| {
        let length = (end - start) as usize;
        let data_offsets = (offset, offset + length * ELEMENT_BYTES);
        offset = data_offsets.1;
        let info = TensorInfo { dtype: Dtype::F32, shape: vec![length], data_offsets };
        (format!("{tensor}[{start}:{end}]"), info)
    });
    let Identity { model, moments } = identity(training).map_err(|e| failed(&e))?;
    let labels = [
        ("format", FORMAT.to_owned()),
        ("steps", training.optimizer.steps().to_string()),
        ("moments", moments),
        ("model", model),
    ];
    let labels: HashMap<String, String> =
        labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let metadata = Metadata::new(Some(labels), tensors.collect()).map_err(|e| failed(&e))?;
    // By way of `Value`, whose keys are sorted: equal states give equal bytes.
    let mut header = serde_json::to_value(&metadata)
        .and_then(|value| serde_json::to_vec(&value))
        .map_err(|e| failed(&e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}
