"""Real servers for all tests of this folder: with speculation, and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.commands import demo_server
from vllm_gemma4_spec.demo import build


@pytest.fixture(scope="session")
def pair() -> build.Pair:
    """The demo's: trained, with Gemma 4's control tokens, so that parsers can be asked for."""
    made, _ = build.ensure(build.default_folder())
    return made


@pytest.fixture(scope="session")
def speculating_server(pair: build.Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_server(pair, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def plain_server(pair: build.Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_server(pair, tmp_path_factory.mktemp("server") / "log", speculates=False) as url:
        yield url
