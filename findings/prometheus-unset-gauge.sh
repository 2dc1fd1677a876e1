#!/usr/bin/env bash
# One would guess: in prometheus_client's multiprocess mode a gauge of mode "min" or "max" is the smallest or largest value
# that a process has set.
# What happens: a process that has the gauge and has not set it counts as 0. Then "min" is 0, and "max" of values below zero
# is 0 as well. A fork is such a process: as soon as it counts anything, some other counter say, all gauges that it got from
# its parent are 0 in its own file. So what is set before the workers start, a limit or the time of the start, is lost with
# "min"; a gauge with labels follows from the call of labels() on. "sum" and "mostrecent" are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet prometheus-client==0.26.0
cat >gauges.py <<'PY'
import os, subprocess, sys, tempfile
from importlib.metadata import version

HEAD = """
import os
from prometheus_client import Counter, Gauge
low = Gauge("low", "x", multiprocess_mode="min")
high = Gauge("high", "x", multiprocess_mode="max")
total = Gauge("total", "x", multiprocess_mode="sum")
last = Gauge("last", "x", multiprocess_mode="mostrecent")
model = Gauge("model", "x", ["name"], multiprocess_mode="min")
other = Counter("other", "x")
"""
SET = "low.set(5); high.set(-5); total.set(5); last.set(5); model.labels('a').set(5)\n"
FORK = "child = os.fork()\nif child == 0: other.inc(); os._exit(0)\nos.waitpid(child, 0)\n"
READ = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""

def exported(*processes):
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder}
        for process in processes:
            subprocess.run([sys.executable, "-c", HEAD + process], env=environment, check=True)
        text = subprocess.check_output([sys.executable, "-c", READ], env=environment, text=True)
    return {name: float(value) for name, value in (line.split() for line in text.splitlines() if line and line[0] != "#")}

right = {"low": 5, "high": -5, "total": 5, "last": 5, 'model{name="a"}': 5}
wrong = {"low": 0, "high": 0, "total": 5, "last": 5, 'model{name="a"}': 5}
print("prometheus_client", version("prometheus-client"))
for what, processes, expected in (
    ("one process sets all", [SET], right),
    ("another has the gauges", [SET, ""], wrong),
    ("another has the gauges and calls labels()", [SET, "model.labels('a')"], {**wrong, 'model{name="a"}': 0}),
    ("a fork does nothing", [SET + FORK.replace("other.inc(); ", "")], right),
    ("a fork counts something else", [SET + FORK], {**wrong, 'model{name="a"}': 0}),
):
    seen = exported(*processes)
    seen.pop("other_total", None)
    print(f"{what}: {seen}")
    assert seen == expected, expected
PY
env/bin/python gauges.py
