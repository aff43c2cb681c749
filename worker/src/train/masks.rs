//! What the queries of a pair may not see.

use tch::{Device, Kind, TchError, Tensor};

use super::packing::Span;
use crate::model::ops::causal_mask;

/// The masks of a pair's two calls, `[x, y⁺]` and y⁻ behind x: 0 or −∞ in `[queries, keys]`.
#[derive(Debug)]
pub(super) struct PairMasks {
    /// Of y⁻'s queries and `[x, y⁻]`.
    rejected: Tensor,
    /// Both calls' in blocks with a window, where the pair is longer than that.
    windowed: Option<[Tensor; 2]>,
}

impl PairMasks {
    /// In `kind` on `device`; `window` is that of the model's blocks that have one.
    pub(super) fn new(
        span: &Span,
        window: Option<i64>,
        kind: Kind,
        device: Device,
    ) -> Result<Self, TchError> {
        let [chosen, rejected] = [span.prompt + span.chosen, span.prompt + span.rejected];
        let of = |before, keys, window| {
            causal_mask(before, [keys - before, keys], window, (kind, device))
        };
        let windowed = match window {
            // Positions of y⁻ go on from x, so the distance to x's tokens is as in `[x, y⁻]`.
            Some(length) if length < chosen.max(rejected) => {
                Some([of(0, chosen, window)?, of(span.prompt, rejected, window)?])
            }
            _ => None,
        };
        Ok(Self { rejected: of(span.prompt, rejected, None)?, windowed })
    }

    /// Both calls' in blocks with a window or without: none is plainly causal.
    pub(super) fn of(&self, windowed: bool) -> [Option<&Tensor>; 2] {
        match &self.windowed {
            Some([chosen, rejected]) if windowed => [Some(chosen), Some(rejected)],
            _ => [None, Some(&self.rejected)],
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn masks(window: Option<i64>) -> PairMasks {
        let span = Span { start: 0, prompt: 2, chosen: 5, rejected: 3 };
        PairMasks::new(&span, window, Kind::Float, Device::Cpu).unwrap()
    }

    fn rows(mask: Option<&Tensor>) -> Vec<Vec<f32>> {
        Vec::try_from(mask.unwrap()).unwrap()
    }

    const HIDDEN: f32 = f32::NEG_INFINITY;

    #[test]
    fn rejected_tokens_see_the_prompt_and_themselves() {
        let expected =
            [[0., 0., 0., HIDDEN, HIDDEN], [0., 0., 0., 0., HIDDEN], [0., 0., 0., 0., 0.]];
        // A window that is as long as the pair hides nothing.
        for (masks, windowed) in [(masks(None), false), (masks(Some(7)), true)] {
            let [chosen, rejected] = masks.of(windowed);
            assert!(chosen.is_none());
            assert_eq!(rows(rejected), expected.map(Vec::from));
        }
    }

    #[test]
    fn a_window_counts_from_the_prompt_on_for_either_reply() {
        let masks = masks(Some(3));
        let [chosen, rejected] = masks.of(true);
        let expected = [
            [0., 0., 0., HIDDEN, HIDDEN],
            [HIDDEN, 0., 0., 0., HIDDEN],
            [HIDDEN, HIDDEN, 0., 0., 0.],
        ];
        assert_eq!(rows(rejected), expected.map(Vec::from));
        let seen: Vec<usize> =
            rows(chosen).iter().map(|row| row.iter().filter(|&&x| x == 0.0).count()).collect();
        assert_eq!(seen, [1, 2, 3, 3, 3, 3, 3]);
        // Blocks without a window are as ever.
        assert!(masks.of(false)[0].is_none());
    }
}
