"""How long the commands take, whole processes, against another commit: processor time and wall time, medians.

    python benchmarks/command_speed.py [--before d1ed1a9] [--runs 5] [--out benchmarks/results/command-speed.json]

The other commit (default: the last one before the commands were redesigned) is checked out into a temporary worktree.
Runs of both alternate, and the first of each, which compiles bytecode, is not counted. Processor time is what a command
costs whatever else the machine does; wall time is what its user waits. Needs the genuine configs (GEMMA4_ARTIFACTS).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(os.environ.get("GEMMA4_ARTIFACTS", "")) / "gemma4" / "models"
PAIR = ["--target", str(MODELS / "gemma-4-31B-it"), "--drafter", str(MODELS / "gemma-4-E4B-it")]
CASES = {
    "list of commands": ["--help"],
    "help of plan": ["plan", "--help"],
    "plan": ["plan", *PAIR, "--hardware", "H200"],
    "plan, no such model": ["plan", "--target", "/nonexistent", "--hardware", "H200"],
    "plan, wrong option": ["plan", *PAIR, "--acceptance", "often"],
    "doctor": ["doctor"],
    "doctor, no server": ["doctor", "--url", "http://127.0.0.1:9"],
    "inspect, no such folder": ["inspect", "/nonexistent"],
    "repair, no such folder": ["repair", "/nonexistent", "--out", "/nonexistent/out"],
    "patches": ["patches"],
}


def once(tree: Path, arguments: list[str]) -> tuple[float, float]:
    """Processor and wall seconds of one process, its children included."""
    code = "import sys; sys.argv[0] = 'vllm-gemma4-spec'; from vllm_gemma4_spec.cli import main; main()"
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=tree, env=env, stdout=quiet, stderr=quiet)
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = 0
    return used.ru_utime + used.ru_stime, time.perf_counter() - start


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--before", default="d1ed1a9")
    ap.add_argument("--runs", type=int, default=5)
    ap.add_argument("--only", nargs="+", choices=CASES, help="these commands alone")
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        old = Path(scratch) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), args.before], check=True)
        try:
            print(f"| command | CPU s at {args.before} | now | ratio | wall s now |\n|---|---|---|---|---|")
            for name in args.only or CASES:
                runs = [[once(tree, CASES[name]) for tree in (old, ROOT)] for _ in range(args.runs + 1)][1:]
                before, now, wall = (
                    statistics.median(row[side][kind] for row in runs) for side, kind in ((0, 0), (1, 0), (1, 1))
                )
                rows[name] = {"cpu_s_before": round(before, 2), "cpu_s": round(now, 2), "wall_s": round(wall, 2)}
                print(f"| {name} | {before:.2f} | {now:.2f} | {before / now:.1f} | {wall:.2f} |", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    if args.out:
        about = {"before": args.before, "runs": args.runs, "python": platform.python_version(), "cores": os.cpu_count()}
        args.out.write_text(json.dumps(about | {"commands": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
