//! Kernels of ours for CPUs, where libtorch's operations one after another read or write much
//! more often than need be.
//!
//! They are C++: they share libtorch's threads, and vectors come from the compiler
//! (`simd.hpp`). They are registered as operators of libtorch's, and called as a script calls
//! these, so that nothing here is unsafe; each checks what it is given. Operators of libtorch's
//! own for which its interface has no function are called in the same way.

use std::io::{Cursor, Write};
use std::sync::LazyLock;

use tch::{CModule, Device, IValue, Kind, TchError, Tensor};
use zip::write::FileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A module that calls the operators.
const SCRIPT: &str = r#"class Kernels(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  def pack(self: __torch__.Kernels, weight: Tensor, rows: int) -> Tensor:
    return ops.mkldnn._reorder_linear_weight(weight, rows)
  def multiply(self: __torch__.Kernels, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return ops.mkldnn._linear_pointwise(x, weight, bias, "none", annotate(List[Optional[number]], []), "")
  def lay_out(self: __torch__.Kernels, weight: Tensor) -> Tensor:
    return ops.drift.lay_out(weight)
  def panel_outputs(self: __torch__.Kernels) -> int:
    return ops.drift.panel_outputs()
  def multiply_laid_out(self: __torch__.Kernels, x: Tensor, panels: Tensor, bias: Optional[Tensor]) -> Tensor:
    return ops.drift.multiply_laid_out(x, panels, bias)
  def paged_attention(self: __torch__.Kernels, queries: Tensor, keys: Tensor, values: Tensor, tables: Tensor, sights: Tensor, scale: float) -> Tuple[Tensor, Tensor]:
    return ops.drift.paged_attention(queries, keys, values, tables, sights, scale)
  def multiplies_by_vectors(self: __torch__.Kernels) -> bool:
    return ops.drift.multiplies_by_vectors()
  def causal_attention(self: __torch__.Kernels, queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, out: Tensor) -> Tensor:
    return ops.drift.causal_attention(queries, keys, values, scale, window, out)
  def leaders(self: __torch__.Kernels, scores: Tensor, temperature: float, depth: float) -> Tuple[Tensor, Tensor]:
    return ops.drift.leaders(scores, temperature, depth)
  def rms_norm(self: __torch__.Kernels, x: Tensor, weight: Tensor, eps: float, one_plus: bool, out: Tensor) -> NoneType:
    ops.drift.rms_norm(x, weight, eps, one_plus, out)
    return None
  def rms_norm_backward(self: __torch__.Kernels, x: Tensor, weight: Tensor, eps: float, one_plus: bool, gradient: Tensor, residual: Optional[Tensor], output: Optional[Tensor], by_input: Tensor) -> Tensor:
    return ops.drift.rms_norm_backward(x, weight, eps, one_plus, gradient, residual, output, by_input)
  def softmax_backward(self: __torch__.Kernels, both: Tensor, factor: float, window: int) -> NoneType:
    ops.drift.softmax_backward(both, factor, window)
    return None
  def rotate(self: __torch__.Kernels, x: Tensor, cos: Tensor, sin: Tensor) -> NoneType:
    ops.drift.rotate(x, cos, sin)
    return None
  def gated(self: __torch__.Kernels, gate_up: Tensor, gelu: bool, out: Tensor) -> NoneType:
    ops.drift.gated(gate_up, gelu, out)
    return None
  def gated_backward(self: __torch__.Kernels, gate_up: Tensor, gradient: Tensor, gelu: bool, activated: Tensor) -> NoneType:
    ops.drift.gated_backward(gate_up, gradient, gelu, activated)
    return None
  def rmsprop(self: __torch__.Kernels, gradient: Tensor, square_avg: Tensor, values: Tensor, rounded: Optional[Tensor], alpha: float, fresh: float, rate: float, eps: float) -> NoneType:
    ops.drift.rmsprop(gradient, square_avg, values, rounded, alpha, fresh, rate, eps)
    return None
  def adamw(self: __torch__.Kernels, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor, rounded: Optional[Tensor], clip: float, beta1: float, beta2: float, keep: float, rate: float, unbias: float, eps: float) -> NoneType:
    ops.drift.adamw(gradient, exp_avg, exp_avg_sq, values, rounded, clip, beta1, beta2, keep, rate, unbias, eps)
    return None
"#;

/// The module's one object, pickled: `Kernels` with `training = False`.
const OBJECT: &[u8] = b"\x80\x02c__torch__\nKernels\n)\x81}X\x08\x00\x00\x00training\x89sb.";

/// No constants: an empty tuple, pickled.
const CONSTANTS: &[u8] = b"\x80\x02).";

static MODULE: LazyLock<Result<CModule, String>> =
    LazyLock::new(|| load().map_err(|error| format!("the operators' script: {error}")));

/// Reads the script as a file that `torch.jit.save` could have written.
fn load() -> Result<CModule, TchError> {
    let files: [(&str, &[u8]); 4] = [
        ("data.pkl", OBJECT),
        ("code/__torch__.py", SCRIPT.as_bytes()),
        ("constants.pkl", CONSTANTS),
        ("version", b"3\n"),
    ];
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let options = FileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, content) in files {
        archive.start_file(format!("kernels/{name}"), options)?;
        archive.write_all(content)?;
    }
    let mut file = archive.finish()?;
    file.set_position(0);
    CModule::load_data(&mut file)
}

