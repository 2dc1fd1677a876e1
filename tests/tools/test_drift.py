"""The drift report, on the sources of the vLLM installed and on changed copies of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from vllm_gemma4_spec.patching import fingerprint
from vllm_gemma4_spec.registry import PATCHES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import drift  # noqa: E402

FILES = {s.partition(":")[0] for p in PATCHES for s in p.checked_symbols}
FILES |= {e.target.partition(":")[0] for p in PATCHES for e in p.edits}
PROPOSER, BLOCK_TABLE = "vllm/v1/spec_decode/eagle.py", "vllm/v1/worker/block_table.py"
PATCH = {p.name: p for p in PATCHES}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    out = {}
    for module in FILES:
        path = fingerprint.source_file(module)
        assert path is not None
        end = "/__init__.py" if path.name == "__init__.py" else ".py"
        out[module.replace(".", "/") + end] = path.read_text()
    return out


def words(texts: dict[str, str]) -> dict[str, str]:
    return {name: str(verdict) for name, verdict in drift.verdicts_of(texts).items()}


def test_all_is_the_same_where_all_is_the_same(texts: dict[str, str]) -> None:
    assert set(words(texts).values()) == {"same"}


def test_a_moved_class_is_found(texts: dict[str, str]) -> None:
    moved = dict(texts)
    moved["vllm/v1/spec_decode/base.py"] = moved.pop(PROPOSER)
    found = words(moved)
    assert found["draft-groups"] == found["chunk-boundaries"] == "moved"
    assert found["own-blocks"] == "same"


@pytest.mark.parametrize(
    ("method", "renamed", "word"),
    [
        ("move_row", "move_a_row(", "gone"),
        ("add_row", "add_row(  # otherwise", "changed"),
        ("append_row", "append_row(  # otherwise", "uses changed code"),
    ],
)
def test_changed_gone_and_used(texts: dict[str, str], method: str, renamed: str, word: str) -> None:
    other = texts[BLOCK_TABLE].replace(f"def {method}(", f"def {renamed}\n")
    assert words(texts | {BLOCK_TABLE: other})["own-blocks"] == word


def test_upstreams_own_attribute_where_one_is_added(texts: dict[str, str]) -> None:
    path = "vllm/model_executor/models/gemma4.py"
    other = texts[path].replace(
        "    def compute_logits(", "    def get_top_tokens(self): ...\n\n    def compute_logits("
    )
    assert words(texts | {path: other})["local-argmax"] == "changed"


def test_evidence_is_of_known_patches_and_not_in_this_release(texts: dict[str, str]) -> None:
    assert set(drift.EVIDENCE) <= set(PATCH)
    assert not [e.says for es in drift.EVIDENCE.values() for e in es if e.holds(texts)]


def test_evidence_of_a_fix(texts: dict[str, str]) -> None:
    fixed = texts | {"vllm/parser/gemma4.py": ""}
    assert words(fixed)["chat-output"] == "fixed upstream"


def test_releases_in_a_row_share_a_line() -> None:
    assert drift._ranges({"1": "same", "2": "same", "3": "gone", "4": "same"}) == "same: 1 to 2; gone: 3; same: 4"


def test_the_page_is_current_in_its_patches() -> None:
    """Which releases there are changes by itself; which patches there are does not."""
    page = (ROOT / "docs/evidence/drift.md").read_text()
    assert re.findall(r"^\| \[([\w-]+)\]", page, re.MULTILINE) == list(PATCH), "run `make drift`"
    assert "| 0.19.1 | " + str(len(PATCHES)) in page
