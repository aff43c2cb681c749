//! Writing safetensors: streamed, hashed on the way, in Hugging Face's naming.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tch::{Kind, TchError, Tensor};

use super::checkpoint::{INDEX, SINGLE};
use super::decoder::{Decoder, Parameter};
use super::error::ModelError;

/// Largest shard, as transformers 4 has it: "5GB".
const MAX_SHARD_BYTES: usize = 5_000_000_000;
/// Weights pass through host memory in pieces of this size.
const PIECE_BYTES: i64 = 16 << 20;

/// A file that was written and synced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedFile {
    /// Its name in the directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, taken while it was written.
    pub sha256: [u8; 32],
}

/// One Hugging Face tensor: rows of a parameter, or the bytes of what is saved as it was read.
struct Piece {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
    content: Tensor,
}

impl Decoder {
    /// Writes the weights to `dir`: `model.safetensors`, or shards of at most
    /// 5 GB and their index. Unchanged weights give the bytes that
    /// transformers' `save_pretrained` writes.
    ///
    /// No second copy of the model is made. Every file is synced, the
    /// directory last; renaming into place is the caller's. Fails if `dir`
    /// holds weight files of another division into shards, which a reader
    /// would mix with these.
    pub fn save(&self, dir: &Path) -> Result<Vec<SavedFile>, ModelError> {
        self.save_sharded(dir, MAX_SHARD_BYTES)
    }

    /// [`Decoder::save`] with another bound on a shard's tensor bytes; a
    /// tensor above the bound gets a shard of its own.
    pub fn save_sharded(
        &self,
        dir: &Path,
        max_shard_bytes: usize,
    ) -> Result<Vec<SavedFile>, ModelError> {
        let shards = divide(self.pieces(self.dtype(dir)?)?, max_shard_bytes);
        let count = shards.len();
        let name = |at: usize| match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        };
        let mut names: Vec<String> = (0..count).map(name).collect();
        if count > 1 {
            names.push(INDEX.to_owned());
        }
        refuse_leftovers(dir, &names)?;

        let mut saved = Vec::with_capacity(names.len());
        for (shard, name) in shards.iter().zip(&names) {
            saved.push(write_shard(dir, name, shard)?);
        }
        if count > 1 {
            saved.push(write_index(dir, &shards, &names)?);
        }
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(ModelError::io("sync", dir))?;
        Ok(saved)
    }

    fn dtype(&self, dir: &Path) -> Result<Dtype, ModelError> {
        match self.kind() {
            Kind::Float => Ok(Dtype::F32),
            Kind::Half => Ok(Dtype::F16),
            Kind::BFloat16 => Ok(Dtype::BF16),
            other => {
                let found = format!("{other:?}");
                Err(ModelError::unsupported(dir, "the model's kind", found, "f32, f16 and bf16"))
            }
        }
    }

    /// All Hugging Face tensors, in the order of transformers' state dict: what is beside the
    /// decoder, and the decoder.
    fn pieces(&self, dtype: Dtype) -> Result<Vec<Piece>, TchError> {
        let mut outer = self.outer_parameters().into_iter();
        let embedding = outer.next();
        let parameters = embedding
            .into_iter()
            .chain(self.blocks.iter().flat_map(|block| block.parameters()))
            .chain(outer);
        let untouched = self.untouched.iter().map(|tensor| Piece {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            bytes: tensor.content.numel(),
            content: tensor.content.shallow_clone(),
        });
        let mut pieces: Vec<Piece> = untouched.collect();
        for Parameter { tensor, parts } in parameters {
            let tensor = tensor.f_detach()?;
            let mut start = 0;
            for part in parts {
                let rows = tensor.f_narrow(0, start, part.rows)?;
                start += part.rows;
                let shape: Vec<usize> = rows.size().iter().map(|&size| size as usize).collect();
                let bytes = shape.iter().product::<usize>() * rows.f_kind()?.elt_size_in_bytes();
                pieces.push(Piece { name: part.name, dtype, shape, bytes, content: rows });
            }
        }
        Ok(pieces)
    }
}

/// Fills shards in order, as `split_torch_state_dict_into_shards` of
/// huggingface_hub does.
fn divide(pieces: Vec<Piece>, max_bytes: usize) -> Vec<Vec<Piece>> {
    let mut shards = Vec::new();
    let mut current = Vec::new();
    let mut filled = 0;
    for piece in pieces {
        if piece.bytes > max_bytes {
            shards.push(vec![piece]);
            continue;
        }
        if filled + piece.bytes > max_bytes {
            shards.push(std::mem::take(&mut current));
            filled = 0;
        }
        filled += piece.bytes;
        current.push(piece);
    }
    if !current.is_empty() {
        shards.push(current);
    }
    // Within a file tensors are laid out by dtype, the widest first, so that each is aligned,
    // and then by name.
    for shard in &mut shards {
        shard.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    }
    shards
}

