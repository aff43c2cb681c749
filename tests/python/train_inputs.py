"""Models and pairs for tests/train_parity.rs and tests/train_memory.rs.

    train_inputs.py models DIR      small random models: a policy and a reference of
                                    each kind
    train_inputs.py model DIR SETTINGS
                                    one random model in bf16, of a family and with a
                                    configuration given as JSON
    train_inputs.py pairs MODEL FILE COUNT MAX_PROMPT MAX_REPLY
                                    real preference pairs as MODEL's token ids

Each prints one JSON object.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import random_models

# Of each a policy, and a reference that is another model.
CASES = {
    "llama": dict(family="llama"),
    "llama-tied": dict(family="llama", tie_word_embeddings=True, pad_token_id=2),
    "qwen2": dict(family="qwen2"),
    "qwen2-tied": dict(family="qwen2", tie_word_embeddings=True),
    "qwen3": dict(family="qwen3"),
    "mistral": dict(family="mistral", sliding_window=12),
    "gemma3": dict(family="gemma3", sliding_window=12, pad_token_id=2),
}


def models(directory):
    for name, settings in CASES.items():
        for seed, role in enumerate(["policy", "reference"]):
            torch.manual_seed(seed)
            model = random_models.create(initializer_range=0.1, **settings)
            model.save_pretrained(Path(directory) / name / role)
    return {"cases": list(CASES)}


def model(directory, settings):
    torch.manual_seed(0)
    created = random_models.create(**json.loads(settings)).bfloat16()
    created.save_pretrained(directory)
    return {"parameters": created.num_parameters()}


def pairs(tokenizer, file, count, max_prompt, max_reply):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    rows = json.loads(Path(file).read_text())
    roles = {"human": "user", "gpt": "assistant"}
    tokenized = []
    for row in rows:
        messages = [
            {"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
        ]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        replies = [
            tokenizer(row[side]["value"], add_special_tokens=False)["input_ids"]
            + [tokenizer.eos_token_id]
            for side in ("chosen", "rejected")
        ]
        if replies[0] != replies[1]:
            tokenized.append(
                {
                    "prompt": prompt[-int(max_prompt) :],
                    "chosen": replies[0][: int(max_reply)],
                    "rejected": replies[1][: int(max_reply)],
                }
            )
        if len(tokenized) == int(count):
            break
    return {"pairs": tokenized}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print(json.dumps({"models": models, "model": model, "pairs": pairs}[command](*arguments)))
