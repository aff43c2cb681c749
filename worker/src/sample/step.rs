//! One forward pass over the new tokens of all rows, packed.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use super::attend::{Attention, Beginning, Group, Run};
use super::cache::{KvCache, Region};
use super::prefix::Prefixes;
use crate::model::Decoder;

/// Columns that padding may add to a group: a share of what its rows hold, and what a
/// call of its own would cost anyway.
const PADDING_SHARE: f64 = 0.25;
const PADDING_COLUMNS: i64 = 256;

/// Columns of masks are a multiple of this: GPU kernels load them so.
const MASK_ALIGNMENT: i64 = 16;

/// Whose tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The row in this slot.
    Slot(usize),
    /// A shared beginning, which the pool has here.
    Stretch(Region),
}

/// New tokens of one owner, which follow one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) owner: Owner,
    pub(super) tokens: Vec<u32>,
    /// Tokens of the owner that are computed already.
    pub(super) before: usize,
    /// The last shared stretch ahead of the owner's own tokens.
    pub(super) behind: Option<usize>,
    /// Of how many of its last tokens the hidden state is wanted.
    pub(super) wanted: usize,
}

impl Piece {
    fn is_single(&self) -> bool {
        self.tokens.len() == 1 && matches!(self.owner, Owner::Slot(_))
    }
}

/// A step: its pieces in the order in which they are computed.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) pieces: Vec<Piece>,
}

impl Step {
    /// Rows with one token first, in the order of their slots.
    pub(super) fn new(mut pieces: Vec<Piece>) -> Self {
        pieces.sort_by_key(|piece| match piece.owner {
            Owner::Slot(slot) if piece.is_single() => (false, slot),
            _ => (true, 0),
        });
        Self { pieces }
    }

    /// Computes the pieces, and stores their keys and values: the hidden states that are
    /// wanted, `[wanted, hidden]`, piece after piece.
    pub(super) fn forward(
        &self,
        model: &Decoder,
        cache: &KvCache,
        prefixes: &Prefixes,
        stretches: &[Region],
    ) -> Result<Tensor, TchError> {
        let device = model.device();
        let (mut ids, mut positions, mut places) = (Vec::new(), Vec::new(), Vec::new());
        let mut wanted = Vec::new();
        for piece in &self.pieces {
            let length = piece.tokens.len() as i64;
            let region = region(cache, piece);
            let position = (prefixes.length(piece.behind) + piece.before) as i64;
            ids.extend(piece.tokens.iter().copied().map(i64::from));
            positions.extend(position..position + length);
            let before = piece.before as i64;
            places.extend((before..before + length).flat_map(|at| cache.rows_of(region, at)));
            let end = ids.len() as i64;
            wanted.extend(end - piece.wanted as i64..end);
        }
        let upload = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(device);
        let attention = Attention {
            groups: self.groups(model.kind(), device)?,
            runs: self.runs(cache, model.kind(), device)?,
            beginnings: self.beginnings(prefixes, stretches, device)?,
            places: upload(&places)?,
            cache,
        };
        let rotary = model.rotary(&upload(&positions)?)?;
        let mut h = model.embed(&upload(&ids)?)?;
        for (layer, block) in model.blocks.iter().enumerate() {
            h = block.forward(&h, &rotary, &mut |q, k, v| attention.forward(layer, q, k, v))?;
        }
        if wanted.len() == ids.len() {
            return Ok(h);
        }
        h.f_index_select(0, &upload(&wanted)?)
    }

    fn groups(&self, kind: Kind, device: Device) -> Result<Vec<Group>, TchError> {
        let single = |piece: &Piece| match piece.owner {
            Owner::Slot(slot) if piece.is_single() => Some((slot, piece.before as i64 + 1)),
            _ => None,
        };
        let rows: Vec<(usize, i64)> = self.pieces.iter().map_while(single).collect();
        let group = |range: Range<usize>| {
            let lengths: Vec<i64> = rows[range.clone()].iter().map(|row| row.1).collect();
            let columns = lengths.iter().copied().max().unwrap_or(0);
            Ok(Group {
                start: range.start as i64,
                rows: range.len() as i64,
                first_slot: rows[range.start].0,
                columns,
                mask: padding_mask(&lengths, columns, kind, device)?,
            })
        };
        grouped(&rows).into_iter().map(group).collect()
    }

    fn runs(&self, cache: &KvCache, kind: Kind, device: Device) -> Result<Vec<Run>, TchError> {
        let mut start = 0;
        let mut runs = Vec::new();
        for piece in &self.pieces {
            let (length, before) = (piece.tokens.len() as i64, piece.before as i64);
            if !piece.is_single() {
                let mask = match before {
                    0 => None,
                    _ => Some(later_mask(before, length, kind, device)?),
                };
                runs.push(Run { start, length, region: region(cache, piece), before, mask });
            }
            start += length;
        }
        Ok(runs)
    }

