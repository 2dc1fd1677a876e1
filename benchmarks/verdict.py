"""How a benchmark that checks its results ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def verdict(word: str, bad: Sequence[str], results: dict[str, Any], out: Path | None) -> int:
    """Write ``results``, print ``word`` or what is not so, and give the exit code."""
    if out:
        out.write_text(json.dumps(results, indent=1))
    print(word if not bad else f"NOT {word}: {', '.join(bad)}", flush=True)
    return 1 if bad else 0
