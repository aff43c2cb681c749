//! Which keys a query sees, as what is added to its scores: 0 or −∞.

use tch::{Device, Kind, TchError, Tensor};

/// Columns of masks lie a multiple of this apart: GPU kernels load them so.
const ALIGNMENT: i64 = 16;

/// `columns`, rounded up to what masks are laid out in.
pub(crate) fn aligned(columns: i64) -> i64 {
    (columns + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT
}

/// `[queries, keys]` for queries of which the first stands `before` tokens behind the first
/// key: query i sees the keys up to `before` + i, or with a `window` the last so many of
/// them, its own included.
pub(crate) fn causal_mask(
    before: i64,
    [queries, keys]: [i64; 2],
    window: Option<i64>,
    (kind, device): (Kind, Device),
) -> Result<Tensor, TchError> {
    let hidden = || Tensor::f_full([queries, aligned(keys)], f64::NEG_INFINITY, (kind, device));
    let later = hidden()?.f_triu(before + 1)?;
    let mask = match window {
        None => later,
        Some(window) => later.f_add(&hidden()?.f_tril(before - window)?)?,
    };
    mask.f_narrow(1, 0, keys)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn seen(before: i64, shape: [i64; 2], window: Option<i64>) -> Vec<Vec<i64>> {
        let mask = causal_mask(before, shape, window, (Kind::Float, Device::Cpu)).unwrap();
        let row = |row: Vec<f32>| -> Vec<i64> {
            assert!(row.iter().all(|&x| x == 0.0 || x == f32::NEG_INFINITY), "{row:?}");
            (0..).zip(row).filter(|(_, x)| *x == 0.0).map(|(at, _)| at).collect()
        };
        Vec::<Vec<f32>>::try_from(&mask).unwrap().into_iter().map(row).collect()
    }

    #[test]
    fn a_query_sees_what_is_before_it_as_far_as_its_window() {
        assert_eq!(seen(0, [3, 3], None), [vec![0], vec![0, 1], vec![0, 1, 2]]);
        assert_eq!(seen(2, [2, 4], None), [vec![0, 1, 2], vec![0, 1, 2, 3]]);
        assert_eq!(seen(0, [4, 4], Some(2)), [vec![0], vec![0, 1], vec![1, 2], vec![2, 3]]);
        assert_eq!(seen(2, [2, 4], Some(1)), [[2], [3]]);
        assert_eq!(seen(2, [2, 4], Some(9)), seen(2, [2, 4], None));
        // Keys that end before the queries begin.
        assert_eq!(seen(5, [3, 4], Some(3)), [vec![3], vec![], vec![]]);
    }
}