/// Files of this directory that a reader would take for part of the model.
fn refuse_leftovers(dir: &Path, writing: &[String]) -> Result<(), ModelError> {
    for entry in dir.read_dir().map_err(ModelError::io("list", dir))? {
        let entry = entry.map_err(ModelError::io("list", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let weights = name == SINGLE
            || name == INDEX
            || (name.starts_with("model-") && name.ends_with(".safetensors"));
        if weights && !writing.contains(&name) {
            let problem = "left by another checkpoint; save to an empty directory, or remove it";
            return Err(ModelError::malformed(&entry.path(), problem));
        }
    }
    Ok(())
}

fn write_shard(dir: &Path, name: &str, shard: &[Piece]) -> Result<SavedFile, ModelError> {
    let path = dir.join(name);
    let mut offset = 0;
    let tensors = shard.iter().map(|piece| {
        let data_offsets = (offset, offset + piece.bytes);
        offset += piece.bytes;
        let Piece { name, dtype, shape, .. } = piece;
        (name.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets })
    });
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), tensors.collect())
        .map_err(|e| ModelError::malformed(&path, format!("cannot be described: {e}")))?;
    let mut header = serde_json::to_vec(&metadata)
        .map_err(|e| ModelError::malformed(&path, format!("cannot be described: {e}")))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    write_file(dir, name, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let mut buffer = Vec::new();
        for piece in shard {
            write_tensor(out, &piece.content, &mut buffer)?;
        }
        Ok(())
    })
}

pub(crate) fn write_tensor(
    out: &mut dyn Write,
    rows: &Tensor,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let torch = io::Error::other::<TchError>;
    let element = rows.f_kind().map_err(torch)?.elt_size_in_bytes();
    let flat = rows.f_view([-1]).map_err(torch)?;
    let (total, step) = (flat.size1().map_err(torch)?, PIECE_BYTES / element as i64);
    let mut start = 0;
    while start < total {
        let count = step.min(total - start);
        let slice = flat.f_narrow(0, start, count).map_err(torch)?;
        // libtorch copies elements as they lie in memory; the format is
        // little-endian, as is every machine libtorch is built for.
        buffer.resize(count as usize * element, 0);
        #[expect(clippy::disallowed_methods, reason = "what is saved is copied")]
        slice.f_copy_data_u8(buffer, count as usize).map_err(torch)?;
        out.write_all(buffer)?;
        start += count;
    }
    Ok(())
}

fn write_index(
    dir: &Path,
    shards: &[Vec<Piece>],
    names: &[String],
) -> Result<SavedFile, ModelError> {
    #[derive(Serialize)]
    struct Totals {
        total_parameters: usize,
        total_size: usize,
    }
    #[derive(Serialize)]
    struct Index<'a> {
        metadata: Totals,
        weight_map: BTreeMap<&'a str, &'a str>,
    }
    let pieces = || shards.iter().flatten();
    let index = Index {
        metadata: Totals {
            total_parameters: pieces().map(|piece| piece.shape.iter().product::<usize>()).sum(),
            total_size: pieces().map(|piece| piece.bytes).sum(),
        },
        weight_map: shards
            .iter()
            .zip(names)
            .flat_map(|(shard, file)| shard.iter().map(|p| (p.name.as_str(), file.as_str())))
            .collect(),
    };
    write_file(dir, INDEX, |out| {
        serde_json::to_writer_pretty(&mut *out, &index)?;
        out.write_all(b"\n")
    })
}

/// Writes `name` in `dir` through a hash, and syncs it.
pub(crate) fn write_file(
    dir: &Path,
    name: &str,
    content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<SavedFile, ModelError> {
    let path = dir.join(name);
    let file = File::create(&path).map_err(ModelError::io("create", &path))?;
    let mut out = Hashed { file: io::BufWriter::new(file), hash: Sha256::new(), bytes: 0 };
    content(&mut out).map_err(ModelError::io("write to", &path))?;
    let Hashed { file, hash, bytes } = out;
    file.into_inner()
        .map_err(io::IntoInnerError::into_error)
        .and_then(|file| file.sync_all())
        .map_err(ModelError::io("write to", &path))?;
    Ok(SavedFile { name: name.to_owned(), bytes, sha256: hash.finalize().into() })
}

struct Hashed {
    file: io::BufWriter<File>,
    hash: Sha256,
    bytes: u64,
}

impl Write for Hashed {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.file.write(data)?;
        self.hash.update(&data[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
