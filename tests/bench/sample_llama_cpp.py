"""llama.cpp's side of `bench sample`: a sequence for each prompt of a job, decoded
together, timed.

    sample_llama_cpp.py JOB

JOB is the JSON file that our side reads too (tests/bench/sample/). Prompts are read in
batches, then every sequence that has not ended gets a token a step, by llama.cpp's own
samplers. Prints one JSON object: what the run measured.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import llama_cpp

from peak import peak_bytes
from to_gguf import convert

# Tokens that llama.cpp is given at once, and computes at once.
BATCH = 2048
MICRO_BATCH = 512


class Batch:
    """A `llama_batch` that is filled again for each step."""

    def __init__(self, capacity):
        self.raw = llama_cpp.llama_batch_init(capacity, 0, 1)
        self.raw.n_tokens = 0

    def __len__(self):
        return self.raw.n_tokens

    def add(self, token, position, sequence, wanted):
        """Returns where the token's logits will be."""
        at = self.raw.n_tokens
        self.raw.token[at] = token
        self.raw.pos[at] = position
        self.raw.n_seq_id[at] = 1
        self.raw.seq_id[at][0] = sequence
        self.raw.logits[at] = wanted
        self.raw.n_tokens = at + 1
        return at

    def decode(self, context):
        code = llama_cpp.llama_decode(context, self.raw)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        self.raw.n_tokens = 0


def open_context(model, job):
    longest = max(map(len, job["prompts"])) + job["params"]["max_new_tokens"]
    # llama.cpp divides its cache into equal parts, a multiple of this each.
    columns = (longest + 255) // 256 * 256
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = len(job["prompts"])
    params.n_ctx = columns * len(job["prompts"])
    params.n_batch = BATCH
    params.n_ubatch = MICRO_BATCH
    params.n_threads = job["threads"]
    params.n_threads_batch = job["threads"]
    # A cache of its own for each sequence: with one for all, each attends to all.
    params.kv_unified = False
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp gave no context")
    return context


def sampler_chain(job):
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    params = job["params"]
    for sampler in (
        llama_cpp.llama_sampler_init_temp(params["temperature"]),
        llama_cpp.llama_sampler_init_top_p(params["top_p"], 1),
        llama_cpp.llama_sampler_init_dist(job["seed"]),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def sample(context, chain, job):
    """Lengths of the replies."""
    prompts, params = job["prompts"], job["params"]
    stop_ids = set(params["stop_ids"])
    batch = Batch(max(BATCH, len(prompts)))
    last, lengths = {}, [0] * len(prompts)

    def draw(wanted):
        for sequence, at in wanted:
            token = llama_cpp.llama_sampler_sample(chain, context, at)
            lengths[sequence] += 1
            if token in stop_ids or lengths[sequence] == params["max_new_tokens"]:
                last.pop(sequence, None)
            else:
                last[sequence] = token

    wanted = []
    for sequence, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            ends = position + 1 == len(prompt)
            at = batch.add(token, position, sequence, ends)
            if ends:
                wanted.append((sequence, at))
            if len(batch) == BATCH:
                batch.decode(context)
                draw(wanted)
                wanted = []
    if len(batch) > 0:
        batch.decode(context)
        draw(wanted)
    while last:
        wanted = [
            (sequence, batch.add(token, len(prompts[sequence]) + lengths[sequence] - 1, sequence, True))
            for sequence, token in last.items()
        ]
        batch.decode(context)
        draw(wanted)
    return lengths


def run(job):
    convert(job["model"], job["dtype"], job["gguf"])
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(job["gguf"].encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {job['gguf']}")
    context = open_context(model, job)
    # Not timed: a first step, in which a process gets its memory.
    first = {"prompts": job["prompts"][:1], "params": {**job["params"], "max_new_tokens": 2}}
    sample(context, sampler_chain(job), first)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    begun = time.perf_counter()
    lengths = sample(context, sampler_chain(job), job)
    seconds = time.perf_counter() - begun
    system = llama_cpp.llama_print_system_info().decode()
    return {
        "seconds": seconds,
        "lengths": lengths,
        "peak_bytes": peak_bytes(),
        "work": None,
        "versions": {"llama_cpp_python": llama_cpp.__version__, "llama_cpp_built_for": system},
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = run(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(measured))
