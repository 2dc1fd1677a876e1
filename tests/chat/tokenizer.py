"""A tokenizer for the chat tests: the genuine one where GEMMA4_ARTIFACTS is set, else a small one of the same build."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}

# As much of the official templates as the tests need: turns, and the open channel after a tool's response.
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'tool' %}{{ '<|tool_response>response' + m['content'] + '<tool_response|>' }}
{%- else %}{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
{{- m['content'] if m['content'] is string else (m['content'] or [{'text': ''}])[0]['text'] }}
{%- if not loop.last or m['role'] == 'user' %}{{ '<turn|>\n' }}{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{% if messages[-1]['role'] != 'tool' %}{{ '<|turn>model\n' }}
{%- elif enable_thinking %}{{ '<|channel>thought\n' }}{% endif %}{% endif %}"""


def artifacts() -> Path | None:
    """The folder of genuine artifacts, if there is one."""
    root = os.environ.get("GEMMA4_ARTIFACTS")
    return Path(root, "gemma4") if root and Path(root, "gemma4", "tokenizer", "tokenizer.json").is_file() else None


def small_tokenizer_json(ids: dict[str, int] | None = None) -> dict[str, Any]:
    """A tokenizer.json of Gemma 4's build (BPE with byte fallback, spaces as U+2581), special tokens at ``ids``."""
    special = SPECIAL if ids is None else ids
    vocab = dict(special)
    at = 1000
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = at = at + 1
    merges: list[list[str]] = []
    characters = [chr(c) for c in range(33, 127)] + ["▁", "\n", "é", "ß", "中"]
    for piece in characters:
        vocab[piece] = at = at + 1
    for word in (
        "thought",
        "call",
        "▁the",
        "▁answer",
        "▁is",
        "city",
        "Paris",
        "▁think",
        "name",
        "parameters",
        "{}",
        "<|",
    ):
        built = word[0]
        for character in word[1:]:
            if built + character not in vocab:
                vocab[built + character] = at = at + 1
                merges.append([built, character])
            built += character
    taken = set(vocab.values())
    vocab |= {f"<unused{i}>": i for i in range(max(taken)) if i not in taken}
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for t, i in special.items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def write_small(folder: Path, ids: dict[str, int] | None = None) -> Path:
    """Write the small tokenizer as a folder that ``AutoTokenizer`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer_json(ids)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_genuine(folder: Path, template: Path | None = None) -> Path:
    """The genuine tokenizer with one of the official templates (default: that of 31B)."""
    root = artifacts()
    assert root is not None
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "tokenizer" / name, folder / name)
    template = template or root / "models" / "gemma-4-31B-it" / "chat_template.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    return folder
