//! Distances between tokens, as rows of the embedding of distances.

use tch::{Device, Kind, TchError, Tensor};

use super::config::Positions;

/// For each query and key of a sequence of `length` the row of their distance, query's place
/// less key's: `[length, length]`, i64.
pub(super) fn rows(positions: &Positions, length: i64, device: Device) -> Result<Tensor, TchError> {
    let places = Tensor::f_arange(length, (Kind::Int64, device))?;
    let distances = places.f_unsqueeze(1)?.f_sub(&places)?;
    let distances = match positions.buckets {
        Some(buckets) => bucketed(&distances, buckets, positions.farthest)?,
        None => distances,
    };
    let span = positions.span();
    distances.f_add_scalar(span)?.f_clamp(0, 2 * span - 1)
}

/// With m = `buckets` / 2 and f = `farthest`, for a distance d, i64 as it came:
///
/// ```text
/// d                                                              |d| ≤ m
/// sign(d) (m + ⌈ln(|d| / m) / ln((f − 1) / m) · (m − 1)⌉)        beyond
/// ```
///
/// Operation for operation as transformers has it, in fp32 and over the whole matrix: a
/// distance at the edge of two buckets falls where rounding lets it fall.
fn bucketed(distances: &Tensor, buckets: i64, farthest: i64) -> Result<Tensor, TchError> {
    let middle = buckets / 2;
    let device = distances.device();
    let far = distances.f_abs()?;
    let base = Tensor::f_full([1], (farthest - 1) as f64 / middle as f64, (Kind::Float, device))?
        .f_log()?;
    let bucket = far
        .f_clamp_min(middle)?
        .f_div_scalar(middle)?
        .f_log()?
        .f_div(&base)?
        .f_mul_scalar(middle - 1)?
        .f_ceil()?
        .f_add_scalar(middle)?
        .f_mul(&distances.f_sign()?)?
        .f_to_kind(Kind::Int64)?;
    distances.f_where_self(&far.f_le(middle)?, &bucket)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn first_column(positions: &Positions, length: i64) -> Vec<i64> {
        let rows = rows(positions, length, Device::Cpu).unwrap();
        Vec::try_from(rows.select(1, 0).contiguous()).unwrap()
    }

    const PLAIN: Positions = Positions {
        farthest: 4,
        buckets: None,
        content_to_position: true,
        position_to_content: true,
        normed: true,
    };

    #[test]
    fn distances_count_both_ways_as_far_as_there_are_rows() {
        let rows = rows(&PLAIN, 3, Device::Cpu).unwrap();
        let rows: Vec<i64> = Vec::try_from(rows.view([-1])).unwrap();
        assert_eq!(rows, [4, 3, 2, 5, 4, 3, 6, 5, 4]);
        assert_eq!(first_column(&PLAIN, 7), [4, 5, 6, 7, 7, 7, 7]);
    }

    /// m = 4, f = 64: beyond 4 there are 3 buckets, which end at 4 · (63/4)^(i/3), 10.02,
    /// 25.1 and 63; what is farther falls beyond the rows, on the last.
    #[test]
    fn far_distances_share_buckets() {
        let positions = Positions { buckets: Some(8), farthest: 64, ..PLAIN };
        let rows = first_column(&positions, 100);
        let bucket = |distance: usize| rows[distance] - 8;
        assert_eq!([0, 1, 3, 4].map(bucket), [0, 1, 3, 4]);
        assert_eq!([5, 10, 11, 25, 26, 63].map(bucket), [5, 5, 6, 6, 7, 7]);
        assert_eq!([64, 99].map(bucket), [7, 7]);
    }
}
