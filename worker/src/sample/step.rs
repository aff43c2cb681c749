//! One forward pass over the new tokens of all rows, packed.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use super::attend::{Attention, Beginning, Calls, Group, Run};
use super::cache::{KvCache, Region};
use super::prefix::Prefixes;
use crate::host;
use crate::model::Decoder;
use crate::model::ops::{aligned, causal_mask};

/// Columns that padding may add to a group: a share of what its rows hold, and what a
/// call of its own would cost anyway.
const PADDING_SHARE: f64 = 0.25;
const PADDING_COLUMNS: i64 = 256;

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
        let upload = |values: &[i64]| host::upload(values, device);
        let furthest = positions.iter().copied().max().unwrap_or(0);
        let group = model.config.num_attention_heads / model.config.num_key_value_heads;
        let context = Context { cache, prefixes, stretches, positions: &positions, group };
        let options = (model.kind(), device);
        let attention = Attention {
            calls: self.calls(&context, None, options)?,
            // Up to its length a window hides nothing.
            windowed: match model.window() {
                Some(window) if furthest >= window => {
                    Some(self.calls(&context, Some(window), options)?)
                }
                _ => None,
            },
            places: upload(&places)?,
            cache,
        };
        let rotations = model.rotations(&upload(&positions)?)?;
        let mut h = model.embed(&upload(&ids)?)?;
        for (layer, block) in model.blocks.iter().enumerate() {
            h = block
                .forward(&h, &rotations, &mut |q, k, v| attention.forward(layer, block, q, k, v))?;
        }
        if wanted.len() == ids.len() {
            return Ok(h);
        }
        h.f_index_select(0, &upload(&wanted)?)
    }

    fn calls(
        &self,
        context: &Context<'_>,
        window: Option<i64>,
        options: Options,
    ) -> Result<Calls, TchError> {
        Ok(Calls {
            groups: self.groups(window, options)?,
            runs: self.runs(context, window, options)?,
            beginnings: self.beginnings(context, window, options)?,
        })
    }

    fn groups(&self, window: Option<i64>, options: Options) -> Result<Vec<Group>, TchError> {
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
                mask: padding_mask(&lengths, columns, window, options)?,
            })
        };
        grouped(&rows).into_iter().map(group).collect()
    }

    fn runs(
        &self,
        &Context { cache, group, .. }: &Context<'_>,
        window: Option<i64>,
        options: Options,
    ) -> Result<Vec<Run>, TchError> {
        let mut start = 0;
        let mut runs = Vec::new();
        for piece in &self.pieces {
            let (length, before) = (piece.tokens.len() as i64, piece.before as i64);
            if !piece.is_single() {
                let columns = before + length;
                let mask = match (before, window.filter(|&window| window < columns)) {
                    (0, None) => None,
                    (_, window) => {
                        let mask = causal_mask(before, [length, columns], window, options)?;
                        Some(for_each_head(&mask, group)?)
                    }
                };
                runs.push(Run { start, length, region: region(cache, piece), before, mask });
            }
            start += length;
        }
        Ok(runs)
    }

    /// Every shared stretch behind which a piece stands, once, if any of it is in sight.
    fn beginnings(
        &self,
        context: &Context<'_>,
        window: Option<i64>,
        options: Options,
    ) -> Result<Vec<Beginning>, TchError> {
        let Context { prefixes, stretches, positions, group, .. } = *context;
        let mut members = std::collections::BTreeMap::<usize, Vec<i64>>::new();
        let mut start = 0;
        for piece in &self.pieces {
            let end = start + piece.tokens.len() as i64;
            for stretch in prefixes.path(piece.behind) {
                let last = prefixes.stretches[stretch].tokens.end as i64 - 1;
                let sees = |&token: &i64| {
                    window.is_none_or(|window| positions[token as usize] - last < window)
                };
                let seeing: Vec<i64> = (start..end).filter(sees).collect();
                if !seeing.is_empty() {
                    members.entry(stretch).or_default().extend(seeing);
                }
            }
            start = end;
        }
        let beginning = |(stretch, members): (usize, Vec<i64>)| {
            let first = prefixes.stretches[stretch].tokens.start as i64;
            let out_of_sight = |window: i64| -> Vec<i64> {
                let hidden = |&token: &i64| (positions[token as usize] + 1 - window - first).max(0);
                // A line for each of the heads that share a key head.
                let lines = |hidden| std::iter::repeat_n(hidden, group as usize);
                members.iter().map(hidden).flat_map(lines).collect()
            };
            let region = stretches[stretch];
            Ok(Beginning {
                region,
                mask: match window.map(out_of_sight) {
                    Some(hidden) => beginning_mask(&hidden, region.length, options)?,
                    None => None,
                },
                members: host::upload(&members, options.1)?,
            })
        };
        members.into_iter().map(beginning).collect()
    }
}

