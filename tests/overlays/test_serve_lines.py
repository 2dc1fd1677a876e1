"""Every ``vllm serve`` that a page prints with a draft model fits its card and pays, as ``plan`` says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.commands import in_process, printed

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "overlays").rglob("*.md")),
]
CARDS = ("H200", "H100", "B200", "GB10")


class Line(NamedTuple):
    page: str
    text: str
    block: str


def serve_lines() -> list[Line]:
    """Commands of code blocks, with the lines that a backslash continues."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S):
            for text in re.findall(r"^(?:\$ )?vllm serve (?:[^\n]*\\\n)*[^\n]*", block, re.M):
                lines.append(Line(page.relative_to(ROOT).as_posix(), text, block))
    return lines


LINES = serve_lines()
WITH_DRAFTS = [line for line in LINES if "--speculative-config '{" in line.text]


def checkpoint(name: str) -> tuple[str, str]:
    """The published model and the format that a path such as ``/models/gemma-4-31B-it-NVFP4`` names."""
    model = name.rsplit("/", 1)[-1]
    plain = model.removesuffix("-NVFP4")
    return f"google/{plain}", "nvfp4" if plain != model else "bf16"


def test_the_first_pages_have_one() -> None:
    assert {"README.md", "docs/index.md", "docs/how-to/serve.md"} <= {line.page for line in WITH_DRAFTS}


@pytest.mark.parametrize("line", [li for li in LINES if "--config overlays" in li.text], ids=lambda li: li.page)
def test_settings_named_are_those_of_an_overlay(line: Line) -> None:
    """Whose own test asks ``plan``."""
    name = line.text.split("--config ")[1].split()[0]
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("line", WITH_DRAFTS, ids=lambda line: line.page)
def test_it_fits_and_pays(line: Line) -> None:
    speculation = json.loads(re.search(r"--speculative-config '(\{.*?\})'", line.text, re.S).group(1))  # type: ignore[union-attr]
    target, target_format = checkpoint(line.text.removeprefix("$ ").split()[2])
    drafter, drafter_format = checkpoint(speculation["model"])
    context = re.search(r"--max-model-len (\d+)", line.text)
    cards = [card for card in CARDS if card in line.block.split(line.text)[0].splitlines()[-1]]
    assert cards, f"{line.page}: the line above names no card"
    arguments = ["--target", target, "--target-weights", target_format, "--drafter", drafter]
    arguments += ["--drafter-weights", drafter_format, "--acceptance", "0.7", "--json"]
    arguments += ["--context", context.group(1)] if context else []
    for card in cards:
        (machine,) = printed("plan", in_process("plan", *arguments, "--hardware", card))["machines"]
        assert machine["fits"], f"{line.page}: does not fit {card}"
        speed, k = machine["acceptance"]["0.7"], speculation["num_speculative_tokens"]
        for bound in (speed["tok_s"] or speed["tok_s_at_most"], speed["tok_s_at_least"]):
            assert bound[k] > bound[0], f"{line.page}: k = {k} does not pay on {card}"


def test_no_text_installs_from_an_index_that_does_not_have_it() -> None:
    """Anyone could register the name: until a release, texts install a checkout or a wheel."""
    published = re.compile(
        r"(?:pip|uv pip|pipx|uvx?) (?:install|add|run)?[^\n`]*?['\" ]vllm-gemma4-spec(?:\[|==|>|['\"`\n ]|$)"
    )
    tracked = [
        *PAGES,
        *(ROOT / "vllm_gemma4_spec").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
        ROOT / "overlays" / "Dockerfile",
    ]
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked
        for match in published.finditer(path.read_text())
        if "uninstall" not in match.group()
    ]
    assert not found
