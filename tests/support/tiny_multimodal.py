"""A tiny Gemma 4 with a vision tower, its processor and a word-level tokenizer, written by transformers.

70 soft tokens an image is the least the image processor takes, so an image is wider than both windows (64
and 32) and than every block. A square image has 64 of them, each 3 x 3 patches of 4 x 4 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4TextConfig,
    Gemma4VideoProcessor,
    PreTrainedTokenizerFast,
)

# Ids as in Gemma 4 where they are small there, else the first free ones.
CONTROL = {
    "pad_token": ("<pad>", 0),
    "eos_token": ("<eos>", 1),
    "bos_token": ("<bos>", 2),
    "unk_token": ("<unk>", 3),
    "boi_token": ("<|image>", 4),
    "eoi_token": ("<image|>", 5),
    "image_token": ("<|image|>", 6),
    "boa_token": ("<|audio>", 7),
    "eoa_token": ("<audio|>", 8),
    "audio_token": ("<|audio|>", 9),
    "video_token": ("<|video|>", 10),
}
FIRST_WORD = 11
IMAGE_TOKEN_ID = CONTROL["image_token"][1]
PLACEHOLDERS = {CONTROL[name][1] for name in ("image_token", "audio_token", "video_token")}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 1024,
    "default_output_length": 70,
    "standardize": True,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "output_proj_dims": 48,
    "subsampling_conv_channels": [128, 8],  # the first is also the number of mel bands
}
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}{% if m.content is string %} {{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %} <|image|>{% elif part.type == 'video' %} <|video|>"
    "{% elif part.type == 'audio' %} <|audio|>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer(vocab_size: int = 512, names: Mapping[int, str] | None = None) -> PreTrainedTokenizerFast:
    """Words ``w11`` … ``w511`` with their ids in the name, or ``names``, and Gemma 4's control tokens."""
    words = {i: f"w{i}" for i in range(FIRST_WORD, vocab_size)} | dict(names or {})
    vocab = dict(CONTROL.values()) | {word: i for i, word in words.items()}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {name: text for name, (text, _) in CONTROL.items()}
    extra = {name: named.pop(name) for name in ("boi_token", "eoi_token", "image_token")}
    extra |= {name: named.pop(name) for name in ("boa_token", "eoa_token", "audio_token")}
    named.pop("video_token")
    made = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=extra, **named)
    made.chat_template = CHAT_TEMPLATE
    return made


def processor(vocab_size: int = 512) -> Gemma4Processor:
    sizes = {"patch_size": VISION["patch_size"], "pooling_kernel_size": VISION["pooling_kernel_size"]}
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(max_soft_tokens=70, **sizes),
        tokenizer=tokenizer(vocab_size),
        video_processor=Gemma4VideoProcessor(max_soft_tokens=70, **sizes),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=70,
    )


def config(text: Gemma4TextConfig, **changes: Any) -> Gemma4Config:
    ids = {f"{name}_id": i for name, (_, i) in CONTROL.items() if name.startswith(("bo", "eo", "im", "au", "vi"))}
    ids["eoa_token_index"] = ids["eoa_token_id"]
    return Gemma4Config(text_config=text, vision_config=VISION, **({"audio_config": None} | ids | changes))


def save(text: Gemma4TextConfig, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a float32 ``Gemma4ForConditionalGeneration`` with its processor; random weights, norms too."""
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(config(text, **changes)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "position_embedding" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif "embed_tokens" not in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    processor(text.vocab_size).save_pretrained(folder)
    generation = {"eos_token_id": [1], "bos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
