"""What transformers rates, for tests/reward_parity.rs to compare with.

    reward_reference.py DIR     small random reward models, and their ratings

Prints one JSON object.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

import random_models

PADDING = 7
# Each is named for what it has of its own.
CASES = {
    "deberta": dict(family="deberta"),
    "deberta-list": dict(family="deberta", pos_att_type=["c2p", "p2c"], layer_norm_eps=1e-3),
    "deberta-c2p": dict(family="deberta", pos_att_type="c2p"),
    "deberta-p2c": dict(family="deberta", pos_att_type="p2c"),
    "deberta-wide": dict(
        family="deberta",
        hidden_size=96,
        intermediate_size=200,
        num_attention_heads=2,
        max_relative_positions=-1,
        position_buckets=32,
    ),
    "deberta-deep": dict(family="deberta", num_hidden_layers=12, num_attention_heads=8),
    "deberta-no-buckets": dict(family="deberta", position_buckets=-1),
    "deberta-no-norm": dict(family="deberta", norm_rel_ebd="none"),
    "llama": dict(family="llama"),
    "llama-padding": dict(family="llama", pad_token_id=PADDING),
    "mistral": dict(family="mistral"),
    "qwen2-tied": dict(family="qwen2", tie_word_embeddings=True),
    "qwen3": dict(family="qwen3"),
    "gemma3": dict(family="gemma3", pad_token_id=PADDING),
}
# Within and far beyond the buckets' range, and windows.
LENGTHS = (1, 2, 3, 5, 9, 17, 40, 64, 65, 66, 130, 300, 512)


def sequences():
    drawn = [torch.randint(0, 131, (length,)).tolist() for length in LENGTHS]
    # Ends with what some of the models pad with; one is nothing else.
    return drawn + [drawn[6] + [PADDING] * 3, [PADDING] * 4]


def rate(directory):
    torch.manual_seed(20254)
    asked = sequences()
    ratings = {}
    for name, settings in CASES.items():
        # So wide that where a token stands matters as much as what it is.
        model = random_models.rating(initializer_range=0.2, **settings).eval().float()
        model.save_pretrained(Path(directory) / name)
        with torch.inference_mode():
            logits = [model(torch.tensor([ids])).logits for ids in asked]
        assert all(one.shape == (1, 1) for one in logits)
        ratings[name] = [one.item() for one in logits]
    return {"sequences": asked, "ratings": ratings}


def main():
    torch.set_num_threads(2)
    result = rate(*sys.argv[1:])
    result["versions"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
