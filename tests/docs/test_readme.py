"""The README's table of measurements is that of the results file."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = [(engine, share) for engine in ("mtp@4", "spec@3") for share in (1.0, 0.8, 0.0)]


def test_what_was_measured_is_what_the_file_holds() -> None:
    engines = json.loads((ROOT / "benchmarks/results/h200-31b.json").read_text())["engines"]
    speed = {
        (name, run["acceptance"], run["concurrency"]): run["tokens_per_s"]
        for name, engine in engines.items()
        for run in engine["runs"]
    }
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert [row[0] for row in rows] == ["1", "4", "16"]
    for requests, cells in rows:
        stock = speed["stock", None, int(requests)]
        plain = speed["plain", None, int(requests)]
        wanted = [f"{stock:,.0f}", f"{plain:,.0f} ({plain / stock:.2f} x)"]
        for engine, share in COLUMNS:
            tok_s = speed[engine, share, int(requests)]
            wanted.append(f"{tok_s:,.0f} ({tok_s / stock:.1f} x)")
        assert [cell.strip().replace("**", "") for cell in cells.split("|")] == wanted
