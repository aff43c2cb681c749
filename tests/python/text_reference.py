"""What transformers makes of conversations: the reference for text_parity.

    text_reference.py templates
        JSON: versions, and every chat template that the installed TRL ships.
    text_reference.py render MODEL_DIR REQUEST.json OUT_DIR
        REQUEST: {"today": [y, m, d], "jobs": [{"name", "template", "cases": [
        {"messages", "add_generation_prompt"}]}]}; a null template is the model's own.
        Writes OUT_DIR/distinct.jsonl, one line per distinct text that was rendered:
        {"text", "ids"}; and OUT_DIR/NAME.jsonl, one line per case: {"text": line
        of distinct.jsonl, from 0} or {"refused": message} or {"failed": message}.
    text_reference.py tokenizer OUT_DIR TEXT_FILE
        Writes a model directory with a Unigram tokenizer trained on TEXT_FILE that
        normalises, prepends a BOS, and carries truncation and padding.
"""

import json
import sys
from importlib import metadata
from importlib.resources import files
from pathlib import Path

TEXTS = "distinct.jsonl"


def templates():
    shipped = files("trl") / "chat_templates"
    print(
        json.dumps(
            {
                "versions": {
                    name: metadata.version(name)
                    for name in ("transformers", "trl", "jinja2", "tokenizers")
                },
                "templates": {
                    entry.name.removesuffix(".jinja"): entry.read_text(encoding="utf-8")
                    for entry in sorted(shipped.iterdir(), key=lambda entry: entry.name)
                    if entry.name.endswith(".jinja")
                },
            }
        )
    )


def render(model_dir, request, out_dir):
    import datetime
    import os

    # Set before the library is loaded; batches are encoded on all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import jinja2
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    request = json.loads(Path(request).read_text(encoding="utf-8"))
    today = datetime.datetime(*request["today"])

    class FixedClock:
        @staticmethod
        def now():
            return today

    chat_template_utils.datetime = FixedClock
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    places = {}  # of the distinct texts, in the order of their first appearance
    direct = {}  # ids of those that the model's own template rendered
    for job in request["jobs"]:
        with open(Path(out_dir) / f"{job['name']}.jsonl", "w", encoding="utf-8") as out:
            for case in job["cases"]:
                arguments = {
                    "conversation": [
                        {"role": m["role"], "content": m["content"]} for m in case["messages"]
                    ],
                    "chat_template": job["template"],
                    "add_generation_prompt": case["add_generation_prompt"],
                }
                try:
                    text = tokenizer.apply_chat_template(tokenize=False, **arguments)
                except Exception as error:  # a template may raise anything
                    own = type(error) is jinja2.exceptions.TemplateError
                    answer = {"refused" if own else "failed": str(error)}
                else:
                    answer = {"text": places.setdefault(text, len(places))}
                    if job["template"] is None and text not in direct:
                        direct[text] = tokenizer.apply_chat_template(tokenize=True, **arguments)
                out.write(json.dumps(answer) + "\n")

    # What apply_chat_template(tokenize=True) calls, for all distinct texts at once.
    texts = list(places)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for text, expected in direct.items():
        assert ids[places[text]] == expected, f"transformers differs from itself: {text!r}"
    with open(Path(out_dir) / TEXTS, "w", encoding="utf-8") as out:
        for text, row in zip(texts, ids, strict=True):
            out.write(json.dumps({"text": text, "ids": row}) + "\n")


def tokenizer(out_dir, text_file):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("  ", " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>", "<turn>", "<end_of_turn>"]
    backend.train(
        [text_file],
        trainers.UnigramTrainer(
            vocab_size=2000, special_tokens=specials, unk_token="<unk>", show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.enable_truncation(16)
    backend.enable_padding(length=32, pad_id=2, pad_token="</s>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate: ' ~ m['role'] ~ ' at ' ~ loop.index0) }}{% endif %}"
        "<turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    fast.save_pretrained(out_dir)
    out = Path(out_dir)
    # A token that only the configuration declares, as some published models have.
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"][str(backend.get_vocab_size())] = {
        "content": "<late>",
        "lstrip": True,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    stop = backend.token_to_id("<end_of_turn>")
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    # transformers drops these on saving; published files have them.
    saved = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    saved["truncation"] = {
        "direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0,
    }
    saved["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "</s>",
    }
    (out / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")


if __name__ == "__main__":
    {"templates": templates, "render": render, "tokenizer": tokenizer}[sys.argv[1]](*sys.argv[2:])
