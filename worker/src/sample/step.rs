//! One forward pass over the new tokens of all rows, packed.

use tch::{Device, Kind, TchError, Tensor};

use super::attend::{Attention, Beginning, Calls, Held, Run};
use super::cache::{KvCache, PAGE, Region};
use super::paged::{Decoding, Paged};
use super::pages::Pages;
use super::prefix::Prefixes;
use crate::host;
use crate::model::Decoder;
use crate::model::ops::{aligned, causal_mask};

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
    /// The slot of a row that decodes: all of its new tokens predict.
    fn decoding(&self) -> Option<usize> {
        match self.owner {
            Owner::Slot(slot) if self.wanted == self.tokens.len() => Some(slot),
            _ => None,
        }
    }
}

/// Where a step finds what was computed before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) pages: &'a Pages,
    pub(super) prefixes: &'a Prefixes,
    /// Where the pool has each shared stretch.
    pub(super) stretches: &'a [Region],
}

impl Memory<'_> {
    /// Where the pool has an owner's token: a region, and its place there.
    fn place(&self, owner: Owner, token: usize) -> (Region, i64) {
        match owner {
            Owner::Slot(slot) => {
                let page = self.pages.of(slot)[token / PAGE];
                (self.cache.page(page), (token % PAGE) as i64)
            }
            Owner::Stretch(region) => (region, token as i64),
        }
    }
}

/// A step: its pieces in the order in which they are computed.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) pieces: Vec<Piece>,
}

impl Step {
    /// Rows that decode first, in the order of their slots.
    pub(super) fn new(mut pieces: Vec<Piece>) -> Self {
        pieces.sort_by_key(|piece| piece.decoding().map_or((true, 0), |slot| (false, slot)));
        Self { pieces }
    }

    /// Computes the pieces, and stores their keys and values: the hidden states that are
    /// wanted, `[wanted, hidden]`, piece after piece.
    pub(super) fn forward(&self, model: &Decoder, memory: &Memory<'_>) -> Result<Tensor, TchError> {
        let device = model.device();
        let (mut ids, mut positions, mut places) = (Vec::new(), Vec::new(), Vec::new());
        let mut wanted = Vec::new();
        for piece in &self.pieces {
            let length = piece.tokens.len();
            let position = (memory.prefixes.length(piece.behind) + piece.before) as i64;
            ids.extend(piece.tokens.iter().copied().map(i64::from));
            positions.extend(position..position + length as i64);
            for token in piece.before..piece.before + length {
                let (region, at) = memory.place(piece.owner, token);
                places.extend(memory.cache.rows_of(region, at));
            }
            let end = ids.len() as i64;
            wanted.extend(end - piece.wanted as i64..end);
        }
        let upload = |values: &[i64]| host::upload(values, device);
        let furthest = positions.iter().copied().max().unwrap_or(0);
        let heads = [model.config.num_attention_heads, model.config.num_key_value_heads];
        let context = Context { memory, positions: &positions, heads };
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
            cache: memory.cache,
            pages: memory.pages.used() as i64,
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
            paged: self.paged(context, window, options)?,
            runs: self.runs(context, window, options)?,
            beginnings: self.beginnings(context, window, options)?,
        })
    }

    fn paged(
        &self,
        &Context { memory: Memory { pages, .. }, heads, .. }: &Context<'_>,
        window: Option<i64>,
        options: Options,
    ) -> Result<Option<Paged>, TchError> {
        let row = |piece: &Piece| {
            let slot = piece.decoding()?;
            let (before, tokens) = (piece.before, piece.tokens.len());
            Some(Decoding { pages: pages.of(slot), before, tokens })
        };
        let rows: Vec<Decoding<'_>> = self.pieces.iter().map_while(row).collect();
        if rows.is_empty() {
            return Ok(None);
        }
        Paged::new(&rows, pages.used(), window, heads, options).map(Some)
    }

    fn runs(
        &self,
        &Context { memory, heads: [heads, kv_heads], .. }: &Context<'_>,
        window: Option<i64>,
        options: Options,
    ) -> Result<Vec<Run>, TchError> {
        let mut start = 0;
        let mut runs = Vec::new();
        for piece in &self.pieces {
            let (length, before) = (piece.tokens.len() as i64, piece.before as i64);
            if piece.decoding().is_none() {
                let tokens = before + length;
                let mask = match (before, window.filter(|&window| window < tokens)) {
                    (0, None) => None,
                    (_, window) => {
                        let mask = causal_mask(before, [length, tokens], window, options)?;
                        Some(for_each_head(&mask, heads / kv_heads)?)
                    }
                };
                let held = match piece.owner {
                    _ if before == 0 => None,
                    Owner::Stretch(region) => Some(Held::Beginning { region, tokens }),
                    Owner::Slot(slot) => {
                        let pages = memory.pages.of(slot).iter().map(|&page| page as i64);
                        let pages = host::upload(&pages.collect::<Vec<_>>(), options.1)?;
                        Some(Held::Pages { pages, tokens })
                    }
                };
                runs.push(Run { start, length, held, mask });
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
        let Context { memory, positions, heads: [heads, kv_heads] } = *context;
        let Memory { prefixes, stretches, .. } = *memory;
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
                let lines = |hidden| std::iter::repeat_n(hidden, (heads / kv_heads) as usize);
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

/// What a step's calls are made of.
struct Context<'a> {
    memory: &'a Memory<'a>,
    /// Of each token its place in its conversation.
    positions: &'a [i64],
    /// Of queries, and of keys and values.
    heads: [i64; 2],
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
    #[allow(clippy::unwrap_used)]
    fn heads_that_share_keys_have_a_line_each_of_an_aligned_mask() {
        let mask = causal_mask(3, [2, 5], None, (Kind::Float, Device::Cpu)).unwrap();
        let repeated = for_each_head(&mask, 3).unwrap();
        assert_eq!(repeated, mask.repeat_interleave_self_int(3, 0, None));
        assert_eq!(repeated.stride(), [aligned(5), 1]);
    }

    #[test]
    fn rows_that_decode_come_first_by_slot() {
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
