"""Small models with random weights, none of which is at a value that would hide a mistake."""

import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig),
}
RATING = {
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config),
    "llama": (LlamaForSequenceClassification, LlamaConfig),
    "mistral": (MistralForSequenceClassification, MistralConfig),
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config),
    "qwen3": (Qwen3ForSequenceClassification, Qwen3Config),
    "gemma3": (Gemma3TextForSequenceClassification, Gemma3TextConfig),
}
SETTINGS = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
# What a family has of its own: a scale that is not head_dim's, and windows shorter than
# what tests read.
OWN = {
    # As DeBERTa-v3 has it, but for few buckets and a farthest distance that tests pass.
    "deberta": dict(
        max_position_embeddings=512,
        max_relative_positions=64,
        norm_rel_ebd="layer_norm",
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        position_buckets=8,
        relative_attention=True,
        share_att_key=True,
        type_vocab_size=0,
    ),
    "mistral": dict(sliding_window=24),
    "qwen3": dict(head_dim=24),
    "gemma3": dict(
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
}


def settings_of(family, **settings):
    """The configuration of a small model of `family`; `settings` go over its own."""
    return {**SETTINGS, **OWN.get(family, {}), **settings}


def create(family, **settings):
    """A model of `family`, drawn from torch's generator; `settings` go over its own."""
    architecture, config = FAMILIES[family]
    return drawn(architecture(config(**settings_of(family, **settings))))


def rating(family, **settings):
    """As `create`: a model that rates sequences, by one number."""
    architecture, config = RATING[family]
    return drawn(architecture(config(num_labels=1, **settings_of(family, **settings))))


def multimodal():
    """A Gemma-3 with a vision tower; the highest ids stand for images."""
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    config = Gemma3Config(
        text_config=settings_of("gemma3", initializer_range=0.2),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=128,
        eoi_token_index=129,
        image_token_index=130,
    )
    return drawn(Gemma3ForConditionalGeneration(config))


def drawn(model):
    """`model`, with what transformers starts at 0 or 1 drawn too."""
    # Gemma's norms multiply by 1 + w.
    lowest = -0.5 if "Gemma3" in type(model).__name__ else 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name.lower():
                parameter.uniform_(lowest, lowest + 1.0)
    return model
