"""What transformers computes, for tests/model_parity.rs to compare with.

    model_reference.py random DIR            small random models, and their logits
    model_reference.py multimodal DIR        a small model with a vision tower, and its logits
    model_reference.py whole ORIGINAL SAVED  whether what Rust saved of it is whole, and its
                                             logits, beside it
    model_reference.py demo MODEL DATA FILE  logits on real prompts
    model_reference.py reload MODEL SAVED PROMPTS
                                             greedy tokens of a checkpoint that Rust
                                             saved from MODEL, and whether its tensors
                                             are MODEL's

Each prints one JSON object.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import random_models

LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# Each differs from the first in what it is named for.
CASES = {
    "llama": dict(family="llama", num_key_value_heads=4),
    "llama-grouped-tied": dict(family="llama", tie_word_embeddings=True, pad_token_id=2),
    "llama-one-kv-head": dict(family="llama", num_key_value_heads=1),
    "llama-head-dim": dict(family="llama", head_dim=24, rms_norm_eps=1e-3),
    "llama-bias": dict(family="llama", num_key_value_heads=4, attention_bias=True),
    "llama3-rope": dict(
        family="llama", num_key_value_heads=4, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE
    ),
    "llama3-rope-wide": dict(
        family="llama",
        num_key_value_heads=4,
        head_dim=64,
        rope_theta=10000.0,
        rope_scaling=LLAMA3_ROPE,
    ),
    "qwen2": dict(family="qwen2", num_key_value_heads=4),
    "qwen2-grouped-tied": dict(
        family="qwen2",
        tie_word_embeddings=True,
        rope_theta=1000000.0,
        sliding_window=131072,
        max_window_layers=2,
    ),
    "qwen2-windows": dict(
        family="qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3": dict(family="qwen3"),
    "qwen3-bias-tied": dict(family="qwen3", tie_word_embeddings=True, attention_bias=True),
    "mistral": dict(family="mistral", sliding_window=None),
    "mistral-window": dict(family="mistral"),
    "gemma3": dict(family="gemma3"),
    "gemma3-pattern": dict(
        family="gemma3",
        num_hidden_layers=7,
        layer_types=None,
        sliding_window_pattern=3,
        rope_scaling=None,
        rope_local_base_freq=500.0,
    ),
}


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().contiguous()


def refer(model, directory):
    """Saves logits of `model` on ids that stand for text."""
    ids = torch.randint(0, 128, (160,)).tolist()
    reference = {"logits": logits_of(model, ids), "ids": torch.tensor(ids)}
    save_file(reference, Path(directory) / "reference.st")


def random(directory):
    torch.manual_seed(20251)
    for name, settings in CASES.items():
        model = random_models.create(initializer_range=0.2, **settings).eval().float()
        case = Path(directory) / name
        model.save_pretrained(case)
        refer(model, case)
    return {"cases": list(CASES)}


def multimodal(directory):
    torch.manual_seed(20253)
    model = random_models.multimodal().eval()
    model.save_pretrained(directory)
    refer(model, directory)
    return {}


def whole(original_dir, saved_dir):
    file = "model.safetensors"
    original, saved = (load_file(Path(path) / file) for path in (original_dir, saved_dir))
    problems = [f"only on one side: {name}" for name in original.keys() ^ saved.keys()]
    beside = [name for name in original if not name.startswith("language_model.")]
    problems += [
        f"differs: {name}"
        for name in beside
        if original[name].dtype != saved[name].dtype
        or not torch.equal(original[name], saved[name])
    ]
    trained = [name for name in original if name not in beside]
    problems += [
        f"was not trained: {name}"
        for name in trained
        if torch.equal(original[name].to(saved[name].dtype), saved[name])
    ]
    model, info = AutoModelForCausalLM.from_pretrained(
        saved_dir, dtype=torch.float32, output_loading_info=True
    )
    problems += [f"{key}: {value}" for key, value in info.items() if value]
    refer(model.eval(), saved_dir)
    return {
        "problems": problems,
        "class": type(model).__name__,
        "beside": len(beside),
        "trained": len(trained),
    }


def generated(model, prompts, stop_ids, max_new_tokens):
    """Greedy replies; each prompt alone, so that no padding comes into it."""
    replies = []
    for ids in prompts:
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        replies.append(output[0, len(ids) :].tolist())
    return replies


def stop_ids_of(generation_config):
    stop = generation_config.eos_token_id
    return stop if isinstance(stop, list) else [stop]


def real_prompts(tokenizer, data, chunk=512):
    """Conversations of the corpus: the shortest, one of the middle, and the shortest of
    more than `chunk` tokens."""
    with open(data, encoding="utf-8") as lines:
        rows = [json.loads(line)["prompt"] for line in lines]
    ids = [tokenizer.apply_chat_template(row, add_generation_prompt=True) for row in rows]
    ids.sort(key=len)
    return [ids[0], ids[len(ids) // 2], next(row for row in ids if len(row) > chunk)]


def demo(model_dir, data, out):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts = real_prompts(AutoTokenizer.from_pretrained(model_dir), data)
    save_file({f"logits.{i}": logits_of(model, ids) for i, ids in enumerate(prompts)}, out)
    return {"prompts": prompts}


def reload(model_dir, saved_dir, prompts_file):
    asked = json.loads(Path(prompts_file).read_text())
    original = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    saved, info = AutoModelForCausalLM.from_pretrained(
        saved_dir, dtype=torch.float32, output_loading_info=True
    )
    problems = [f"{key}: {value}" for key, value in info.items() if value]
    expected, found = original.state_dict(), saved.state_dict()
    problems += [f"only on one side: {name}" for name in expected.keys() ^ found.keys()]
    problems += [
        f"differs: {name}"
        for name in expected.keys() & found.keys()
        if not torch.equal(expected[name], found[name])
    ]
    replies = generated(
        saved.eval(), asked["prompts"], asked["stop_ids"], asked["max_new_tokens"]
    )
    return {"problems": problems, "tensors": len(found), "replies": replies}


def main():
    torch.set_num_threads(2)
    command, *arguments = sys.argv[1:]
    commands = dict(
        random=random, multimodal=multimodal, whole=whole, demo=demo, reload=reload
    )
    result = commands[command](*arguments)
    result["versions"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
