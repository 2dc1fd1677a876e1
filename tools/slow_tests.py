"""Runs the slow tests in groups, several at a time and the longest first, each group in a fork of one process.

    python -m tools.slow_tests [--jobs N] [--out FOLDER] [PYTEST ARGUMENTS: paths, --ignore, --deselect ...]

vLLM is imported once. A group is a part of a file: tests that share what is expensive to make stay together. Each
writes FOLDER/GROUP.log; FOLDER/results.json has every test's outcome, also of a run that was ended (SIGTERM) before its
end, and FOLDER/failed.txt what did not pass, one test a line (`@FOLDER/failed.txt` as an argument runs those alone).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools import forks

ROOT = Path(__file__).parents[1]
GROUP = 120  # seconds that a group is to take
WHICH = ["-m", "slow and not gpu", "-p", "no:cacheprovider"]
# What in a test's name says which tests share an engine or a server; other files are cut in pytest's order.
TOGETHER = {
    "checkpoints/test_against_modelopt.py": "()",  # all of them
    "checkpoints/test_exporters.py": "()",
    "clients/test_clients.py": "()",
    "mtp/test_exactness.py": r"\[(.+)-\d-(.+)\]",  # plain answers of a pair in one way of running
    "mtp/test_drafts.py": r"\[(26b-a4b|\w+)",
    "requests/test_random_requests.py": "()",
    "requests/test_requests_engine.py": r"\[(.+)\]",
    "requests/test_requests_server.py": r"\[(plain|speculating)",
    "engine/test_request_features.py": "()",
}
# Seconds of a test on one core where it is not some 10. One that takes most of a run's time starts first.
SECONDS = {
    "checkpoints/test_exporters.py": 17,
    "engine/test_soak.py::test_nothing_decays": 700,
    "engine/test_soak.py": 300,
    "load/test_load.py": 300,
    "faults/test_faults.py": 200,
    "demo/test_pair.py": 200,
    "patching/test_imports.py": 200,
    "engine/test_data_parallel.py": 150,
    "engine/test_processes.py": 105,
    "performance/test_draft_compile.py": 300,
    "engine/test_four_ranks.py": 75,
    "engine/test_tensor_parallel.py": 75,
    "engine/test_other_methods.py": 75,
    "spec_decode/test_max_length.py": 50,
    "mtp/test_mtp_features.py": 45,
    "quantization/test_nvfp4_tensor_parallel.py": 45,
    "quantization/test_other_formats.py": 45,
    "multimodal/test_image_turns.py": 45,
    "engine/test_out_of_scope.py": 40,
    "requests/test_random_requests.py": 60,
    "patching/test_every_patch.py": 40,
    "ops/test_doctor_live.py": 40,
    "ops/test_bench_live.py": 40,
    "chat/test_demo_server.py": 35,
    "kernels/test_stream_gemm.py": 20,
    "quantization/test_nvfp4_compressed_tensors.py": 35,
    "quantization/test_forms.py": 30,
    "multimodal/test_images.py": 25,
    "spec_decode/test_draft_groups.py": 5,
    "requests/test_grammar_positions.py": 4,
    "requests/test_requests_server.py": 8,
    "chat/test_serving.py": 1,
    "chat/test_server_e2e.py": 1,
    "fuzz/test_scaling.py": 2,
}
# The worst that any part of a test came to is its outcome.
WORST = ("passed", "skipped", "failed", "error")


class Recorder:
    """A pytest plugin: a line of JSON for each thing that a test came to, written at once."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", buffering=1)

    def add(self, test: str, outcome: str, seconds: float = 0, why: str = "") -> None:
        self.file.write(json.dumps({"test": test, "outcome": outcome, "seconds": seconds, "why": why}) + "\n")

    def pytest_collection_finish(self, session: Any) -> None:
        if session.config.option.collectonly:
            for item in session.items:
                self.add(item.nodeid, "collected")

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.add(report.nodeid, "error" if report.failed else "skipped", why=str(report.longrepr)[-300:])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "error" if report.when != "call" and report.failed else report.outcome
            self.add(report.nodeid, outcome, report.duration, str(report.longrepr)[-300:] if report.skipped else "")


