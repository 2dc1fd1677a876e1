"""A tokenizer that is not Gemma 4's is refused when the server starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_gemma4_spec.chat.tokens import CONTROL_TOKENS, TokenizerError, vocabulary

from . import server
from . import tokenizer as tokenizers_
from .server import Server


def test_ids_are_the_genuine_ones(tokenizer: Any) -> None:
    assert all(tokenizer.convert_tokens_to_ids(text) == i for text, i in CONTROL_TOKENS.items())
    assert set(CONTROL_TOKENS.values()) <= set(vocabulary(tokenizer).special)


@pytest.mark.parametrize("parsers", [("gemma4", "gemma4"), ("gemma4", None), ("", "gemma4")])
def test_other_ids_are_refused(overlay: None, tmp_path: Path, parsers: tuple[str, str | None]) -> None:
    ids = {**tokenizers_.SPECIAL, "<|channel>": 101, "<channel|>": 100}
    folder = tokenizers_.write_small(tmp_path, ids)
    with pytest.raises(TokenizerError, match=r"<\|channel> is id 101, wanted 100; <channel\|> is id 100, wanted 101"):
        server.run(Server(str(folder), *parsers).start())


def test_the_vllm_command_ends_with_one_line(overlay: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tokenizers_.write_small(tmp_path, {**tokenizers_.SPECIAL, "<|channel>": 101, "<channel|>": 100})
    monkeypatch.setattr("sys.argv", ["/usr/bin/vllm", "serve"])
    with pytest.raises(SystemExit, match=r"^vllm-gemma4-spec: tokenizer .* wanted 100") as error:
        server.run(Server(str(folder)).start())
    assert "\n" not in str(error.value)


def test_missing_tokens_are_refused(overlay: None, tmp_path: Path) -> None:
    ids = {t: i for t, i in tokenizers_.SPECIAL.items() if "channel" not in t}
    folder = tokenizers_.write_small(tmp_path, ids)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(TokenizerError, match=r"<\|channel> is missing") as error:
        vocabulary(tokenizer)
    assert "\n" not in str(error.value)


def test_without_the_parsers_any_tokenizer_will_do(overlay: None, tmp_path: Path) -> None:
    folder = tokenizers_.write_small(tmp_path, {**tokenizers_.SPECIAL, "<|channel>": 101, "<channel|>": 100})
    server.run(Server(str(folder), "", None).start())


def test_a_tokenizer_without_its_file_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        vocabulary(object())


class Lines:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm_gemma4_spec.chat import startup

        self.said: list[str] = []
        monkeypatch.setattr(startup.logger, "info", lambda text, *values: self.said.append(text % values))


@pytest.mark.parametrize(
    ("parsers", "wanted", "unwanted"),
    [
        (("gemma4", "gemma4"), "Gemma4ReasoningParser and Gemma4ToolParser", "missing"),
        (("gemma4", None), "missing: --enable-auto-tool-choice --tool-call-parser gemma4", "--reasoning-parser"),
        (("", "gemma4"), "missing: --reasoning-parser gemma4", "--tool-call-parser"),
        (("", None), "no parser reads it; missing: --reasoning-parser gemma4", "Gemma4ToolParser"),
        (("granite", None), "GraniteReasoningParser and not by the parser gemma4", "missing"),
    ],
)
def test_the_log_says_which_parser_is_in_force(
    overlay: None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    parsers: tuple[str, str | None],
    wanted: str,
    unwanted: str,
) -> None:
    lines = Lines(monkeypatch)
    server.run(Server(str(folder), *parsers).start())
    (line,) = [line for line in lines.said if line.startswith("chat output")]
    assert wanted in line
    assert unwanted not in line


def test_a_parser_made_from_gemma_4s_keeps_the_fix(overlay: None) -> None:
    from vllm.reasoning.gemma4_reasoning_parser import Gemma4ReasoningParser
    from vllm.tool_parsers.gemma4_tool_parser import Gemma4ToolParser

    from vllm_gemma4_spec.chat.requests import Parsers

    own = type("Own", (Gemma4ReasoningParser,), {}), type("OwnTools", (Gemma4ToolParser,), {})
    assert Parsers.of(*own) == Parsers(True, True)
    assert Parsers.of(own[0], None) == Parsers(True, False)
    assert Parsers.of(own[0], type("Other", (), {})) is None
