//! Weights as oneDNN lays them out for products with few rows.
//!
//! Such a product takes as long as reading its weight, and from a weight that lies row after
//! row libtorch's libraries read at half the memory's rate or less. Of SmolLM2's blocks a
//! product with 16 rows takes 26 ms in bf16 (AVX-512 BF16, no AMX) and 69 ms in fp32, from
//! packed weights 16 and 29; with one row 17 and 40, and 13 and 26.
//!
//! libtorch has the operators, which `torch.compile` uses for frozen weights, but no function
//! of its interface names them. A script does.

use std::io::{Cursor, Write};
use std::sync::LazyLock;

use tch::{CModule, Device, IValue, TchError, Tensor};
use zip::write::FileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Rows that weights are laid out for; with others they are multiplied, too.
const ROWS: i64 = 16;

/// A module that calls the operators.
const SCRIPT: &str = r#"class Packed(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  def pack(self: __torch__.Packed, weight: Tensor, rows: int) -> Tensor:
    return ops.mkldnn._reorder_linear_weight(weight, rows)
  def multiply(self: __torch__.Packed, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return ops.mkldnn._linear_pointwise(x, weight, bias, "none", annotate(List[Optional[number]], []), "")
"#;

/// The module's one object, pickled: `Packed` with `training = False`.
const OBJECT: &[u8] = b"\x80\x02c__torch__\nPacked\n)\x81}X\x08\x00\x00\x00training\x89sb.";

/// No constants: an empty tuple, pickled.
const CONSTANTS: &[u8] = b"\x80\x02).";

static MODULE: LazyLock<Result<CModule, String>> =
    LazyLock::new(|| load().map_err(|error| format!("mkldnn operators: {error}")));

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
        archive.start_file(format!("packed/{name}"), options)?;
        archive.write_all(content)?;
    }
    let mut file = archive.finish()?;
    file.set_position(0);
    CModule::load_data(&mut file)
}

fn call(method: &str, arguments: &[IValue]) -> Result<Tensor, TchError> {
    let module = MODULE.as_ref().map_err(|error| TchError::Torch(error.clone()))?;
    match module.method_is(method, arguments)? {
        IValue::Tensor(tensor) => Ok(tensor),
        other => Err(TchError::Torch(format!("{method} gave {other:?}"))),
    }
}

/// `weight` (`[out, in]`) for [`multiply`]: a copy that nothing else can read. Itself on a
/// GPU, and on processors whose libraries lay nothing out.
pub(crate) fn pack(weight: &Tensor) -> Result<Tensor, TchError> {
    if cfg!(not(target_arch = "x86_64")) || weight.device() != Device::Cpu {
        return Ok(weight.shallow_clone());
    }
    call("pack", &[IValue::Tensor(weight.shallow_clone()), IValue::Int(ROWS)])
}

/// `x` (`[rows, in]`) times a packed `weight`'s transpose, plus `bias` (`[out]`):
/// `[rows, out]`.
pub(super) fn multiply(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    // Of a single row oneDNN takes the sums in another order. With a second one it takes as
    // long, and a row's bits do not tell whether others are beside it.
    let rows = x.size()[0];
    let x = if rows == 1 { x.f_repeat([2, 1])? } else { x.shallow_clone() };
    let bias = bias.map_or(IValue::None, |bias| IValue::Tensor(bias.shallow_clone()));
    let weight = IValue::Tensor(weight.shallow_clone());
    call("multiply", &[IValue::Tensor(x), weight, bias])?.f_narrow(0, 0, rows)
}
