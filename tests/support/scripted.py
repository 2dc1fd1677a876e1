"""A Gemma 4 whose next token depends on the last one alone: where its reasoning ends is chosen by the prompt.

Its layers add nothing, so the logits are those of a table: token -> next token. Everything else of the engine is real.
The tokenizer is the demo's, with Gemma 4's control tokens at their genuine ids.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4ForCausalLM

from tests.support import tiny_models
from vllm_gemma4_spec.demo import data, template
from vllm_gemma4_spec.demo.tokenizer import CONTROL_TOKENS, VOCAB_SIZE, build

THOUGHTS = 12  # tokens of reasoning from the first to the one before <channel|>
EAGLE_NOISE = 0.3
STRENGTH = 24.0  # logit of the next token; the softcap is at 30


@functools.cache
def tokenizer() -> Any:
    dialogues = itertools.islice(data.dialogues(seed=0, held_out=False), 300)
    return build(template.prompt_text(d) + d.answer for d in dialogues)


@functools.cache
def words() -> list[int]:
    """Ids of ordinary words, each a token of its own."""
    encode = tokenizer().encode
    found = dict.fromkeys(i for name in (*data.NAMES, *data.THINGS, *data.CITIES) for i in encode(f" {name}")[:1])
    return [i for i in found if i not in CONTROL_TOKENS.values()]


def script() -> dict[int, int]:
    """The reasoning, its end, an answer of a few words, the end of the turn."""
    chain = [*words()[:THOUGHTS], CONTROL_TOKENS["<channel|>"], *words()[THOUGHTS : THOUGHTS + 6]]
    chain += [CONTROL_TOKENS["<turn|>"]]
    newline, start = tokenizer().encode("\n")[0], CONTROL_TOKENS["<|channel>"]
    label = tokenizer().encode("thought")
    first = [newline, start, *label]
    return dict(itertools.pairwise(first)) | dict(itertools.pairwise(chain)) | {label[-1]: chain[0], chain[-1]: newline}


def mistakes() -> dict[int, int]:
    """Changes for a drafter that is wrong now and then: in the reasoning, before its end, and in the answer."""
    thoughts, rest = words()[:THOUGHTS], words()[THOUGHTS : THOUGHTS + 6]
    return {thoughts[3]: rest[0], thoughts[8]: thoughts[2], rest[2]: CONTROL_TOKENS["<turn|>"]}


def prompt(left: int) -> list[int]:
    """A thinking prompt that ends inside the channel, ``left`` tokens (0 to 11) before the end of reasoning."""
    text = "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nWhat?<turn|>\n<|turn>model\n<|channel>thought\n"
    return [*tokenizer().encode(text), words()[THOUGHTS - 1 - left]]


def save(folder: Path, changes: Mapping[int, int] | None = None, **shape: Any) -> Path:
    """Write a checkpoint that follows :func:`script`, but for ``changes``; ``shape``: of its config."""
    config = tiny_models.target_config(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=256,
        tie_word_embeddings=False,
        **shape,
    )
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.zero_()
            layer.post_feedforward_layernorm.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(VOCAB_SIZE, config.hidden_size), dim=1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.model.norm.weight.fill_(1.0)
        head = 0.5 * torch.randn(VOCAB_SIZE, config.hidden_size) / config.hidden_size**0.5
        for last, following in (script() | dict(changes or {})).items():
            head[following] += STRENGTH * embeddings[last] / config.hidden_size**0.5
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106, 50], "bos_token_id": 2}')
    return folder


def save_eagle(folder: Path) -> Path:
    """An EAGLE head that follows the script too, and is wrong where the target's hidden state outweighs the token."""
    from safetensors.torch import load_file, save_file

    from tests.eagle.reference_head import save_head

    size = 256
    save_head(folder, "eagle", ["full_attention"], [32], "LlamaForCausalLM", hidden=size, vocabulary=VOCAB_SIZE)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    noise = EAGLE_NOISE * torch.randn(size, size, generator=generator) / size**0.5
    weights["fc.weight"] = torch.cat([torch.eye(size), noise], dim=1)  # embedding of the token, hidden state
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
