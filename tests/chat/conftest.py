from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import server
from . import tokenizer as tokenizers_


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers_.write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Path:
    """The genuine tokenizer and template, or the small ones."""
    if tokenizers_.artifacts() is None:
        return small_folder
    return tokenizers_.write_genuine(tmp_path_factory.mktemp("genuine"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def encode(tokenizer: Any) -> Any:
    """Text with control tokens in it to ids."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="session")
def plain(tokenizer: Any) -> Any:
    """Text to ids of ordinary tokens only, however much it looks like control tokens."""

    def encode_plain(text: str, character: str = "", count: int = 0) -> list[int]:
        # Added tokens are found in the text as a whole; a character at a time is none of them.
        tokens = [t for c in text for t in tokenizer.encode(c, add_special_tokens=False)]
        return tokens + [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in character.encode()[:count]]

    return encode_plain


@pytest.fixture(scope="session")
def overlay() -> Iterator[None]:
    """The patch is on (others may be as well), and off again afterwards if it was."""
    from vllm_gemma4_spec.chat.patches import CHAT_OUTPUT
    from vllm_gemma4_spec.registry import PATCHER

    was_on = any(s.name == CHAT_OUTPUT.name and s.state in ("on", "waiting") for s in PATCHER.status())
    PATCHER.apply([CHAT_OUTPUT])
    yield
    if not was_on:
        PATCHER.undo([CHAT_OUTPUT])


@pytest.fixture(scope="session")
def both(overlay: None, folder: Path) -> server.Server:
    """The server with both parsers that all tests of answers ask: making one takes seconds."""
    return server.run(server.Server(str(folder)).start())


def pytest_sessionfinish() -> None:
    server.close()
