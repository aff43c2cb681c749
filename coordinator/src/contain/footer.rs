//! A Parquet footer's schema, looked at before the decoder does: that one allocates for as
//! many children as a damaged element announces, thousands of millions, and descends as
//! deep as they say (found by `make fuzz`).
//!
//! The footer is Thrift's compact protocol: `FileMetaData`, whose second field is the
//! schema, a tree told from its root down as a list of `SchemaElement`, whose fifth field
//! says how many children follow.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Ends a file, behind the footer's length.
const MAGIC: &[u8; 4] = b"PAR1";
/// Where `FileMetaData` has its schema.
const SCHEMA: i16 = 2;
/// Where `SchemaElement` has its number of children.
const CHILDREN: i16 = 5;
/// Deeper than any table of conversations.
const DEEPEST: usize = 64;

const CUT: &str = "its footer is cut";
const TOO_DEEP: &str = "its footer is nested deeper than 64 levels";

/// Whether the schema of the file's footer is one tree, no deeper than it may be.
///
/// # Errors
/// What is wrong with it. A file without a footer is none of this function's: the decoder
/// says so.
pub(super) fn check(file: &File) -> Result<(), String> {
    match read(file).map_err(|error| error.to_string())? {
        Some(footer) => Walk(&footer).file().map_err(str::to_owned),
        None => Ok(()),
    }
}

fn read(file: &File) -> io::Result<Option<Vec<u8>>> {
    let Some(end) = file.metadata()?.len().checked_sub(8) else { return Ok(None) };
    let mut tail = [0; 8];
    file.read_exact_at(&mut tail, end)?;
    let length = u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
    let Some(begin) = end.checked_sub(length.into()) else { return Ok(None) };
    if &tail[4..] != MAGIC {
        return Ok(None);
    }
    let mut footer = vec![0; length as usize];
    file.read_exact_at(&mut footer, begin)?;
    Ok(Some(footer))
}

/// What is left to walk over.
struct Walk<'f>(&'f [u8]);

type Walked<T> = Result<T, &'static str>;

impl Walk<'_> {
    fn file(&mut self) -> Walked<()> {
        let mut id = 0;
        while let Some(kind) = self.field(&mut id)? {
            if (id, kind) == (SCHEMA, Kind::List) {
                return self.schema();
            }
            self.skip(kind, 0)?;
        }
        Err("its footer has no schema")
    }

    fn schema(&mut self) -> Walked<()> {
        let (elements, kind) = self.list()?;
        if kind != Kind::Struct {
            return Err("its schema is no list of elements");
        }
        // Children that are still to come, of each ancestor.
        let mut open: Vec<u64> = vec![1];
        for left in (0..elements).rev() {
            let children = self.element()?;
            while open.last() == Some(&0) {
                open.pop();
            }
            *open.last_mut().ok_or("its schema has more than one root")? -= 1;
            if children > left {
                return Err("an element of its schema announces more children than follow");
            }
            if children > 0 {
                open.push(children);
            }
            if open.len() > DEEPEST {
                return Err(TOO_DEEP);
            }
        }
        if open.iter().any(|&missing| missing > 0) {
            return Err("its schema lacks elements");
        }
        Ok(())
    }

    /// How many children an element has.
    fn element(&mut self) -> Walked<u64> {
        let (mut id, mut children) = (0, 0);
        while let Some(kind) = self.field(&mut id)? {
            if (id, kind) == (CHILDREN, Kind::Number) {
                children = u64::try_from(zigzag(self.varint()?))
                    .map_err(|_| "an element of its schema has a negative number of children")?;
            } else {
                self.skip(kind, 0)?;
            }
        }
        Ok(children)
    }

    /// The next field's kind, and in `id` its number; none at the structure's end.
    fn field(&mut self, id: &mut i16) -> Walked<Option<Kind>> {
        let head = self.byte()?;
        let Some(kind) = Kind::of(head & 15)? else { return Ok(None) };
        *id = match head >> 4 {
            0 => i16::try_from(zigzag(self.varint()?)).map_err(|_| "its footer is garbled")?,
            step => id.wrapping_add(step.into()),
        };
        Ok(Some(kind))
    }

    fn list(&mut self) -> Walked<(u64, Kind)> {
        let head = self.byte()?;
        let kind = Kind::of(head & 15)?.ok_or("its footer is garbled")?;
        let size = match head >> 4 {
            15 => self.varint()?,
            size => size.into(),
        };
        // Each takes a byte at least.
        if size > self.0.len() as u64 {
            return Err(CUT);
        }
        Ok((size, if kind == Kind::Truth { Kind::Byte } else { kind }))
    }

    fn skip(&mut self, kind: Kind, depth: usize) -> Walked<()> {
        if depth > DEEPEST {
            return Err(TOO_DEEP);
        }
        match kind {
            Kind::Truth => {}
            Kind::Byte => drop(self.byte()?),
            Kind::Number => drop(self.varint()?),
            Kind::Double => self.jump(8)?,
            Kind::Text => {
                let length = self.varint()?;
                self.jump(length)?;
            }
            Kind::List => {
                let (size, kind) = self.list()?;
                for _ in 0..size {
                    self.skip(kind, depth + 1)?;
                }
            }
            Kind::Struct => {
                let mut id = 0;
                while let Some(kind) = self.field(&mut id)? {
                    self.skip(kind, depth + 1)?;
                }
            }
        }
        Ok(())
    }

    fn byte(&mut self) -> Walked<u8> {
        let (&byte, rest) = self.0.split_first().ok_or(CUT)?;
        self.0 = rest;
        Ok(byte)
    }

    fn jump(&mut self, bytes: u64) -> Walked<()> {
        let bytes = usize::try_from(bytes).map_err(|_| CUT)?;
        self.0 = self.0.get(bytes..).ok_or(CUT)?;
        Ok(())
    }

    fn varint(&mut self) -> Walked<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(value);
            }
        }
        Err("its footer is garbled")
    }
}

fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Kinds of values, by how they are walked over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// In the head of its field.
    Truth,
    Byte,
    Number,
    Double,
    Text,
    /// Or a set.
    List,
    Struct,
}

impl Kind {
    /// None ends a structure. A footer has no maps.
    fn of(code: u8) -> Walked<Option<Self>> {
        Ok(Some(match code {
            0 => return Ok(None),
            1 | 2 => Self::Truth,
            3 => Self::Byte,
            4..=6 => Self::Number,
            7 => Self::Double,
            8 => Self::Text,
            9 | 10 => Self::List,
            12 => Self::Struct,
            _ => return Err("its footer is garbled"),
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A footer whose elements have these numbers of children.
    fn schema(children: &[u8]) -> Vec<u8> {
        // A version, then the schema's list of structures.
        let mut footer = vec![0x15, 2, 0x19, 0xfc, children.len() as u8];
        for &children in children {
            // A name of one letter, and the number of children.
            footer.extend([0x48, 1, b'a', 0x15, 2 * children, 0]);
        }
        footer.extend([0x16, 6, 0]);
        footer
    }

    #[test]
    fn a_schema_is_one_tree() {
        let walk = |children: &[u8]| Walk(&schema(children)).file();
        assert_eq!(walk(&[2, 0, 2, 0, 0]), Ok(()));
        assert_eq!(walk(&[1, 1, 1, 0]), Ok(()));
        assert!(walk(&[2, 1, 0]).unwrap_err().contains("lacks elements"));
        assert!(walk(&[1, 0, 0]).unwrap_err().contains("more than one root"));
        assert!(walk(&[1, 60, 0, 0]).unwrap_err().contains("more children than follow"));
        assert!(walk(&[0]).is_ok(), "an empty one is the decoder's");
    }

    #[test]
    fn depth_has_an_end() {
        let deep = |levels: usize| [vec![1; levels], vec![0]].concat();
        assert_eq!(Walk(&schema(&deep(DEEPEST - 1))).file(), Ok(()));
        assert_eq!(Walk(&schema(&deep(DEEPEST))).file(), Err(TOO_DEEP));
        // A structure in a structure in …, in the place of the version.
        let footer = vec![0x1c; 1000];
        assert_eq!(Walk(&footer).file(), Err(TOO_DEEP));
    }

    #[test]
    fn what_is_cut_anywhere_is_refused() {
        let footer = schema(&[2, 0, 2, 0, 0]);
        // What follows the schema is not looked at.
        for length in 0..footer.len() - 3 {
            assert_eq!(Walk(&footer[..length]).file(), Err(CUT), "{length}");
        }
        // A list of thousands of millions in a few bytes.
        assert_eq!(Walk(&[0x19, 0xf5, 0xff, 0xff, 0xff, 0x7f]).file(), Err(CUT));
    }
}
