"""The control tokens of Gemma 4 and their ids, which are the same for every published model."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from vllm_gemma4_spec.errors import Gemma4SpecError

# Text -> id, from the tokenizer published with 31B, 26B-A4B, E4B and E2B (one file, same hash).
CONTROL_TOKENS = {
    "<eos>": 1,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    '<|"|>': 52,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}

TOOL_CALL_OPEN = CONTROL_TOKENS["<|tool_call>"]
TOOL_CALL_CLOSE = CONTROL_TOKENS["<tool_call|>"]
QUOTE = CONTROL_TOKENS['<|"|>']
CHANNEL_OPEN = CONTROL_TOKENS["<|channel>"]
CHANNEL_CLOSE = CONTROL_TOKENS["<channel|>"]
# What ends a turn ends whatever was open in it; only seen in the middle of an output with ignore_eos.
TURN_ENDS = frozenset(CONTROL_TOKENS[t] for t in ("<eos>", "<|tool_response>", "<|turn>", "<turn|>"))

TURN_OPEN = CONTROL_TOKENS["<|turn>"]
ROLES = ("model", "user", "system", "developer")  # `<|turn>model\n`: whose turn it is, not text

LABEL = "thought"  # `<|channel>thought\n`: the channel's name, not text


class TokenizerError(Gemma4SpecError):
    """The tokenizer is not Gemma 4's, so its output cannot be parsed."""


_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")
# Gemma 4's decoder: what a token's text is depends on no other token, bytes of a character apart.
_ONE_BY_ONE = ["Replace", "ByteFallback", "Fuse"]


class Texts(dict[int, str | None]):
    """Token id -> its text, found when it is first asked for; None if it has none without its neighbours.

    Bytes of characters have none, and special tokens: they are no text.
    """

    def __init__(self, core: Any, special: Container[int], one_by_one: bool) -> None:
        self._core = core
        self._special = special
        self._one_by_one = one_by_one

    def __missing__(self, token_id: int) -> str | None:
        piece = self._core.id_to_token(token_id) if self._one_by_one and token_id not in self._special else None
        own = piece is not None and not _BYTE.match(piece)
        text = self[token_id] = self._core.decode([token_id], skip_special_tokens=False) if own else None
        return text


@dataclass(frozen=True)
class Vocabulary:
    """What the parser needs of a tokenizer.

    Attributes:
        core: ``tokenizers.Tokenizer``.
        special: texts of the special tokens.
        one_by_one: ordinary tokens have texts of their own, single bytes apart.
        texts: those texts.
    """

    core: Any
    special: dict[int, str]
    one_by_one: bool
    texts: Texts

    def byte(self, token_id: int) -> bytes:
        """What a token without a text of its own stands for: a byte, or nothing for an id that no token has."""
        piece = self.core.id_to_token(token_id)
        return bytes([int(piece[3:5], 16)]) if piece is not None else b""


def vocabulary(tokenizer: Any) -> Vocabulary:
    """Check a tokenizer against the genuine ids and take what the parser needs.

    Args:
        tokenizer: a transformers fast tokenizer, or vLLM's cached form of one.

    Raises:
        TokenizerError: not a fast tokenizer, or a control token is missing, has another id or is not special.
    """
    core = getattr(tokenizer, "_tokenizer", None)
    if core is None or not hasattr(core, "get_added_tokens_decoder"):
        raise TokenizerError(
            f"tokenizer {_name(tokenizer)} ({type(tokenizer).__name__}) has no tokenizer.json behind it; "
            "serve Gemma 4 with its own tokenizer.json, or drop the parser gemma4"
        )
    known, wrong = _checked(core)
    if wrong:
        raise TokenizerError(
            f"tokenizer {_name(tokenizer)} does not have Gemma 4's control tokens ({'; '.join(wrong)}); "
            "use the model's own tokenizer, or drop --reasoning-parser and --tool-call-parser gemma4"
        )
    return known


@functools.lru_cache(maxsize=8)
def _checked(core: Any) -> tuple[Vocabulary, list[str]]:
    """What the parser needs of a tokenizer, and what is wrong with its control tokens."""
    added = core.get_added_tokens_decoder()
    special = {token_id: token.content for token_id, token in added.items() if token.special}
    wrong = []
    for text, wanted in CONTROL_TOKENS.items():
        found = core.token_to_id(text)
        if found != wanted:
            wrong.append(f"{text} is {'missing' if found is None else f'id {found}'}, wanted {wanted}")
        elif wanted not in special:
            wrong.append(f"{text} is not marked special")
    decoder = json.loads(core.decoder.__getstate__()) if core.decoder is not None else {}
    one_by_one = [step["type"] for step in decoder.get("decoders", ())] == _ONE_BY_ONE
    return Vocabulary(core, special, one_by_one, Texts(core, special, one_by_one)), wrong


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "without a name")
