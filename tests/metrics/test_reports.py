"""The plugin's own counters against what really happened in the engine."""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.engine import engine, generate, random_prompts
from tests.support.recorder import Recorder
from tests.support.stock import without
from vllm_gemma4_spec._version import __version__
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.metrics import reports
from vllm_gemma4_spec.spec_decode.patches import SKIPPED_DRAFTS

FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"


def shown() -> Counter[tuple[str, ...]]:
    """The counters of this process as ``/metrics`` would show them: name and label -> value."""
    return Counter(
        {
            (s.name, *(v for k, v in s.labels.items() if k not in ("process", "pid"))): s.value
            for family in reports.Collector().collect()
            for s in family.samples
            if s.name.endswith("_total")
        }
    )


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(reports.FOLDER, str(tmp_path))
    reports.write()


def test_every_counter_is_there_from_the_start() -> None:
    assert set(shown()) == {
        ("gemma4_spec_nan_blocks_repaired_total", "saturated"),
        ("gemma4_spec_nan_blocks_repaired_total", "zeroed"),
        ("gemma4_spec_drafts_skipped_total",),
        ("gemma4_spec_drafts_left_out_total",),
    }


def others(tmp_path: Path, **changes: Any) -> None:
    """A report as another process of this server would have written it."""
    ours = json.loads((tmp_path / f"{os.getpid()}.json").read_text())
    (tmp_path / f"{changes.get('pid', ours['pid'])}.json").write_text(json.dumps(ours | changes))


def processes() -> list[str]:
    return [report["process"] for report in reports.living()]


def test_a_removed_folder_is_made_again_for_all(tmp_path: Path) -> None:
    """One folder under the name that all processes know; what they counted before is not lost."""
    reports.count("drafts_skipped", 2)
    before = shown()
    shutil.rmtree(tmp_path)
    assert shown() == before  # the process that shows its own
    assert os.environ[reports.FOLDER] == str(tmp_path)
    shutil.rmtree(tmp_path)
    reports.count("drafts_skipped", 1)  # any other process, at its next count
    assert [file.name for file in tmp_path.iterdir()] == [f"{os.getpid()}.json"]
    assert (shown() - before)["gemma4_spec_drafts_skipped_total",] == 1


def test_a_folder_that_cannot_be_made_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(reports.FOLDER, str(tmp_path / "file" / "folder"))
    reports.write()
    reports.count("drafts_skipped", 1)
    assert not shown()


def test_a_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: os.stat(__file__).st_uid + 1)
    assert processes() == []


def test_unknown_and_broken_reports_are_left_out(tmp_path: Path) -> None:
    """Of another version, cut off, or of a process that has ended (whose id another may have by now)."""
    before = shown()
    others(tmp_path, counts={"of_a_later_version": {"": 3}})  # lacks ours, has another
    assert set(shown()) == set(before)
    reports.write()
    for number, text in enumerate(("", "{", "[]", "{}", '{"pid": "x"}', '{"pid": 1}')):
        (tmp_path / f"9999{number}.json").write_text(text)
    others(tmp_path, pid=os.getppid(), started=0.0)
    assert processes() == [reports.process_name()]
    assert shown() == before


def test_an_unknown_counter_neither_ends_an_engine_nor_is_shown() -> None:
    before = shown()
    reports.count("no_such_counter", 1)
    try:
        assert shown() == before
    finally:
        del reports._counts["no_such_counter"]


def test_a_starter_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An API server whose parent was killed still shows all processes that report to its folder."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(reports.multiprocessing, "parent_process", lambda: SimpleNamespace(pid=gone.pid))
    others(tmp_path, pid=os.getppid(), process="EngineCore", started=psutil.Process(os.getppid()).create_time())
    assert sorted(processes()) == sorted(["EngineCore", reports.process_name()])


def test_another_servers_reports_are_left_out(tmp_path: Path) -> None:
    """The folder's name is inherited by all that a process starts; what runs beside it is not of this server."""
    others(tmp_path, pid=os.getppid(), process="beside", started=psutil.Process(os.getppid()).create_time())
    assert processes() == [reports.process_name()]


def test_a_process_has_the_name_that_vllm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", "EngineCore_DP1")
    reports.write()
    assert processes() == ["EngineCore_DP1"]


def test_the_first_process_makes_the_folder_and_removes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", ends.append)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(reports.FOLDER)
    reports.write()
    folder = Path(os.environ[reports.FOLDER])
    assert folder.parent == tmp_path
    assert (folder / f"{os.getpid()}.json").exists()
    (end,) = ends
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 1)
        end()
    assert folder.exists()  # a forked child's end is not the server's
    end()
    assert not folder.exists()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[CollectorRegistry]:
    """The process's registry, without our collector, and nothing announced yet."""
    made = CollectorRegistry(auto_describe=True)
    monkeypatch.setattr(prometheus_client, "REGISTRY", made)
    monkeypatch.setattr(reports, "_registered", [])
    monkeypatch.setattr(reports, "_patches_here", tuple)
    yield made
    monkeypatch.undo()
    reports.write()


