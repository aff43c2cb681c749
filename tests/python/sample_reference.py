"""What transformers samples, for tests/sample_parity.rs to compare with.

    sample_reference.py prompts MODEL DATA DIR  64 real prompts, and small random models
    sample_reference.py greedy FILE             which tokens of replies are not the greedy ones
    sample_reference.py survivors FILE FOLDER   scores behind the processors of `generate`
    sample_reference.py embeddings FILE OUT     normed hidden states of last tokens, of length 1

Each prints one JSON object.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import random_models
from model_reference import generated, stop_ids_of

CONVERSATIONS = 32
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
EMBEDDER = "qwen3-embedding"


def load(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def real_prompts(tokenizer, data):
    """Of each conversation the prompt before the reply that disappointed, and the one
    behind the complaint, which begins as the other does. From short to long; the last
    is longer than a step's 512 tokens of prompts."""
    with open(data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]


    def ids(turns):
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True)

    both = [
        (ids(row["prompt"]), ids(row["prompt"] + row["rejected"] + [row["user_preference"]]))
        for row in rows
    ]
    both.sort(key=lambda prompts: len(prompts[1]))
    short = [prompts for prompts in both if len(prompts[1]) <= 300]
    long = next(prompts for prompts in both if len(prompts[0]) > 512)
    count = CONVERSATIONS - 1
    chosen = [short[at * (len(short) - 1) // (count - 1)] for at in range(count)] + [long]
    return [prompt for prompts in chosen for prompt in prompts]


def save_embedder(folder, vocab_size):
    """As Qwen3-Embedding is on the hub: the tensors of the base model, under its names for
    them, and a configuration that calls it a language model."""
    model = random_models.create(
        "qwen3", vocab_size=vocab_size, initializer_range=0.2, tie_word_embeddings=True
    )
    model.model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    file.write_text(json.dumps(config))
    assert "norm.weight" in load_file(folder / "model.safetensors")


def prompts(model_dir, data, directory):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    torch.manual_seed(20252)
    for family in FAMILIES:
        # The demo model's vocabulary, so that its prompts are theirs too.
        model = random_models.create(
            family, vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=4096
        )
        model.save_pretrained(Path(directory) / family)
    save_embedder(Path(directory) / EMBEDDER, len(tokenizer))
    return {
        "prompts": real_prompts(tokenizer, data),
        "stop_ids": stop_ids_of(GenerationConfig.from_pretrained(model_dir)),
        "models": list(FAMILIES),
        "embedder": EMBEDDER,
    }


def greedy(file):
    """A reply is the greedy one if each of its tokens is the most probable behind the
    prompt and those before it: one pass over the reply says that of all of them, without
    a cache, a batch or padding. The first replies are generated too."""
    asked = json.loads(Path(file).read_text())
    model = load(asked["model"])
    differences = []
    for at, reply in asked["replies"]:
        ids = torch.tensor([asked["prompts"][at] + reply[:-1]])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=len(reply)).logits[0]
        best = logits.argmax(-1)
        for position, token in enumerate(reply):
            if best[position] != token:
                gap = logits[position, best[position]] - logits[position, token]
                differences.append(
                    {"prompt": at, "position": position, "token": token, "gap": gap.item()}
                )
    some = asked["prompts"][: asked["generate"]]
    replies = generated(model, some, asked["stop_ids"], asked["max_new_tokens"])
    return {"differences": differences, "generated": replies}


def survivors(file, folder):
    asked = json.loads(Path(file).read_text())
    tensors = load_file(Path(folder) / "logits.st")
    # What `generate` calls to make its processors, in its order.
    maker = random_models.create("llama")
    for case in asked["cases"]:
        params = case["params"]
        config = GenerationConfig(
            do_sample=True,
            temperature=params["temperature"],
            top_k=params["top_k"],
            top_p=params["top_p"],
            min_p=params["min_p"] or None,
            repetition_penalty=params["repetition_penalty"],
            min_new_tokens=params["min_new_tokens"],
        )
        config._eos_token_tensor = torch.tensor(params["stop_ids"])
        # In fp64, or a running sum over a vocabulary would be off by more than ours may be.
        logits = tensors[case["logits"]].double()
        scores = []
        for row, context in zip(logits, case["contexts"]):
            ids = torch.tensor([context["prompt"] + context["reply"]])
            processors = maker._get_logits_processor(
                config, input_ids_seq_length=len(context["prompt"]), device="cpu"
            )
            scores.append(processors(ids, row.unsqueeze(0).clone()))
        save_file({"scores": torch.cat(scores).float()}, Path(folder) / f"{case['name']}.st")
    return {}


def embeddings(file, out):
    asked = json.loads(Path(file).read_text())
    embedded = {}
    for name, model_dir in asked["models"].items():
        model = load(model_dir).model
        with torch.inference_mode():
            last = [model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in asked["prompts"]]
        embedded[name] = torch.nn.functional.normalize(torch.stack(last), dim=-1)
    save_file(embedded, out)
    return {}


def main():
    torch.set_num_threads(2)
    command, *arguments = sys.argv[1:]
    commands = dict(prompts=prompts, greedy=greedy, survivors=survivors, embeddings=embeddings)
    result = commands[command](*arguments)
    result["versions"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
