"""``python -m tests.fuzz``: every target, one after the other; prints a table.

A share of the cases runs under coverage guidance (needs ``pip install atheris``), and the inputs that reached new
code are kept below ``--corpus``; the others are mutations of those, run without the cost of instrumentation. The
next run begins with what was kept. An input that broke an invariant, hung or took too much memory is kept as
``TARGET.crash-…``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.fuzz.targets import TARGETS, Target

_DONE = re.compile(r"Done (\d+) runs? in (\d+) second")
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+)")
_FAILED = re.compile(r"\w*(Error|Exception)\b|ALARM|==\d+== ERROR|ERROR")
_SECONDS = 20  # until a case counts as hung
_MEMORY = 4096  # MiB


def run(target: Target, guided: int, mutated: int, corpus: Path, seed: int) -> dict[str, Any]:
    """One target's row; ``failure`` says what went wrong, if something did."""
    kept = corpus / target.name
    kept.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={guided}", f"-max_len={target.longest}", f"-seed={seed}", f"-timeout={_SECONDS}"]
    options += [f"-rss_limit_mb={_MEMORY}", "-len_control=20", f"-artifact_prefix={corpus}/{target.name}.", str(kept)]
    row: dict[str, Any] = {"target": target.name, "guided": 0, "mutated": 0, "edges": 0, "failure": None}
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    crash = str(corpus / f"{target.name}.crash-mutated")
    for kind, arguments in (("guided", options), ("mutated", [str(mutated), str(seed), str(kept), crash])):
        command = [sys.executable, "-m", "tests.fuzz.child", kind, target.name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        text = done.stdout + done.stderr
        (corpus / f"{target.name}.{kind}.log").write_text(text)
        finished, covered = _DONE.search(text), _COVERAGE.findall(text)
        row[kind] = int(finished[1]) if finished else 0
        row["edges"] = int(covered[-1][0]) if covered else row["edges"]
        if done.returncode or finished is None:
            lines = [line for line in text.splitlines() if _FAILED.match(line)]
            row["failure"] = f"{lines[0] if lines else 'ended early'}; {corpus}/{target.name}.{kind}.log"
            break
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    row["cpu_seconds"] = round(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
    row["kept"] = len(list(kept.iterdir()))
    return row


def main(
    cases: Annotated[int, typer.Option(help="Cases of all targets together.")] = 10_000_000,
    guided: Annotated[float, typer.Option(help="Share of them that runs under coverage guidance.")] = 0.15,
    only: Annotated[str, typer.Option(help="Targets, separated by commas; all if empty.")] = "",
    corpus: Annotated[Path, typer.Option(help="Folder for inputs, logs and the table.")] = Path(".fuzz"),
    seed: Annotated[int, typer.Option(help="Of the mutations.")] = 1,
) -> None:
    if importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is not installed; pip install atheris")
    chosen = [TARGETS[name] for name in only.split(",")] if only else list(TARGETS.values())
    total = sum(t.share for t in chosen)
    rows = []
    print(f"{'target':14} {'guided':>10} {'mutated':>10} {'CPU s':>6} {'edges':>6} {'kept':>6}")
    for target in chosen:
        own = cases * target.share / total
        row = run(target, round(own * guided), round(own * (1 - guided)), corpus, seed)
        rows.append(row)
        print(
            f"{row['target']:14} {row['guided']:>10,} {row['mutated']:>10,} {row['cpu_seconds']:>6} {row['edges']:>6} "
            f"{row['kept']:>6}  {row['failure'] or 'no failure'}",
            flush=True,
        )
    failed = [r for r in rows if r["failure"]]
    print(f"{sum(r['guided'] + r['mutated'] for r in rows):,} cases, {len(failed)} of {len(rows)} targets failed")
    (corpus / "summary.json").write_text(json.dumps(rows, indent=1))
    sys.exit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