def metrics(registry: CollectorRegistry, name: str) -> list[dict[str, Any]]:
    """Labels and values of one metric."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return [s.labels | {"value": s.value} for family in families for s in family.samples if s.name == name]


def test_an_api_server_shows_what_is_announced(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From when vLLM's module for metrics is imported, which is before or after the plugin is loaded."""
    (tmp_path / "module_for_metrics.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reports, "_METRICS_MODULE", "module_for_metrics")
    states = [SimpleNamespace(name=state.replace(" ", "-"), state=state) for state in ("on", "waiting", "left out")]
    on_change: list[Callable[[], None]] = []
    reports.announce(lambda: states, on_change)
    assert json.loads((tmp_path / f"{os.getpid()}.json").read_text())["patches"] == {
        "on": "on",
        "waiting": "waiting",
        "left-out": "left out",
    }
    assert processes() == ["main"]
    assert not metrics(registry, "gemma4_spec_process")
    try:
        importlib.import_module("module_for_metrics")
        reports.announce(lambda: states, on_change)  # as when the plugin is loaded again
        reports.announce(lambda: states, [])
    finally:
        del sys.modules["module_for_metrics"]
    assert on_change == [reports.write]
    who = {"process": "APIServer", "pid": str(os.getpid())}
    assert metrics(registry, "gemma4_spec_process") == [who | {"version": __version__, "value": 1}]
    assert metrics(registry, "gemma4_spec_patch_on") == [
        who | {"patch": "on", "value": 1},
        who | {"patch": "waiting", "value": 1},
        who | {"patch": "left-out", "value": 0},
    ]
    assert not metrics(registry, "gemma4_spec_server")  # no server has been built


def test_a_report_is_written_when_the_name_is_known(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "late_module_for_metrics.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reports, "_METRICS_MODULE", "late_module_for_metrics")
    reports.announce(tuple, [])
    assert processes() == ["main"]
    importlib.import_module("late_module_for_metrics")
    try:
        assert processes() == ["APIServer"]
        assert len(metrics(registry, "gemma4_spec_process")) == 1
    finally:
        del sys.modules["late_module_for_metrics"]


def test_why_not_the_files_of_prometheus_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its variable is vLLM's switch, too; and what is counted after the folder was removed is never seen."""
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.values import MultiProcessValue
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    assert "process_start_time_seconds" in {family.name for family in get_prometheus_registry().collect()}
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    assert get_prometheus_registry() is not REGISTRY
    assert not list(get_prometheus_registry().collect())

    value = MultiProcessValue(lambda: 7)("counter", "seen", "seen_total", (), (), "in a file")
    value.inc(3)
    collector = MultiProcessCollector(CollectorRegistry())
    assert [sample.value for family in collector.collect() for sample in family.samples] == [3]
    shutil.rmtree(folder)
    folder.mkdir()
    value.inc(3)
    assert not list(collector.collect())


def test_drafts_skipped_are_the_requests_that_were_not_drafted_for(tiny: dict[str, Path]) -> None:
    """Near the maximum length the drafter is not run: proposals and skips together are all that were sampled."""
    prompts = random_prompts([40, 20, 30])
    with engine(tiny["target"], tiny["close"], 3, max_model_len=64, max_num_batched_tokens=256) as llm:
        recorder = Recorder(llm)
        runner, sampled = recorder.runner, []
        original = runner._sample

        def sample(*args: Any) -> Any:
            sampled.append(runner.input_batch.num_reqs)
            return original(*args)

        runner._sample = sample
        before = shown()
        generate(llm, prompts, [64 - len(p) for p in prompts])
        skipped = (shown() - before)["gemma4_spec_drafts_skipped_total",]
    assert skipped > 0
    assert skipped + len(recorder.given) == sum(sampled)


def test_nothing_is_skipped_without_speculation(tiny: dict[str, Path]) -> None:
    before = shown()
    with engine(tiny["target"], max_model_len=64, max_num_batched_tokens=256) as llm:
        generate(llm, random_prompts([40]), 24)
    assert shown() == before


@pytest.mark.parametrize("name", ["31b-awq-full", "e4b-awq-clip"])
def test_nan_blocks_repaired_are_those_that_inspect_finds(name: str) -> None:
    found = inspect(Checkpoint(FIXTURES / name)).nan
    assert found
    before = shown()
    with engine(FIXTURES / name, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=1):
        pass
    repaired = shown() - before
    assert repaired["gemma4_spec_nan_blocks_repaired_total", "zeroed"] == sum(n.destroyed for n in found)
    assert repaired["gemma4_spec_nan_blocks_repaired_total", "saturated"] == sum(n.intact for n in found)


@pytest.mark.slow
def test_stock_counts_no_dropped_draft(tiny: dict[str, Path]) -> None:
    before = shown()
    with without(SKIPPED_DRAFTS), engine(tiny["target"], tiny["close"], 3, max_model_len=64) as llm:
        generate(llm, random_prompts([40]), 24)
    assert shown() == before