def records(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def collected(out: Path, arguments: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The tests, and what could not be collected."""
    import pytest

    def work() -> int:
        found = pytest.main(["--collect-only", "-q", *WHICH, *arguments], plugins=[Recorder(out / "collected.jsonl")])
        return int(found)

    os.waitpid(forks.fork(work, out / "collected.log"), 0)
    found = records(out / "collected.jsonl")
    tests = [r["test"] for r in found if r["outcome"] == "collected"]
    return tests, [r for r in found if r["outcome"] != "collected"]


@dataclass
class Group:
    name: str
    tests: list[str]
    seconds: float
    child: int = 0
    since: float = 0
    took: float = 0
    outcomes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def start(self, out: Path) -> None:
        import pytest

        def work() -> int:
            options = [*WHICH, "-q", "--durations=5", f"--basetemp={out / 'tmp' / self.name}"]
            return int(pytest.main([*options, *self.tests], plugins=[Recorder(out / f"{self.name}.jsonl")]))

        self.since = time.monotonic()
        self.child = forks.fork(work, out / f"{self.name}.log")

    def read(self, out: Path) -> None:
        """What its tests came to so far; ``not run`` of the others."""
        self.outcomes = dict.fromkeys(self.tests, "not run")
        for record in records(out / f"{self.name}.jsonl"):
            before, now = self.outcomes.get(record["test"], "not run"), record["outcome"]
            if before == "not run" or WORST.index(now) > WORST.index(before):
                self.outcomes[record["test"]] = now
            if now == "skipped":
                self.skipped[record["test"]] = record["why"]


def seconds(test: str) -> float:
    return next((float(s) for name, s in SECONDS.items() if test.startswith(f"tests/{name}")), 10.0)


def groups(tests: Iterable[str]) -> list[Group]:
    """The longest first."""
    parts: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for test in tests:
        file = test.partition("::")[0]
        pattern = TOGETHER.get(file.removeprefix("tests/"))
        shared = re.search(pattern, test) if pattern else None
        parts[(file, *(shared.groups() if shared else ()))].append(test)
    made: list[Group] = []
    numbers: dict[str, int] = collections.Counter()
    for (file, *shared), each in parts.items():
        size = len(each) if shared else max(1, int(GROUP // seconds(each[0])))
        for at in range(0, len(each), size):
            some = each[at : at + size]
            name = f"{Path(file).stem}-{numbers[file]}"
            numbers[file] += 1
            made.append(Group(name, some, sum(map(seconds, some))))
    return sorted(made, key=lambda group: -group.seconds)


def counts(all_groups: list[Group]) -> dict[str, int]:
    return dict(collections.Counter(outcome for group in all_groups for outcome in group.outcomes.values()))


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    ap.add_argument("--jobs", type=int, default=2, help="groups that run at a time")
    ap.add_argument("--out", type=Path, default=ROOT / "build" / "slow-tests")
    args, arguments = ap.parse_known_args()
    os.chdir(ROOT)
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "tmp").mkdir(parents=True)
    began = time.monotonic()
    forks.preload()
    found, uncollected = collected(out, arguments)
    every = groups(found)
    print(f"{len(found)} tests in {len(every)} groups, {args.jobs} at a time", flush=True)
    for record in uncollected:
        print(f"{record['outcome']} at collection: {record['test']}: {record['why']}", flush=True)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopped.append(number))
    waiting, running = every[:], list[Group]()
    saved = 0.0

    def save() -> None:
        for group in every:
            group.read(out)
        result = {
            "seconds": round(time.monotonic() - began, 1),
            "counts": counts(every),
            "running": [group.name for group in running],
            "groups": {group.name: {"seconds": round(group.took, 1), "tests": group.outcomes} for group in every},
            "skipped": {test: why for group in every for test, why in group.skipped.items()},
            "uncollected": uncollected,
        }
        (out / "results.json.new").write_text(json.dumps(result, indent=1))
        (out / "results.json.new").rename(out / "results.json")
        bad = [t for group in every for t, o in group.outcomes.items() if o not in ("passed", "skipped")]
        (out / "failed.txt").write_text("".join(f"{test}\n" for test in bad))

    while (waiting or running) and not stopped:
        while waiting and len(running) < args.jobs:
            running.append(waiting.pop(0))
            running[-1].start(out)
        for group in running[:]:
            if os.waitpid(group.child, os.WNOHANG)[0]:
                running.remove(group)
                group.took = time.monotonic() - group.since
                group.read(out)
                if set(group.outcomes.values()) <= {"passed", "skipped"}:
                    shutil.rmtree(out / "tmp" / group.name, ignore_errors=True)
                at = time.monotonic() - began
                print(f"[{at:4.0f} s] {group.name}: {_said(counts([group]))} in {group.took:.0f} s", flush=True)
        forks.hold_servers()
        if time.monotonic() - saved > 5:
            save()
            saved = time.monotonic()
        time.sleep(0.2)
    for group in running:
        forks.end(group.child)
    save()
    for group in every:
        for test, outcome in group.outcomes.items():
            if outcome == "skipped":
                print(f"skipped: {test}: {group.skipped[test]}")
            elif outcome != "passed":
                print(f"{outcome}: {test} ({out / group.name}.log)")
    total, took = counts(every), time.monotonic() - began
    print(f"{_said(total)} in {took:.0f} s ({time.strftime('%H:%M:%S', time.gmtime(took))}), {args.jobs} at a time")
    wrong = set(total) - {"passed", "skipped"} or not found or any(r["outcome"] == "error" for r in uncollected)
    return 1 if wrong else 0


def _said(outcomes: dict[str, int]) -> str:
    order = (*WORST, "not run")
    return ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in order if outcomes.get(outcome))


if __name__ == "__main__":
    raise SystemExit(main())
