#!/usr/bin/env python3
"""The acceptance table: what is accepted, and whether the answer is plain decoding's, for every k and way.

    python benchmarks/acceptance_matrix.py [--json FILE]

Tiny random models in the real engine (CPU, float32), the same matrix that ``tests/spec_decode`` asserts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.spec_decode.test_draft_groups import WAYS, plain, speculate
from tests.support import tiny_models

DRAFTERS = {
    "31B-like, its own drafter": ("target", "target"),
    "E4B-like, its own drafter": ("drafter", "drafter"),
    "31B-like + near copy": ("target", "close"),
    "31B-like + untrained E4B-like": ("target", "drafter"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="acceptance-"))
    models = {
        "target": tiny_models.save(tiny_models.target_config(), folder / "target"),
        "drafter": tiny_models.save(tiny_models.drafter_config(), folder / "drafter", seed=1),
    }
    models["close"] = tiny_models.perturbed(models["target"], folder / "close")
    rows: list[dict[str, Any]] = []
    print("| pair | way | k | accepted / proposed | answers equal | s |\n|---|---|---|---|---|---|")
    for pair, (target, drafter) in DRAFTERS.items():
        for way in WAYS:
            want = plain(models[target], way)
            for k in (1, 2, 3, 5, 8):
                started = time.monotonic()
                answers, counts, _ = speculate(models[target], models[drafter], k, way)
                seconds = round(time.monotonic() - started, 1)
                row = {"pair": pair, "way": way, "k": k, "proposed": counts.proposed, "accepted": counts.accepted}
                rows.append(row | {"equal": answers == want, "seconds": seconds})
                rate = f"{counts.accepted} / {counts.proposed} ({counts.accepted / counts.proposed:.1%})"
                print(
                    f"| {pair} | {way} | {k} | {rate} | {'yes' if answers == want else 'NO'} | {seconds} |", flush=True
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(r["equal"] for r in rows) else 1)


if __name__ == "__main__":
    main()
