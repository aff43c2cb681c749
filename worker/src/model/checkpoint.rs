//! Reading safetensors: files mapped into memory, every number in them checked.

mod decoder;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;
use tch::{Device, Kind, TchError, Tensor};

use super::error::ModelError;
use super::layout::Slot;
pub(super) use decoder::Untouched;

/// Where a model's weights are when they fit into one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor, when they do not.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Largest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// The weight files of one model directory.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// The single file, or the index: what errors about the whole name.
    path: PathBuf,
    files: Vec<WeightFile>,
    /// Tensor name → index into `files`.
    tensors: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Maps the weight files in `dir` and checks their headers. As in
    /// transformers, a single file goes before an index.
    pub(crate) fn open(dir: &Path) -> Result<Self, ModelError> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if !single.exists() && index.exists() {
            return Self::open_sharded(dir, index);
        }
        let file = WeightFile::open(single.clone())?;
        let tensors = file.tensors.keys().map(|name| (name.clone(), 0)).collect();
        Ok(Self { path: single, files: vec![file], tensors })
    }

    fn open_sharded(dir: &Path, path: PathBuf) -> Result<Self, ModelError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(&path).map_err(ModelError::io("read", &path))?;
        let Index { weight_map } = serde_json::from_str(&text)
            .map_err(|e| ModelError::malformed(&path, format!("not an index of shards: {e}")))?;

        let mut files: Vec<WeightFile> = Vec::new();
        let mut opened = HashMap::new();
        let mut tensors = BTreeMap::new();
        for (name, shard) in weight_map {
            let at = match opened.get(&shard) {
                Some(&at) => at,
                None => {
                    // A path could lead anywhere on the machine.
                    if Path::new(&shard).file_name() != Some(shard.as_ref()) {
                        let problem = format!(
                            "weight_map.{name} is {shard:?}, expected a file name without folders"
                        );
                        return Err(ModelError::malformed(&path, problem));
                    }
                    files.push(WeightFile::open(dir.join(&shard))?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[at].tensors.contains_key(&name) {
                let path = files[at].path.clone();
                return Err(ModelError::MissingTensors { path, names: vec![name] });
            }
            tensors.insert(name, at);
        }
        for (at, file) in files.iter().enumerate() {
            let strays = file.tensors.keys().filter(|name| tensors.get(*name) != Some(&at));
            refuse_strays(&file.path, strays.cloned().collect())?;
        }
        Ok(Self { path, files, tensors })
    }

    /// Checks names, shapes and kinds against `slots`, without reading a weight. A tensor
    /// that no slot has a part for must be one that `is_known` knows of.
    pub(crate) fn check<'a>(
        &self,
        slots: impl Iterator<Item = &'a Slot>,
        is_known: impl Fn(&str) -> bool,
    ) -> Result<(), ModelError> {
        let mut expected = HashSet::new();
        let mut missing = Vec::new();
        for slot in slots {
            for part in &slot.parts {
                expected.insert(part.name.as_str());
                match self.tensors.get(&part.name) {
                    Some(&at) => self.files[at].check(&part.name, &slot.shape(part.rows))?,
                    None => missing.push(part.name.clone()),
                }
            }
        }
        if !missing.is_empty() {
            return Err(ModelError::MissingTensors { path: self.path.clone(), names: missing });
        }
        for (at, file) in self.files.iter().enumerate() {
            let strays = self.tensors.iter().filter(|(name, of)| {
                **of == at && !expected.contains(name.as_str()) && !is_known(name)
            });
            refuse_strays(&file.path, strays.map(|(name, _)| name.clone()).collect())?;
        }
        Ok(())
    }

    /// The tensor of `slot`, of its parts' rows one after another.
    pub(crate) fn read(
        &self,
        slot: &Slot,
        kind: Kind,
        device: Device,
    ) -> Result<Tensor, ModelError> {
        let tensor = Tensor::f_empty(slot.shape(slot.rows()), (kind, device))?;
        let mut start = 0;
        for part in &slot.parts {
            tensor.f_narrow(0, start, part.rows)?.f_copy_(&self.tensor(&part.name)?)?;
            start += part.rows;
        }
        Ok(tensor)
    }

    /// The tensor `name` as the file has it: a view into the mapping.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        match self.tensors.get(name) {
            Some(&at) => self.files[at].tensor(name),
            None => Err(ModelError::MissingTensors {
                path: self.path.clone(),
                names: vec![name.to_owned()],
            }),
        }
    }
}

