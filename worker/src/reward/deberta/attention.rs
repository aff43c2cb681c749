//! Disentangled attention: scores of content, and of distances beside it.

use tch::{Kind, TchError, Tensor};

use super::config::{DebertaConfig, Positions};
use super::weights::{LayerWeights, Pair};

/// A layer's attention, with all that does not depend on the sequence made up front.
///
/// ```text
/// score(i, j) = (qᵢ·kⱼ + qᵢ·k'₍ᵢ₋ⱼ₎ + kⱼ·q'₍ᵢ₋ⱼ₎) / √(d n)
/// ```
///
/// where k' and q' are what the layer's own projections make of embedded distances, d is a
/// head's width and n the number of terms.
#[derive(Debug)]
pub(super) struct Attention {
    heads: i64,
    /// 1 / √(d n).
    scale: f64,
    /// k'ᵀ, `[heads, d, 2 · span]`; none without the second term.
    distance_keys: Option<Tensor>,
    /// q'ᵀ, scaled, `[heads, d, 2 · span]`; none without the third.
    distance_queries: Option<Tensor>,
}

impl Attention {
    /// `distances`, `[2 · span, hidden]`, are the embedded ones, normed where they are.
    pub(super) fn new(
        config: &DebertaConfig,
        layer: &LayerWeights<Tensor>,
        distances: &Tensor,
    ) -> Result<Self, TchError> {
        let Positions { content_to_position, position_to_content, .. } = config.positions;
        let heads = config.num_attention_heads;
        let terms = 1 + i64::from(content_to_position) + i64::from(position_to_content);
        let scale = 1.0 / ((config.hidden_size / heads * terms) as f64).sqrt();
        let [queries, keys, _] = by_head(&layer.qkv, distances, heads)?;
        let turned = |x: &Tensor| x.f_transpose(1, 2)?.f_contiguous();
        let distance_keys = content_to_position.then(|| turned(&keys)).transpose()?;
        let distance_queries =
            position_to_content.then(|| turned(&queries.f_mul_scalar(scale)?)).transpose()?;
        Ok(Self { heads, scale, distance_keys, distance_queries })
    }

    /// `h` (`[tokens, hidden]`) → what its tokens attend to, as `h`; `rows`, `[tokens,
    /// tokens]`, are the distances' rows.
    pub(super) fn forward(
        &self,
        qkv: &Pair<Tensor>,
        h: &Tensor,
        rows: &Tensor,
    ) -> Result<Tensor, TchError> {
        let [queries, keys, values] = by_head(qkv, h, self.heads)?;
        let queries = queries.f_mul_scalar(self.scale)?;
        let mut scores = queries.f_matmul(&keys.f_transpose(1, 2)?)?;
        let shape = scores.size();
        let at = |by_row: &Tensor, rows: &Tensor| {
            by_row.f_gather(2, &rows.f_expand(shape.as_slice(), false)?, false)
        };
        if let Some(distance_keys) = &self.distance_keys {
            let _ = scores.f_add_(&at(&queries.f_matmul(distance_keys)?, rows)?)?;
        }
        if let Some(distance_queries) = &self.distance_queries {
            // By keys first: they are who looks here.
            let of_keys = at(&keys.f_matmul(distance_queries)?, &rows.f_tr()?)?;
            let _ = scores.f_add_(&of_keys.f_transpose(1, 2)?)?;
        }
        let attended = scores.f_softmax(-1, None::<Kind>)?.f_matmul(&values)?;
        attended.f_transpose(0, 1)?.f_reshape(h.size())
    }
}

/// Queries, keys and values of `x` (`[rows, hidden]`), each `[heads, rows, d]`.
fn by_head(qkv: &Pair<Tensor>, x: &Tensor, heads: i64) -> Result<[Tensor; 3], TchError> {
    let (rows, hidden) = x.size2()?;
    let all = qkv.linear(x)?.f_view([rows, 3, heads, hidden / heads])?.f_permute([1, 2, 0, 3])?;
    Ok([all.f_select(0, 0)?, all.f_select(0, 1)?, all.f_select(0, 2)?])
}
