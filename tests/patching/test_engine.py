"""The patch engine itself, on the real targets in vLLM 0.19.1."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.fresh import run, run_after_vllm, run_from_nothing
from vllm_gemma4_spec.patching import fingerprint, ledger
from vllm_gemma4_spec.patching.patch import Group
from vllm_gemma4_spec.registry import PATCHES

ROOT = Path(__file__).parents[2]

# Imports every module that a patch touches, so that nothing stays "waiting".
IMPORT_ALL = """
import importlib, json
import vllm_gemma4_spec as ours
from vllm_gemma4_spec.registry import PATCHES
from vllm_gemma4_spec.registry import PATCHER
modules = list(dict.fromkeys(e.module for p in PATCHES for e in p.edits))
def load(): [importlib.import_module(m) for m in ('vllm.config', *modules)]  # vLLM's own order for convertors
def raw():
    import functools, vllm.config
    out = {}
    for p in PATCHES:
        for e in p.edits:
            *path, attribute = e.target.partition(":")[2].split(".")
            owner = functools.reduce(getattr, path, importlib.import_module(e.module))
            out[e.target] = vars(owner).get(attribute, "absent")
    return out
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_applied_once_and_undone_whatever_was_imported_first(when: str) -> None:
    first, second = ("ours.apply()", "load()") if when == "before" else ("load()", "ours.apply()")
    stock = "{}" if when == "before" else "raw()"
    in_a_process = run if when == "before" else run_after_vllm
    done = in_a_process(
        IMPORT_ALL
        + f"""
if {when == "after"}: load()
stock = {stock}
{first}; {second}
once = raw()
ours.apply(); ours.register()
assert raw() == once, "a second apply changed something"
assert {{s.state for s in ours.status()}} == {{"on"}}, ours.status()
if stock:
    same = [t for t in stock if stock[t] is once[t]]
    print(json.dumps({{"untouched": same}}))
ours.undo()
back = raw()
if stock:
    assert all(stock[t] is back[t] for t in stock), [t for t in stock if stock[t] is not back[t]]
assert not [t for t in back if getattr(back[t], "__module__", "").startswith("vllm_gemma4_spec")]
assert {{s.state for s in ours.status()}} == {{"not applied"}}
ours.apply()
assert {{s.state for s in ours.status()}} == {{"on"}}
print("fine")
"""
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("fine")


def test_one_of_two_patches_on_a_target_can_be_undone() -> None:
    done = run_after_vllm(
        IMPORT_ALL
        + """
from collections import Counter
ours.apply(); load()
once = raw()
shared = [t for t, n in Counter(e.target for p in PATCHES for e in p.edits).items() if n > 1]
assert shared, "no two patches share a target any more: this test checks nothing"
for patch in PATCHES:
    PATCHER.undo([patch])
    states = {s.name: s.state for s in ours.status()}
    assert states.pop(patch.name) == "not applied"
    assert set(states.values()) == {"on"}, states
    PATCHER.apply([patch])
assert {s.state for s in ours.status()} == {"on"}
ours.undo()
left = [t for t, o in raw().items() if getattr(o, "__module__", "").startswith("vllm_gemma4_spec")]
assert not left, left
print("fine")
"""
    )
    assert done.stdout.strip().endswith("fine"), done.stdout + done.stderr[-3000:]


def test_register_imports_nothing_heavy_and_is_quick_in_modules() -> None:
    """Importing and registering adds no module of vLLM's engine, no torch, no transformers by itself."""
    done = run(
        """
        import sys, vllm, vllm.envs
        before = set(sys.modules)
        import vllm_gemma4_spec; vllm_gemma4_spec.register()
        new = {m for m in set(sys.modules) - before if m.split(".")[0] in ("torch", "transformers", "vllm", "triton")}
        print(sorted(new))
        """
    )
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr


def test_importing_the_package_imports_no_vllm() -> None:
    done = run_from_nothing(
        "import sys, vllm_gemma4_spec; print([m for m in ('vllm', 'torch', 'wrapt') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            "import vllm.v1.spec_decode.eagle as e\ne.SpecDecodeBaseProposer._get_slot_mapping = lambda self, n: {}",
            "SpecDecodeBaseProposer._get_slot_mapping was replaced before",
        ),
        (
            "import vllm.v1.worker.block_table as b\ndel b.BlockTable.move_row",
            "BlockTable.move_row is gone",
        ),
        (
            "import vllm_gemma4_spec.patching.fingerprint as f; f.of_source = lambda *a: 0; f._digest = lambda d: ''",
            # Names whichever target comes first in the order of the patches.
            "vLLM 0.19.1 is not the 0.19.1 these patches were written for: vllm.",
        ),
        pytest.param(
            "import vllm; vllm.__version__ = '0.20.0'",
            "vLLM 0.20.0 is installed and this plugin is for 0.19.1",
            marks=pytest.mark.slow,  # test_on_another_release_the_start_ends_with_one_line says so, too
        ),
    ],
    ids=["replaced", "gone", "changed", "version"],
)
def test_a_target_that_is_not_the_one_stops_everything(prepare: str, message: str) -> None:
    done = run_after_vllm(
        IMPORT_ALL
        + prepare
        + """
try:
    ours.apply(); load()
except Exception as error:
    print(type(error).__name__, error)
print("patched:", [t for t, o in raw().items() if getattr(o, "__module__", "").startswith("vllm_gemma4_spec")])
"""
    )
    assert message in done.stdout, done.stdout + done.stderr[-2000:]
    assert "patched: []" in done.stdout


