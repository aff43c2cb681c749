"""transformers' side of `bench sample`: `generate` on the prompts of a job, timed.

    sample_generate.py JOB

JOB is the JSON file that our side reads too (tests/bench/sample.rs). Prompts go in
batches of a fixed size, in their order, as the paper's own script has it. Prints one JSON
object: what the run measured.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from peak import peak_bytes


def run(job):
    torch.set_num_threads(job["threads"])
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[job["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    params = job["params"]
    stop_ids = params["stop_ids"]
    pad = stop_ids[0]

    def replies(prompts, max_new_tokens):
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=params["temperature"],
                top_p=params["top_p"],
                top_k=0,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=pad,
            )
        return output[:, longest:].tolist()

    batches = [
        job["prompts"][start : start + job["batch"]]
        for start in range(0, len(job["prompts"]), job["batch"])
    ]
    # Not timed: a first step, in which a process gets its memory.
    replies(batches[0], 2)
    lengths = []
    torch.manual_seed(job["seed"])
    begun = time.perf_counter()
    for prompts in batches:
        for reply in replies(prompts, params["max_new_tokens"]):
            ends = [at for at, token in enumerate(reply) if token in stop_ids]
            lengths.append(ends[0] + 1 if ends else len(reply))
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "lengths": lengths,
        "peak_bytes": peak_bytes(),
        "work": None,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = run(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(measured))
