"""Small reward models with their tokenizers, and what transformers makes of texts for them.

    reward_text.py pair DIR TEXT_FILE
        A random DeBERTa-v2 in DIR, with a Unigram tokenizer trained on TEXT_FILE.
    reward_text.py chat DIR MODEL_DIR
        The decoder of MODEL_DIR with a random head of one label in DIR.
    reward_text.py sequences DIR REQUEST.json
        REQUEST: [[question, answer], ...] for a DeBERTa-v2, [[message, ...], ...] for a
        decoder. Prints {"versions", "ids"}.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def pair(directory, text_file):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=2000, special_tokens=SPECIAL, unk_token="[UNK]")
    tokenizer.train([text_file], trainer)
    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), SPECIAL))
    file = Path(directory) / "trained.json"
    Path(directory).mkdir()
    tokenizer.save(str(file))
    fast = transformers.DebertaV2TokenizerFast(tokenizer_file=str(file), model_max_length=512, **names)
    file.unlink()
    fast.save_pretrained(directory)
    torch.manual_seed(7)
    config = transformers.DebertaV2Config(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        position_buckets=32,
        relative_attention=True,
        share_att_key=True,
        type_vocab_size=0,
        initializer_range=0.2,
        num_labels=1,
    )
    model = transformers.DebertaV2ForSequenceClassification(config)
    model.save_pretrained(directory)


def chat(directory, model_dir):
    torch.manual_seed(7)
    config = transformers.AutoConfig.from_pretrained(model_dir, num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_dir, config=config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(directory)
    for name in TEXT_FILES:
        if (Path(model_dir) / name).exists():
            shutil.copy(Path(model_dir) / name, directory)


def sequences(directory, request):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    request = json.loads(Path(request).read_text(encoding="utf-8"))
    if tokenizer.chat_template:
        ids = [tokenizer.apply_chat_template(messages) for messages in request]
    else:
        ids = [tokenizer(question, answer, truncation=True, max_length=512)["input_ids"] for question, answer in request]
    print(json.dumps({"versions": f"transformers {transformers.__version__}", "ids": ids}))


if __name__ == "__main__":
    {"pair": pair, "chat": chat, "sequences": sequences}[sys.argv[1]](*sys.argv[2:])
