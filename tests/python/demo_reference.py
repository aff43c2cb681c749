"""Loads a published checkpoint as a user would, and answers greedily.

Arguments: the checkpoint, and the type that it must be of. Prints JSON: prompts and
greedy replies as token ids, stop ids, versions.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    "How many minutes are there in two and a half hours?",
    "Name three fruits, one per line.",
    "Rewrite politely: give me the report now.",
]

folder, dtype = sys.argv[1:]
torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(folder)
auto = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
assert auto.dtype == getattr(torch, dtype), auto.dtype
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
stop = model.generation_config.eos_token_id
prompts, greedy = [], []
for question in QUESTIONS:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32
        )
    prompts.append(ids[0].tolist())
    greedy.append(out[0, ids.shape[1] :].tolist())
print(
    json.dumps(
        {
            "transformers": transformers.__version__,
            "prompts": prompts,
            "greedy": greedy,
            "stop_ids": stop if isinstance(stop, list) else [stop],
        }
    )
)