    /// Every shared stretch behind which a piece stands, once.
    fn beginnings(
        &self,
        prefixes: &Prefixes,
        stretches: &[Region],
        device: Device,
    ) -> Result<Vec<Beginning>, TchError> {
        let mut members = std::collections::BTreeMap::<usize, Vec<i64>>::new();
        let mut start = 0;
        for piece in &self.pieces {
            let end = start + piece.tokens.len() as i64;
            for stretch in prefixes.path(piece.behind) {
                members.entry(stretch).or_default().extend(start..end);
            }
            start = end;
        }
        let beginning = |(stretch, members): (usize, Vec<i64>)| {
            Ok(Beginning {
                region: stretches[stretch],
                members: Tensor::f_from_slice(&members)?.f_to_device(device)?,
            })
        };
        members.into_iter().map(beginning).collect()
    }
}

fn region(cache: &KvCache, piece: &Piece) -> Region {
    match piece.owner {
        Owner::Slot(slot) => cache.slot(slot),
        Owner::Stretch(region) => region,
    }
}

/// Rows, given as (slot, columns), that are attended to together: neighbours, and not
/// so different that padding costs more than another call.
fn grouped(rows: &[(usize, i64)]) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let mut start = 0;
    while start < rows.len() {
        let (mut held, mut longest, mut end) = (0, 0, start);
        while let Some(&(slot, columns)) = rows.get(end) {
            let (held_then, longest_then) = (held + columns, longest.max(columns));
            let padding = longest_then * (end + 1 - start) as i64 - held_then;
            let bound = PADDING_COLUMNS + (PADDING_SHARE * held_then as f64) as i64;
            if slot != rows[start].0 + (end - start) || padding > bound {
                break;
            }
            (held, longest, end) = (held_then, longest_then, end + 1);
        }
        groups.push(start..end);
        start = end;
    }
    groups
}

fn aligned(columns: i64) -> i64 {
    (columns + MASK_ALIGNMENT - 1) / MASK_ALIGNMENT * MASK_ALIGNMENT
}

/// `[rows, 1, 1, columns]`: −∞ behind each row's end; none where there is nothing.
fn padding_mask(
    lengths: &[i64],
    columns: i64,
    kind: Kind,
    device: Device,
) -> Result<Option<Tensor>, TchError> {
    if lengths.iter().all(|&length| length == columns) {
        return Ok(None);
    }
    let ends = Tensor::f_from_slice(lengths)?.f_to_device(device)?.f_view([-1, 1, 1, 1])?;
    let aligned = aligned(columns);
    let behind = Tensor::f_arange(aligned, (Kind::Int64, device))?.f_ge_tensor(&ends)?;
    let mask = Tensor::f_zeros([lengths.len() as i64, 1, 1, aligned], (kind, device))?
        .f_masked_fill_(&behind, f64::NEG_INFINITY)?;
    Ok(Some(mask.f_narrow(3, 0, columns)?))
}

/// `[length, before + length]`: token i sees all `before` it, and 0 to i.
fn later_mask(before: i64, length: i64, kind: Kind, device: Device) -> Result<Tensor, TchError> {
    let columns = before + length;
    let aligned = aligned(columns);
    Tensor::f_full([length, aligned], f64::NEG_INFINITY, (kind, device))?
        .f_triu(before + 1)?
        .f_narrow(1, 0, columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_like_length_are_grouped() {
        let groups = |rows: &[(usize, i64)]| -> Vec<(usize, usize)> {
            grouped(rows).into_iter().map(|group| (group.start, group.end)).collect()
        };
        assert_eq!(groups(&[(0, 300), (1, 310), (2, 290)]), [(0, 3)]);
        assert_eq!(groups(&[(0, 300), (2, 310), (3, 290)]), [(0, 1), (1, 3)], "no slot 1");
        assert_eq!(groups(&[(0, 2000), (1, 2000), (2, 60), (3, 50)]), [(0, 2), (2, 4)]);
        // Short rows are not worth a call each.
        assert_eq!(groups(&[(0, 120), (1, 10), (2, 20)]), [(0, 3)]);
        assert_eq!(groups(&[]), []);
    }

    #[test]
    fn rows_with_one_token_come_first_by_slot() {
        let piece = |owner, length: usize| Piece {
            owner,
            tokens: vec![1; length],
            before: 3,
            behind: None,
            wanted: 1,
        };
        let stretch = Owner::Stretch(Region { start: 0, length: 9 });
        let step = Step::new(vec![
            piece(stretch, 1),
            piece(Owner::Slot(2), 1),
            piece(Owner::Slot(1), 5),
            piece(Owner::Slot(0), 1),
        ]);
        let owners: Vec<_> = step.pieces.iter().map(|piece| piece.owner).collect();
        let slots = [0, 2].map(Owner::Slot);
        assert_eq!(owners, [slots[0], slots[1], stretch, Owner::Slot(1)]);
    }
}