/// Calls a method of the script.
fn call(method: &str, arguments: &[IValue]) -> Result<IValue, TchError> {
    let module = MODULE.as_ref().map_err(|error| TchError::Torch(error.clone()))?;
    module.method_is(method, arguments)
}

/// `x` as an argument.
fn given(x: &Tensor) -> IValue {
    IValue::Tensor(x.shallow_clone())
}

/// The tensor that a method gave.
fn tensor(value: IValue) -> Result<Tensor, TchError> {
    match value {
        IValue::Tensor(tensor) => Ok(tensor),
        other => Err(TchError::Torch(format!("a tensor was expected, not {other:?}"))),
    }
}

/// The tensors that a method gave.
fn tensors<const N: usize>(value: IValue) -> Result<[Tensor; N], TchError> {
    let IValue::Tuple(parts) = value else {
        return Err(TchError::Torch(format!("{N} tensors were expected, not {value:?}")));
    };
    let parts: Vec<Tensor> = parts.into_iter().map(tensor).collect::<Result<_, _>>()?;
    parts.try_into().map_err(|parts| TchError::Torch(format!("{parts:?}, expected {N} tensors")))
}

/// Whether the kernels compute on tensors of `kind` on `device`.
pub(crate) fn are_for(kind: Kind, device: Device) -> bool {
    device == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16)
}

/// A weight, `[out, in]`, as oneDNN lays it out for products with so many `rows`.
pub(crate) fn pack(weight: &Tensor, rows: i64) -> Result<Tensor, TchError> {
    tensor(call("pack", &[given(weight), IValue::Int(rows)])?)
}

/// `x` (`[rows, in]`) times a packed weight's transpose, plus `bias` (`[out]`): `[rows, out]`.
pub(crate) fn multiply(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    let bias = bias.map_or(IValue::None, given);
    tensor(call("multiply", &[given(x), given(weight), bias])?)
}

/// A weight, `[out, in]`, fp32 or bf16, for [`multiply_laid_out`], if its outputs come in whole
/// panels: `[out / panel, in, panel]`, of its kind.
pub(crate) fn lay_out(weight: &Tensor) -> Result<Option<Tensor>, TchError> {
    let IValue::Int(panel) = call("panel_outputs", &[])? else {
        return Err(TchError::Torch("a panel's outputs are not a number".to_owned()));
    };
    if weight.size()[0] % panel != 0 {
        return Ok(None);
    }
    tensor(call("lay_out", &[given(weight)])?).map(Some)
}

