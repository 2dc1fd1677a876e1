"""Each fault hits the plugin's server and stock vLLM's: both do the same, none hangs, the plugin answers rightly.

What stock vLLM's parsers make of the same tokens depends on how they are cut into deltas: its texts are not judged.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import scene
from tests.faults.scene import Outcome
from tests.load.requests import Asked, pool
from vllm_gemma4_spec.demo import build
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.demo.server import Server, ServerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STOCK = {True: "overlay", False: "stock"}
RIGHT: dict[bool, dict[int, str]] = {}  # the long requests' answers, asked for once per kind of server


@pytest.fixture(scope="module")
def pair() -> Pair:
    return build.ensure(build.default_folder())[0]


def long_requests() -> list[Asked]:
    """Answers that take a while: six of 300 tokens, whatever the model would say.

    Without tools: a call that an abort cuts is given back as content, which the whole answer has not.
    """
    plain = [a for a in pool(20) if "tools" not in a.body][:6]
    return [Asked(a.key, {**a.body, "max_tokens": 300, "ignore_eos": True, "stop": None}) for a in plain]


def say(name: str, outcomes: dict[bool, Any]) -> None:
    for overlay, outcome in outcomes.items():
        print(f"\n{name}, {STOCK[overlay]}: {outcome}", file=sys.stderr, flush=True)


def compare(
    name: str,
    pair: Pair,
    folder: Path,
    trigger: Callable[[Server], None],
    more: tuple[str, ...] = (),
    **switches: str,
) -> dict[bool, Outcome]:
    """Play the fault on both servers; it ends them."""
    outcomes: dict[bool, Outcome] = {}
    requests = long_requests()
    for overlay in (True, False):
        with scene.server(pair, folder / f"{STOCK[overlay]}.log", overlay, more, **switches) as running:
            if overlay not in RIGHT:
                RIGHT[overlay] = scene.right_answers(running.url, requests)
            processes = scene.family(running)
            outcome = scene.play(running, requests, RIGHT[overlay], trigger)
            outcomes[overlay] = scene.ended(running, processes, outcome)
        for file in folder.glob("trigger*"):
            file.unlink()
    say(name, outcomes)
    assert outcomes[True].wrong == []
    for outcome in outcomes.values():
        assert outcome.ends["hung"] == 0
        assert outcome.exit_code is not None, "the server hangs"
        assert outcome.left == 0
    return outcomes


def same_end(outcomes: dict[bool, Outcome]) -> None:
    assert outcomes[True].exit_code == outcomes[False].exit_code
    # Which of two ways a stream is cut is a race of the server's tasks.
    assert set(outcomes[True].ends) - {"whole"} == set(outcomes[False].ends) - {"whole"}


def test_sigterm_under_load(pair: Pair, tmp_path: Path) -> None:
    same_end(compare("SIGTERM", pair, tmp_path, lambda running: os.kill(running.pid, signal.SIGTERM)))


@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_engine_ends_in_the_middle_of_a_draft(pair: Pair, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "trigger"
    same_end(compare(kind, pair, tmp_path, lambda _: file.touch(), FAULT=kind, FAULT_FILE=str(file)))


def test_worker_killed(pair: Pair, tmp_path: Path) -> None:
    def kill(running: Server) -> None:
        scene.process(running, "Worker").kill()

    same_end(compare("worker killed", pair, tmp_path, kill, ("--distributed-executor-backend", "mp")))


def test_a_clock_that_jumps_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the clock with")
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    outcomes: dict[bool, Outcome] = {}
    requests = pool(16)
    for overlay in (True, False):
        offset.write_text("0")
        log = tmp_path / f"{STOCK[overlay]}.log"
        with scene.server(pair, log, overlay, LD_PRELOAD=str(library), CLOCK_OFFSET=str(offset)) as running:
            wanted = scene.right_answers(running.url, requests)
            for seconds in ("864000", "-864000"):
                outcome = scene.play(running, requests, wanted, lambda _, s=seconds: offset.write_text(s) and None)
                assert outcome.ends == {"whole": len(requests)}
                assert not overlay or outcome.wrong == []
            assert running.get("/health") == ""
            after = scene.right_answers(running.url, requests[:2])
            assert not overlay or after == {a.key: wanted[a.key] for a in requests[:2]}
            outcomes[overlay] = outcome
    say("clock", outcomes)


def started(pair: Pair, log: Path, overlay: bool, eager: bool, **switches: str) -> str:
    """``serves``, or the error that ended the start."""
    try:
        with scene.server(pair, log, overlay, eager=eager, **switches) as running:
            scene.right_answers(running.url, pool(1))
            return "serves"
    except ServerError as error:
        return str(error).replace(str(log), "LOG")


def test_unwritable_cache_folder(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = str(file / "cache")  # below a file: not even root can make it
    outcomes = {
        overlay: started(
            pair,
            tmp_path / f"{STOCK[overlay]}.log",
            overlay,
            eager=True,
            VLLM_CACHE_ROOT=folder,
            TORCHINDUCTOR_CACHE_DIR=folder,
        )
        for overlay in (True, False)
    }
    say("unwritable cache", outcomes)
    assert outcomes[True] == outcomes[False]


def test_full_disk_for_the_compile_cache(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk} && (yes > {disk}/full || true) 2>/dev/null"
    inside = ("unshare", "-rm", "sh", "-c")
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], check=False).returncode:
        pytest.skip("no mounts in a namespace of one's own here")
    monkeypatch.setattr(scene, "PROGRAM", (*inside, f'{mount}; exec "$@"', "sh", *scene.PROGRAM))
    outcomes = {
        overlay: started(
            pair,
            tmp_path / f"{STOCK[overlay]}.log",
            overlay,
            eager=False,
            VLLM_CACHE_ROOT=str(disk / "vllm"),
            TORCHINDUCTOR_CACHE_DIR=str(disk / "inductor"),
        )
        for overlay in (True, False)
    }
    say("full disk", outcomes)
    assert "No space left" in outcomes[False]
    assert "No space left" in outcomes[True]
