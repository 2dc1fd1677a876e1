"""Every serve line that the README and the docs print is one that `plan` says fits one H200 and pays there."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.support.commands import in_process, printed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARD = "H200"


def serve_lines(text: str) -> list[argparse.Namespace]:
    """The commands `vllm serve MODEL … --speculative-config …` of a page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--speculative-config", type=json.loads)
    parser.add_argument("--max-model-len", default="32768")
    commands = re.findall(r"^(?:\$ )?vllm serve (.+)$", text.replace("\\\n", " "), re.MULTILINE)
    found = (parser.parse_known_args(shlex.split(command))[0] for command in commands if "--speculative" in command)
    return list(found)


FOUND = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in serve_lines(page.read_text())]


def model(name: str) -> tuple[str, str]:
    """Google's name of a model and its format; `quantize` writes `/models/…-NVFP4`."""
    base = Path(name).name
    return f"google/{base.removesuffix('-NVFP4')}", "nvfp4" if base.endswith("-NVFP4") else "bf16"


def test_the_pages_have_such_lines() -> None:
    assert {page for page, _ in FOUND} >= {"README.md", "docs/index.md", "docs/how-to/serve.md"}


@pytest.mark.parametrize(("page", "line"), FOUND, ids=[page for page, _ in FOUND])
def test_it_fits_and_pays(page: str, line: argparse.Namespace) -> None:
    (target, target_format), (drafter, drafter_format) = model(line.model), model(line.speculative_config["model"])
    models = ("--target", target, "--target-weights", target_format)
    drafters = ("--drafter", drafter, "--drafter-weights", drafter_format)
    options = ("--hardware", CARD, "--context", line.max_model_len, "--acceptance", "0.7", "--json")
    (machine,) = printed("plan", in_process("plan", *models, *drafters, *options))["machines"]
    assert machine["fits"], page
    assert f"one {CARD}" in (ROOT / page).read_text() or f"an {CARD}" in (ROOT / page).read_text(), "no card is named"
    speed, k = machine["acceptance"]["0.7"], line.speculative_config["num_speculative_tokens"]
    for bound in (speed["tok_s"] or speed["tok_s_at_most"], speed["tok_s_at_least"]):
        assert bound[k] > bound[0], page