/// `x` (`[rows, in]`) times the transpose of the weight laid out in `panels`, plus `bias`
/// (`[out]`): `[rows, out]`. All are fp32, but that `panels` may be bf16.
pub(crate) fn multiply_laid_out(
    x: &Tensor,
    panels: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    let bias = bias.map_or(IValue::None, given);
    tensor(call("multiply_laid_out", &[given(x), given(panels), bias])?)
}

/// Attention over the pages of a cache: `queries` `[tokens, heads, head_dim]`, keys and values
/// `[pages, kv_heads, page, head_dim]`; of each token its row's pages, `[tokens, most]`, and from
/// which of the row's tokens to which it sees them, `[tokens, 2]`, both i64. Scores are multiplied
/// by `scale`. What comes out, as `queries`, and the log of the softmax's denominator,
/// `[tokens, heads]`, fp32.
pub(crate) fn paged_attention(
    queries: &Tensor,
    [keys, values]: [&Tensor; 2],
    [tables, sights]: [&Tensor; 2],
    scale: f64,
) -> Result<[Tensor; 2], TchError> {
    let mut arguments = Vec::from([queries, keys, values, tables, sights].map(given));
    arguments.push(IValue::Double(scale));
    tensors(call("paged_attention", &arguments)?)
}

/// Whether this processor has vectors of eight fp32 or more, and none of the tiles (AMX) that
/// libtorch's attention is quicker with than [`causal_attention`].
pub(crate) fn multiplies_by_vectors() -> bool {
    static MULTIPLIES: LazyLock<bool> =
        LazyLock::new(|| matches!(call("multiplies_by_vectors", &[]), Ok(IValue::Bool(true))));
    *MULTIPLIES
}

/// Attention of tokens that follow one another: `queries` `[n, heads, head_dim]`, of the last n of
/// the `keys` and `values`, `[m, kv_heads, head_dim]`. Scores are multiplied by `scale`, and each
/// query sees the last `window` keys up to its own. To `out`, shaped as the queries; the log of
/// the softmax's denominator, `[heads, n]`, fp32.
pub(crate) fn causal_attention(
    [queries, keys, values]: [&Tensor; 3],
    scale: f64,
    window: i64,
    out: &Tensor,
) -> Result<Tensor, TchError> {
    let (scale, window) = (IValue::Double(scale), IValue::Int(window));
    let arguments = [given(queries), given(keys), given(values), scale, window, given(out)];
    tensor(call("causal_attention", &arguments)?)
}

/// Of each row of `scores`, `[rows, vocab]`: the best, the logs of the sums of e^score and of
/// e^((score − best) / temperature), and how many lead, being less than `depth` below the best
/// over the temperature: `[rows, 4]`, fp32. These leaders, row after row, each with its
/// id and its score over the temperature: `[n, 2]`, fp32.
pub(crate) fn leaders(
    scores: &Tensor,
    temperature: f64,
    depth: f64,
) -> Result<[Tensor; 2], TchError> {
    let arguments = [given(scores), IValue::Double(temperature), IValue::Double(depth)];
    tensors(call("leaders", &arguments)?)
}

/// RMSNorm of `x`, `[…, width]` of two dimensions or three, into `out`, which is shaped as it
/// (see [`NormScale`](crate::model::NormScale) for `one_plus`).
pub(crate) fn rms_norm(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    one_plus: bool,
    out: &Tensor,
) -> Result<(), TchError> {
    let arguments =
        [given(x), given(weight), IValue::Double(eps), IValue::Bool(one_plus), given(out)];
    call("rms_norm", &arguments).map(drop)
}

