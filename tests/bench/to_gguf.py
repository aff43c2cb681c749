"""A Llama or Qwen2 model in Hugging Face format as GGUF: its weights, and no vocabulary."""

import json
import os
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
}


def permuted(weight, heads):
    """llama.cpp turns neighbouring elements of a Llama's heads, transformers halves."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def convert(model_dir, dtype, path):
    """Writes `path`, unless it is there and newer than the model."""
    model_dir, path = Path(model_dir), Path(path)
    files = sorted(model_dir.glob("*.safetensors"))
    if path.exists() and all(path.stat().st_mtime > file.stat().st_mtime for file in files):
        return
    config = json.loads((model_dir / "config.json").read_text())
    if config.get("rope_scaling"):
        raise SystemExit(f"error: {model_dir} scales its positions, which is not converted")
    arch = ARCHITECTURES[config["architectures"][0]]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    blocks = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, blocks)

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(aside, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    kind = {"bf16": Kind.BF16, "f32": Kind.F32}[dtype]
    for file in files:
        for name, weight in load_file(file).items():
            weight = weight.to(torch.float32)
            if arch == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
                weight = permuted(weight, heads)
            elif arch == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
                weight = permuted(weight, kv_heads)
            # Norms and biases are fp32 in every GGUF.
            stored = kind if weight.dim() == 2 else Kind.F32
            data = gguf.quants.quantize(weight.numpy(), stored)
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(known, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.rename(path)