/// Kind and device of masks.
type Options = (Kind, Device);

/// Where a step's tokens are.
struct Context<'a> {
    cache: &'a KvCache,
    prefixes: &'a Prefixes,
    /// Where the pool has each shared stretch.
    stretches: &'a [Region],
    /// Of each token its place in its conversation.
    positions: &'a [i64],
    /// Query heads to a head of keys and values.
    group: i64,
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

/// `[rows, 1, 1, columns]`: −∞ behind each row's end, and ahead of the `window` that ends
/// there; none where there is nothing.
fn padding_mask(
    lengths: &[i64],
    columns: i64,
    window: Option<i64>,
    (kind, device): Options,
) -> Result<Option<Tensor>, TchError> {
    let window = window.filter(|&window| lengths.iter().any(|&length| length > window));
    if window.is_none() && lengths.iter().all(|&length| length == columns) {
        return Ok(None);
    }
    let ends = host::upload(lengths, device)?.f_view([-1, 1, 1, 1])?;
    let aligned = aligned(columns);
    let places = Tensor::f_arange(aligned, (Kind::Int64, device))?;
    let mut hidden = places.f_ge_tensor(&ends)?;
    if let Some(window) = window {
        hidden = hidden.f_logical_or(&places.f_lt_tensor(&ends.f_sub_scalar(window)?)?)?;
    }
    let mask = Tensor::f_zeros([lengths.len() as i64, 1, 1, aligned], (kind, device))?
        .f_masked_fill_(&hidden, f64::NEG_INFINITY)?;
    Ok(Some(mask.f_narrow(3, 0, columns)?))
}

/// `[lines, columns]`: −∞ for as many of a beginning's first tokens as are out of each line's
/// sight; none where all see all.
fn beginning_mask(
    hidden: &[i64],
    columns: i64,
    (kind, device): Options,
) -> Result<Option<Tensor>, TchError> {
    if hidden.iter().all(|&tokens| tokens == 0) {
        return Ok(None);
    }
    let ends = host::upload(hidden, device)?.f_view([-1, 1])?;
    let aligned = aligned(columns);
    let hidden = Tensor::f_arange(aligned, (Kind::Int64, device))?.f_lt_tensor(&ends)?;
    let mask = Tensor::f_zeros([ends.size()[0], aligned], (kind, device))?
        .f_masked_fill_(&hidden, f64::NEG_INFINITY)?;
    Ok(Some(mask.f_narrow(1, 0, columns)?))
}

/// A mask, `[n, columns]`, with each line as often as heads share a key head; laid out as
/// masks are.
fn for_each_head(mask: &Tensor, group: i64) -> Result<Tensor, TchError> {
    let (lines, columns) = mask.size2()?;
    let options = (mask.kind(), mask.device());
    let wide = Tensor::f_zeros([lines, group, aligned(columns)], options)?;
    wide.f_narrow(2, 0, columns)?.f_copy_(&mask.f_unsqueeze(1)?)?;
    wide.f_flatten(0, 1)?.f_narrow(1, 0, columns)
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
    #[allow(clippy::unwrap_used)]
    fn heads_that_share_keys_have_a_line_each_of_an_aligned_mask() {
        let mask = causal_mask(3, [2, 5], None, (Kind::Float, Device::Cpu)).unwrap();
        let repeated = for_each_head(&mask, 3).unwrap();
        assert_eq!(repeated, mask.repeat_interleave_self_int(3, 0, None));
        assert_eq!(repeated.stride(), [aligned(5), 1]);
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