/// [`rms_norm`]'s backward, given the gradient by what came out, `gradient`: that by `x`, plus
/// `residual`, goes to `by_input`, and what came out again to `output`, all shaped as `x`.
/// Returned is that by the weight, `[width]`, fp32.
pub(crate) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    (eps, one_plus): (f64, bool),
    gradient: &Tensor,
    [residual, output]: [Option<&Tensor>; 2],
    by_input: &Tensor,
) -> Result<Tensor, TchError> {
    let (eps, one_plus) = (IValue::Double(eps), IValue::Bool(one_plus));
    let [residual, output] = [residual, output].map(|x| x.map_or(IValue::None, given));
    let (x, weight, gradient) = (given(x), given(weight), given(gradient));
    let arguments = [x, weight, eps, one_plus, gradient, residual, output, given(by_input)];
    tensor(call("rms_norm_backward", &arguments)?)
}

/// `both`, `[2, heads, queries, keys]`, in place: first log p over `factor`, where p are a
/// softmax's weights, and gradients by p; then p, and the gradients by the softmax's scores but
/// for what p's sum has to do with them. The last key is the last query's own, and a query sees
/// the last `window` keys up to its own: p of the others is 0.
pub(crate) fn softmax_backward(both: &Tensor, factor: f64, window: i64) -> Result<(), TchError> {
    let arguments = [given(both), IValue::Double(factor), IValue::Int(window)];
    call("softmax_backward", &arguments).map(drop)
}

/// Rotates `x`, `[tokens, heads, head_dim]`, in place, by `cos` and `sin`, `[tokens, head_dim]`
/// (see [`Rotary`](crate::model::Rotary)).
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(), TchError> {
    call("rotate", &[given(x), given(cos), given(sin)]).map(drop)
}

/// φ(g) ⊙ u of `gate_up`, `[rows, 2 · width]`, to `out`, `[rows, width]`; φ is `gelu` or SiLU.
pub(crate) fn gated(gate_up: &Tensor, gelu: bool, out: &Tensor) -> Result<(), TchError> {
    call("gated", &[given(gate_up), IValue::Bool(gelu), given(out)]).map(drop)
}

/// [`gated`]'s backward: overwrites `gate_up` with the gradient by it, given that by what came
/// out, `gradient`; writes what came out again to `activated`, both `[rows, width]`.
pub(crate) fn gated_backward(
    gate_up: &Tensor,
    gradient: &Tensor,
    gelu: bool,
    activated: &Tensor,
) -> Result<(), TchError> {
    let arguments = [given(gate_up), given(gradient), IValue::Bool(gelu), given(activated)];
    call("gated_backward", &arguments).map(drop)
}

/// RMSprop's update of `values`, in place, which go to `rounded` in bf16, if anywhere: with the
/// numbers α, f, r and ε, v ← αv + f g², w ← w − r g / (√v + ε). All tensors are `[n]`, contiguous,
/// and fp32 but for `rounded`.
pub(crate) fn rmsprop(
    gradient: &Tensor,
    square_avg: &Tensor,
    values: &Tensor,
    rounded: Option<&Tensor>,
    numbers: [f64; 4],
) -> Result<(), TchError> {
    let rounded = rounded.map_or(IValue::None, given);
    let mut arguments = vec![given(gradient), given(square_avg), given(values), rounded];
    arguments.extend(numbers.map(IValue::Double));
    call("rmsprop", &arguments).map(drop)
}

/// AdamW's update, as [`rmsprop`]'s: with the numbers c, β₁, β₂, k, r, u and ε, g ← cg,
/// m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g², w ← kw − r m / (√v / u + ε). `moments` are m and v.
pub(crate) fn adamw(
    gradient: &Tensor,
    [exp_avg, exp_avg_sq]: [&Tensor; 2],
    values: &Tensor,
    rounded: Option<&Tensor>,
    numbers: [f64; 7],
) -> Result<(), TchError> {
    let rounded = rounded.map_or(IValue::None, given);
    let mut arguments = Vec::from([gradient, exp_avg, exp_avg_sq, values].map(given));
    arguments.push(rounded);
    arguments.extend(numbers.map(IValue::Double));
    call("adamw", &arguments).map(drop)
}
