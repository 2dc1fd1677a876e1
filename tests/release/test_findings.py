"""Each script in ``findings/`` can be run as it is, says what surprises, and pins what it installs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

FINDINGS = Path(__file__).parents[2] / "findings"
SCRIPTS = sorted(FINDINGS.glob("*.sh"))
pytestmark = pytest.mark.skipif(not FINDINGS.is_dir(), reason="the sdist has no findings/")


def test_each_is_listed() -> None:
    listed = re.findall(r"^\| \[([\w-]+)\]\(\1\.sh\) \|", (FINDINGS / "README.md").read_text(), re.MULTILINE)
    assert listed == [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_form(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# One would guess: ")
    assert "\n# What happens: " in text
    assert "work=$(mktemp -d)\ntrap 'rm -rf \"$work\"' EXIT\n" in text
    installs = re.findall(r"pip\"? install --quiet (.+)$", text, re.MULTILINE)
    assert installs
    for package in " ".join(installs).split():
        assert re.fullmatch(r"\"?[\w-]+==[\w.$]+\"?", package), package
    assert not re.search(r"https?://(?!127\.0\.0\.1)|/work/|/home/|/opt/", text)
    assert "vllm_gemma4_spec" not in text
