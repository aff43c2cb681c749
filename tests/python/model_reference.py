"""What transformers computes, for tests/model_parity.rs to compare with.

    model_reference.py random DIR            small random models, and their logits
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
from safetensors.torch import save_file
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
}


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().contiguous()


def random(directory):
    torch.manual_seed(20251)
    for name, settings in CASES.items():
        model = random_models.create(initializer_range=0.2, **settings).eval().float()
        case = Path(directory) / name
        model.save_pretrained(case)
        ids = torch.randint(0, model.config.vocab_size, (160,)).tolist()
        save_file({"logits": logits_of(model, ids), "ids": torch.tensor(ids)}, case / "reference.st")
    return {"cases": list(CASES)}


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
    result = {"random": random, "demo": demo, "reload": reload}[command](*arguments)
    result["versions"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