WRONG_SWITCHES = (
    ({"VLLM_GEMMA4_SPEC_PATCH_DRAFT_GRUOPS": "0"}, "VLLM_GEMMA4_SPEC_PATCH_DRAFT_GRUOPS: no such patch switch"),
    ({"VLLM_GEMMA4_SPEC_CHEKC": "1"}, "VLLM_GEMMA4_SPEC_CHEKC: no such setting"),
    ({"VLLM_GEMMA4_SPEC": "maybe"}, "VLLM_GEMMA4_SPEC='maybe': expected one of 0, 1"),
    ({"VLLM_GEMMA4_SPEC_ADAPTIVE_K": "1"}, "VLLM_GEMMA4_SPEC_ADAPTIVE_K='1': expected a number from 0 to below 1"),
    ({"VLLM_GEMMA4_SPEC_ADAPTIVE_K": "nan"}, "expected a number from 0 to below 1; unset it for '0'"),
    ({"VLLM_GEMMA4_SPEC_ADAPTIVE_K": "on"}, "expected a number from 0 to below 1"),
)


def test_a_wrong_switch_is_one_line() -> None:
    """All in one process: a start that is refused leaves nothing behind."""
    done = run(
        f"""
        import os, vllm_gemma4_spec as ours
        for env in {[env for env, _ in WRONG_SWITCHES]}:
            os.environ.update(env)
            try:
                ours.apply()
            except ValueError as error:
                print(error)
            for name in env:
                del os.environ[name]
        """
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(WRONG_SWITCHES), done.stdout + done.stderr
    for line, (_, message) in zip(lines, WRONG_SWITCHES, strict=True):
        assert message in line


def test_switches() -> None:
    code = """
    import vllm, vllm.envs, vllm_gemma4_spec as o
    o.register()
    print([s.name for s in o.status() if s.state == "off"])
    """
    off = run(code, VLLM_GEMMA4_SPEC="0")
    assert set(off.stdout.strip().splitlines()[-1].strip("[]").replace("'", "").split(", ")) == {
        p.name for p in PATCHES
    }
    one = run(code, VLLM_GEMMA4_SPEC_PATCH_LORA_ALIASES="0")
    assert one.stdout.strip().splitlines()[-1] == "['lora-aliases']"
    assert "answers may be wrong" in one.stdout + one.stderr


def test_switches_are_known_to_vllm_and_in_its_cache_key() -> None:
    code = """
    import vllm, vllm.envs, vllm_gemma4_spec as o
    o.register()
    vllm.envs.validate_environ(hard_fail=True)
    factors = vllm.envs.compile_factors()
    print({k: v for k, v in factors.items() if k.startswith("VLLM_GEMMA4_SPEC")})
    """
    on, off = run(code), run(code, VLLM_GEMMA4_SPEC_PATCH_LORA_ALIASES="0")
    assert on.returncode == off.returncode == 0, off.stderr[-2000:]
    assert "VLLM_GEMMA4_SPEC_STATE" in on.stdout
    assert on.stdout.strip().splitlines()[-1] != off.stdout.strip().splitlines()[-1]


def test_the_vllm_command_ends_with_one_line(tmp_path: Path) -> None:
    """A user's mistake in the ``vllm`` command is no traceback."""
    done = run(
        """
        import sys; sys.argv[0] = "/usr/bin/vllm"
        import vllm, vllm_gemma4_spec; vllm_gemma4_spec.register()
        """,
        VLLM_GEMMA4_SPEC="2",
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("vllm-gemma4-spec: VLLM_GEMMA4_SPEC='2'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "version",
    [pytest.param("0.19.0", marks=pytest.mark.slow), "0.20.0", pytest.param("0.33.0", marks=pytest.mark.slow)],
)
def test_on_another_release_the_start_ends_with_one_line(version: str) -> None:
    code = f"""
    import sys; sys.argv[0] = "/usr/bin/vllm"
    import vllm; vllm.__version__ = "{version}"
    import vllm_gemma4_spec as ours; ours.register()
    print(sorted({{s.state for s in ours.status()}}))
    """
    refused = run(code)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1] == (
        f"vllm-gemma4-spec: vLLM {version} is installed and this plugin is for 0.19.1; install vllm==0.19.1, "
        "or set VLLM_GEMMA4_SPEC=0 to run without the plugin"
    )
    assert "Traceback" not in refused.stderr
    off = run(code, VLLM_GEMMA4_SPEC="0")
    assert off.returncode == 0, off.stderr[-2000:]
    assert off.stdout.strip().splitlines()[-1] == "['off']"


def test_each_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = [s for p in PATCHES for s in p.checked_symbols]
    read: list[str] = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(str(self)) or original(self))
    assert fingerprint.installed(symbols) == {s: fingerprint.wanted(s) for s in symbols}
    assert len(read) == len(set(read)) == len({s.partition(":")[0] for s in symbols})


def test_declarations_are_complete() -> None:
    names = [p.name for p in PATCHES]
    assert len(set(names)) == len(names)
    for patch in PATCHES:
        assert patch.edits
        assert isinstance(patch.group, Group)
        assert all(len(text) > 10 for text in (patch.why, patch.how, patch.retire, patch.scope))
        assert re.search(r"#\d{5}|none found", patch.related), patch.name


def test_fingerprints_are_those_of_the_installed_vllm() -> None:
    """From the source text, not by the digest of whole files, which is the quick way."""
    wanted = {s: fingerprint.wanted(s) for p in PATCHES for s in p.checked_symbols}
    built = fingerprint.build_record(list(wanted))
    assert {f"{m}:{n}": mark for m, entry in built.items() for n, mark in entry["symbols"].items()} == wanted
    assert json.loads(fingerprint.RECORD.read_text()) == built


def test_the_ledger_is_current() -> None:
    assert (ROOT / "docs/reference/patches.md").read_text() == ledger.render(PATCHES), "run `make ledger`"