fn refuse_strays(path: &Path, names: Vec<String>) -> Result<(), ModelError> {
    if names.is_empty() {
        return Ok(());
    }
    Err(ModelError::UnexpectedTensors { path: path.to_path_buf(), names })
}

/// One safetensors file.
#[derive(Debug)]
struct WeightFile {
    path: PathBuf,
    /// The whole file, mapped: `[bytes]`, u8.
    bytes: Tensor,
    /// Where tensor data begins: after the length and the header.
    data_start: i64,
    tensors: HashMap<String, TensorInfo>,
}

impl WeightFile {
    fn open(path: PathBuf) -> Result<Self, ModelError> {
        let mut file = File::open(&path).map_err(ModelError::io("open", &path))?;
        let length = file.metadata().map_err(ModelError::io("read", &path))?.len();
        let malformed = |problem: String| ModelError::malformed(&path, problem);

        if length < 8 {
            return Err(malformed(format!(
                "{length} bytes long, too short for a safetensors file"
            )));
        }
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(ModelError::io("read", &path))?;
        let header = u64::from_le_bytes(prefix);
        if header > MAX_HEADER || header > length - 8 {
            return Err(malformed(format!(
                "header of {header} bytes in a file of {length}: cut short, or not safetensors"
            )));
        }
        let mut text = vec![0; header as usize];
        file.read_exact(&mut text).map_err(ModelError::io("read", &path))?;
        // Deserialising checks that offsets follow one another without gap or
        // overlap, and that each range is as long as shape and dtype say.
        let metadata: Metadata = serde_json::from_slice(&text)
            .map_err(|e| malformed(format!("not a safetensors header: {e}")))?;
        let data_start = 8 + header;
        let expected = data_start + metadata.data_len() as u64;
        if length != expected {
            return Err(malformed(format!(
                "{length} bytes long, but its header describes {expected}; copy the file again"
            )));
        }

        let name = path
            .to_str()
            .ok_or_else(|| malformed("path is not UTF-8, which libtorch needs".to_owned()))?;
        let bytes = Tensor::f_from_file(name, false, length as i64, (Kind::Uint8, Device::Cpu))?;
        let tensors =
            metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { path, bytes, data_start: data_start as i64, tensors })
    }

    fn check(&self, name: &str, expected: &[i64]) -> Result<(), ModelError> {
        let info = &self.tensors[name];
        let expected: Vec<usize> = expected.iter().map(|&size| size as usize).collect();
        if info.shape != expected {
            return Err(ModelError::Shape {
                path: self.path.clone(),
                name: name.to_owned(),
                found: info.shape.clone(),
                expected,
            });
        }
        self.kind(name, info.dtype).map(drop)
    }

    fn kind(&self, name: &str, dtype: Dtype) -> Result<Kind, ModelError> {
        match dtype {
            Dtype::F32 => Ok(Kind::Float),
            Dtype::F16 => Ok(Kind::Half),
            Dtype::BF16 => Ok(Kind::BFloat16),
            other => {
                let field = format!("the dtype of {name}");
                let found = format!("{other:?}");
                Err(ModelError::unsupported(&self.path, &field, found, "F32, F16 and BF16"))
            }
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let info = &self.tensors[name];
        let kind = self.kind(name, info.dtype)?;
        let start = self.data_start + info.data_offsets.0 as i64;
        let bytes = self.content(info)?;
        // Writers that do not align their header leave data where a view of
        // wider elements cannot start.
        let aligned = start % kind.elt_size_in_bytes() as i64 == 0;
        let bytes = if aligned {
            bytes
        } else {
            let mut copy = bytes.f_empty_like()?;
            copy.f_copy_(&bytes)?;
            copy
        };
        let shape: Vec<i64> = info.shape.iter().map(|&size| size as i64).collect();
        Ok(bytes.f_view_dtype(kind)?.f_view(shape.as_slice())?)
    }

    /// A tensor's bytes: a view into the mapping.
    fn content(&self, info: &TensorInfo) -> Result<Tensor, TchError> {
        let (begin, end) = info.data_offsets;
        self.bytes.f_narrow(0, self.data_start + begin as i64, (end - begin) as i64)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
