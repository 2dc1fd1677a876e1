"""One word for each metric, in every command, page and panel; docs/reference/metrics.md says which."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *(ROOT / "overlays").rglob("*.*"), *(ROOT / "tools").glob("*.py")]
FILES += [
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "vllm_gemma4_spec").rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
]
# What must not be said -> what is said.
OTHERS = {
    r"(?i)tokens[ _]per[ _](?:(?:decode|target) )?step": "acceptance length",
    r"(?i)accepted[ _]lengths?\b|\baccept(?:ance)?[ _]len\b": "acceptance length",
    r"(?i)mean acceptance length": "acceptance length",
    r"\bITL\b|\bTPOT\b|[Tt]ime between (?:deltas|tokens)": "inter-token latency",
    r"(?i)draft positions?, from 1|position 1 first": "position, from 0",
    r"(?i)\b(?:lost|skipped) drafts?\b|\bdrafts? lost\b": "dropped drafts",
}


def test_no_metric_has_a_second_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()!r}, say {word!r}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for other, word in OTHERS.items()
        for match in re.finditer(other, line)
    ]
    assert not found, "\n".join(found)


def test_positions_are_counted_from_0_in_every_command() -> None:
    for name in ("cli/demo.py", "cli/top.py", "ops/bench/report.py", "ops/bench/plot.py"):
        text = (ROOT / "vllm_gemma4_spec" / name).read_text()
        assert "from 0" in text, name
        assert not re.search(r"enumerate\([^)]*accepted\w*, 1\)", text), name
