"""vLLM 0.19.1's own tests, without and with the plugin: no outcome may get worse.

``make test-upstream``. Takes the release's source distribution from the package index, runs the tests that
concern what is patched and can run on a CPU twice in the same environment, and compares their junit files.
Exits with 1 if a test got worse or a run gave no results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated

import typer

from vllm_gemma4_spec.patching.version import SUPPORTED

ROOT = Path(__file__).parents[1]
CHAT = "tests/entrypoints/openai"

GROUPS: dict[str, tuple[str, ...]] = {
    "parsers of Gemma": (
        "tests/reasoning/test_gemma4_reasoning_parser.py",
        "tests/tool_parsers/test_gemma4_tool_parser.py",
        "tests/tool_parsers/test_functiongemma_tool_parser.py",
        "tests/renderers/test_gemma4_chat_template.py",
    ),
    "chat serving": (
        f"{CHAT}/chat_completion/test_chat_error.py",
        f"{CHAT}/chat_completion/test_serving_chat.py",
        f"{CHAT}/chat_completion/test_serving_chat_stream_harmony.py",
        f"{CHAT}/completion/test_completion_error.py",
        f"{CHAT}/parser",
        f"{CHAT}/responses/test_errors.py",
        f"{CHAT}/responses/test_function_call_parsing.py",
        f"{CHAT}/responses/test_harmony_utils.py",
        f"{CHAT}/responses/test_protocol.py",
        f"{CHAT}/responses/test_responses_utils.py",
        f"{CHAT}/responses/test_sampling_params.py",
        f"{CHAT}/responses/test_serving_responses.py",
        f"{CHAT}/test_cli_args.py",
        "tests/renderers/test_completions.py",
        "tests/tool_use/test_chat_completion_request_validations.py",
        "tests/tool_use/test_tool_choice_required.py",
    ),
    "speculation": ("tests/v1/spec_decode",),
    "rejection sampler": (
        "tests/v1/sample/test_rejection_sampler.py",
        "tests/v1/sample/test_sampler.py",
        "tests/v1/sample/test_topk_topp_sampler.py",
    ),
    "KV cache management and scheduling": ("tests/v1/core", "tests/v1/cudagraph", "tests/v1/test_request.py"),
    "model runner": ("tests/v1/worker",),
    "ModelOpt": (
        "tests/quantization/test_modelopt.py",
        "tests/quantization/test_configs.py",
        "tests/quantization/test_register_quantization_config.py",
        "tests/model_executor/test_weight_utils.py",
    ),
    "engine arguments and configs": (
        "tests/v1/engine/test_engine_args.py",
        "tests/engine/test_arg_utils.py",
        "tests/test_config.py",
        "tests/test_envs.py",
        "tests/test_triton_utils.py",
    ),
    "parsers of other models": ("tests/reasoning", "tests/tool_parsers", f"{CHAT}/tool_parsers"),
    "plugins": ("tests/plugins_tests/test_platform_plugins.py", "tests/plugins_tests/test_scheduler_plugins.py"),
}

# Whole modules that run an engine or a server on a model that has to be downloaded, or on a GPU: each of their
# tests would start one, wait, and fail both ways.
EXCLUDED = (
    "tests/v1/core/test_scheduler_e2e.py",
    "tests/v1/core/test_reset_prefix_cache_e2e.py",
    "tests/v1/spec_decode/test_acceptance_length.py",
    "tests/v1/spec_decode/test_speculators_eagle3.py",
    "tests/v1/spec_decode/test_max_len.py",
    "tests/v1/cudagraph/test_cudagraph_mode.py",
)

WAYS: dict[str, dict[str, str]] = {"stock": {"VLLM_GEMMA4_SPEC": "0"}, "overlay": {}}
FAILED = ("failed", "error")
RANK = {"passed": 3, "xfailed": 3, "skipped": 2, "failed": 1, "error": 1, "absent": 0}

# Why a test cannot pass here, by what its message says; the first that fits. The dummies are plugins of vLLM's tests.
CAUSES = {
    "needs a download": r"couldn't connect|offline|LocalEntryNotFound|ConnectionError|NameResolution|HfHub|"
    r"Repo id must|not a local folder|MaxRetryError|Can't load|Failed to load the tokenizer|No such file .*/hub|"
    r"Invalid repository ID|ensure the presence of a 'params\.json'|but found ERROR for|"
    r"no local files were found|failed to download",
    "needs a GPU": r"cuda|Unsupported platform|nvidia|NVML|GPU|Triton|triton|No module named 'flashinfer",
    "needs a package": r"No module named|ModuleNotFound|ImportError|could not import|Dummy(Device|RotaryEmbedding)",
    "took too long": r"Timeout",
}


@dataclass(frozen=True)
class Outcome:
    """``passed``, ``skipped``, ``xfailed``, ``failed`` or ``error``, and the first line that says why."""

    state: str
    message: str = ""

    @property
    def cause(self) -> str:
        return next((name for name, words in CAUSES.items() if re.search(words, self.message)), "other")


Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class Patches:
    """What of the plugin was there in a run of pytest.

    Attributes:
        states: patch -> its state at the end.
        in_force: module of vLLM's tests -> patch -> (targets replaced, targets) after the module's last test.
    """

    states: dict[str, str]
    in_force: dict[str, dict[str, list[int]]]

    def of_group(self, group: str) -> str:
        """The patches that had replaced something in the test process, and how much of each if not all.

        A target is replaced once its module has been imported, and a process has imported what earlier groups needed.
        """
        most: dict[str, list[int]] = {}
        for module, patches in self.in_force.items():
            if any(module == path or module.startswith(f"{path}/") for path in GROUPS[group]):
                for name, (replaced, targets) in patches.items():
                    most[name] = [max(replaced, most.get(name, [0])[0]), targets]
        shown = (f"{n}" if r == t else f"{n} ({r} of {t})" for n, (r, t) in most.items() if r)
        return ", ".join(shown) or "none"


def stand_in_hub(folder: Path, artifacts: Path | None) -> Path:
    """A Hugging Face cache with what these tests ask for and can be had without a download.

    ``facebook/opt-125m`` is the default of transformers' own ``OPTConfig`` (configuration only, no weights);
    Gemma 4's tokenizer comes from ``artifacts``, if given.
    """
    from transformers import OPTConfig

    def repository(name: str) -> Path:
        root = folder / f"models--{name.replace('/', '--')}"
        snapshot = root / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs/main").write_text(snapshot.name)
        return snapshot

    OPTConfig(architectures=["OPTForCausalLM"], dtype="float16").save_pretrained(repository("facebook/opt-125m"))
    if artifacts is not None:
        gemma = repository("google/gemma-4-E2B-it")
        for file in [
            *(artifacts / "gemma4/tokenizer").iterdir(),
            artifacts / "gemma4/models/gemma-4-E4B-it/config.json",
        ]:
            shutil.copy(file, gemma / file.name)
    return folder


def read_junit(path: Path) -> Outcomes:
    """Test id -> outcome. A module that cannot be collected is one entry, named after the module."""
    out: Outcomes = {}
    for case in ET.parse(path).iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        state = Outcome("passed")
        for child in case:
            message = " ".join(f"{child.get('message') or ''} {child.text or ''}".split())
            if child.tag == "skipped":
                xfail = child.get("type") == "pytest.xfail"
                state = Outcome("xfailed" if xfail else "skipped", (child.get("message") or "")[:300])
            elif child.tag in ("failure", "error"):
                # The end of the text is where the exception stands.
                text = f"{(child.get('message') or '')[:300]} … {message[-600:]}"
                state = Outcome("failed" if child.tag == "failure" else "error", text)
        if name not in out or RANK[state.state] < RANK[out[name].state]:
            out[name] = state  # a test and the error of its teardown are two entries of one name
    return out


def run_pytest(
    work: Path, selection: list[str], way: str, limit: float, timeout: int, tag: str
) -> tuple[Outcomes, Patches]:
    """Run ``selection`` in a process group of its own, and end all of it when the results are there.

    Returns:
        The outcomes and the patches (both empty if the run ended without results).
    """
    results = work / "results"
    results.mkdir(exist_ok=True)
    junit, states, log = (results / f"{tag}-{way}.{end}" for end in ("xml", "json", "log"))
    for old in (junit, states):
        old.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    env |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(work / "hub"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "UPSTREAM_STATES": str(states),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "upstream_plugin",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--tb=short",
    ]
    command += ["--continue-on-collection-errors", f"--timeout={timeout}", f"--junitxml={junit}"]
    command += [*(f"--ignore={path}" for path in EXCLUDED), *selection]
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=work, env=env | WAYS[way], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                if states.exists() and junit.exists() and time.time() - junit.stat().st_mtime > 10:
                    break  # some tests leave threads that keep Python from ending
                time.sleep(0.5)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    break
                time.sleep(1)
            process.wait()
    outcomes = read_junit(junit) if junit.exists() else {}
    typer.echo(f"{tag} [{way}] {time.monotonic() - started:.0f} s: {counts(outcomes) or 'NO RESULTS; see ' + str(log)}")
    return outcomes, Patches(**json.loads(states.read_text())) if states.exists() else Patches({}, {})


@dataclass(frozen=True)
class Difference:
    test: str
    stock: Outcome
    overlay: Outcome

    @property
    def worse(self) -> bool:
        return RANK[self.overlay.state] < RANK[self.stock.state]


def differences(stock: Mapping[str, Outcome], overlay: Mapping[str, Outcome]) -> Iterator[Difference]:
    absent = Outcome("absent")
    for test in sorted({*stock, *overlay}):
        pair = Difference(test, stock.get(test, absent), overlay.get(test, absent))
        if RANK[pair.stock.state] != RANK[pair.overlay.state]:
            yield pair


def counts(outcomes: Mapping[str, Outcome]) -> str:
    by_state = Counter(o.state for o in outcomes.values())
    return ", ".join(f"{by_state[s]} {s}" for s in RANK if by_state[s])


HEAD = """# vLLM's own tests

`make test-upstream` takes the tests that vLLM 0.19.1 was released with and runs those that concern what is patched and
can run on a CPU: once with `VLLM_GEMMA4_SPEC=0`, once with every patch on, in the same environment, without a network.
It ends with an error if any test gets worse, and writes this page.

`facebook/opt-125m` is stood in for by transformers' default `OPTConfig` (no weights), `google/gemma-4-E2B-it` by the
genuine tokenizer. What needs another download, or a GPU, fails both ways and is listed below. The rejection sampler's
tests get better because its Triton kernels cannot be launched on a CPU, and have forms in PyTorch with the plugin.

"""


def report(found: Mapping[str, Mapping[str, Outcomes]], worse: Mapping[str, Difference]) -> str:
    """The page: counts, what differs, and every test that passes neither way, with its cause.

    Args:
        found: group -> way -> outcomes.
        worse: the tests that got worse, by id.
    """
    lines = [HEAD + "| tests of vLLM 0.19.1 | stock | with the plugin | better | worse |", "|---|---|---|---|---|"]
    better: list[str] = []
    neither: dict[str, Counter[str]] = {}
    for group, ways in found.items():
        pairs = list(differences(ways["stock"], ways["overlay"]))
        good = [p for p in pairs if not p.worse]
        bad = sum(p.test in worse for p in pairs)
        lines.append(f"| {group} | {counts(ways['stock'])} | {counts(ways['overlay'])} | {len(good)} | {bad} |")
        better += [f"- `{p.test}`: {p.stock.state} → {p.overlay.state}" for p in good]
        for test, outcome in ways["overlay"].items():
            if outcome.state in FAILED and ways["stock"].get(test, outcome).state in FAILED:
                neither.setdefault(test.split("::")[0], Counter())[outcome.cause] += 1
    if missing := [g for g in GROUPS if g not in found]:
        lines += ["", f"**Not compared in this run:** {', '.join(missing)}."]
    lines += ["", f"## Worse with the plugin: {len(worse)}", ""]
    lines += [f"- `{p.test}`: {p.stock.state} → {p.overlay.state}: {p.overlay.message}" for p in worse.values()] or [
        "None."
    ]
    lines += ["", f"## Better with the plugin: {len(better)}", "", *(better or ["None."])]
    lines += ["", f"## Failing both ways: {sum(n for c in neither.values() for n in c.values())}", ""]
    lines += [
        "Alike without and with the plugin; the cause is read from the message.",
        "",
        "| module | tests | cause |",
    ]
    lines += ["|---|---|---|"]
    for module, causes in sorted(neither.items()):
        lines += [f"| `{module}` | {n} | {cause} |" for cause, n in causes.most_common()]
    lines += ["", "Not run, since each of their tests needs a model from a hub, or a GPU:", ""]
    lines += [f"- `{path}`" for path in EXCLUDED]
    return "\n".join(lines) + "\n"


def prepare(work: Path, cache: Path) -> None:
    import vllm_sources

    package = vllm_sources.releases(SUPPORTED)[SUPPORTED]
    archive = vllm_sources.fetch(package, cache)
    shutil.rmtree(work / "tests", ignore_errors=True)
    # Not vllm/: it would be imported instead of the one installed.
    vllm_sources.unpack(archive, ("tests", "examples", "pyproject.toml"), work)
    artifacts = os.environ.get("GEMMA4_ARTIFACTS")
    stand_in_hub(work / "hub", Path(artifacts) if artifacts else None)


def main(
    work: Annotated[Path, typer.Option(help="Folder for the tests and their results.")] = ROOT / "build/upstream",
    cache: Annotated[Path, typer.Option(help="Folder for the downloaded release.")] = ROOT / "build/vllm-sources",
    only: Annotated[list[str] | None, typer.Option(help="A group; may be given several times. Default: all.")] = None,
    timeout: Annotated[int, typer.Option(help="Seconds for one test.")] = 120,
    limit: Annotated[int, typer.Option(help="Seconds for all tests, one way.")] = 7200,
    page: Annotated[Path | None, typer.Option(help="Write the report (Markdown) here, too.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep the results of groups that an earlier call has run.")] = False,
) -> None:
    """Run vLLM's own tests without and with the plugin and compare every outcome."""
    if unknown := set(only or ()) - set(GROUPS):
        raise typer.BadParameter(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    work = work.resolve()
    (work / "results").mkdir(parents=True, exist_ok=True)
    saved = work / "results/outcomes.json"
    if not (resume and saved.exists()):
        prepare(work, cache)
        saved.write_text("{}")
    found: dict[str, dict[str, Outcomes]] = {
        group: {way: {t: Outcome(*o) for t, o in outcomes.items()} for way, outcomes in ways.items()}
        for group, ways in json.loads(saved.read_text()).items()
    }
    problems: list[str] = []
    chosen = [g for g in GROUPS if g not in found and (only is None or g in only)]
    paths = [p for g in chosen for p in GROUPS[g] if (work / p).exists()]
    # Modules that another group holds are not run again because a folder holds them, too.
    paths += [f"--ignore={p}" for g in GROUPS if g not in chosen for p in GROUPS[g] if p.endswith(".py")]
    for way in WAYS if chosen else ():
        # One process a way: importing vLLM and its conftest takes longer than most of these tests.
        outcomes, patches = run_pytest(work, paths, way, limit, timeout, "all")
        if not outcomes or not patches.states:
            problems.append(f"no results [{way}]")
        wanted = ("off",) if way == "stock" else ("on", "waiting")
        if any(state not in wanted for state in patches.states.values()):
            problems.append(f"[{way}] patches were {patches.states}")
        for test, outcome in outcomes.items():
            found.setdefault(_group(work, test, chosen), {w: {} for w in WAYS})[way][test] = outcome
        for group in chosen:
            typer.echo(f"patches in force [{way}], {group}: {patches.of_group(group)}")
    worse = {p.test: p for ways in found.values() for p in differences(ways["stock"], ways["overlay"]) if p.worse}
    if worse:
        # Their modules run again, both ways: what is worse only once is the machine's doing.
        modules = sorted({_file(work, test) for test in worse})
        second = {way: run_pytest(work, modules, way, limit, timeout, "again")[0] for way in WAYS}
        twice = {p.test for p in differences(second["stock"], second["overlay"]) if p.worse}
        for test in sorted(worse.keys() - twice):
            typer.echo(f"worse only once: {test}: {worse.pop(test).overlay.message[:300]}")
            ways = next(ways for ways in found.values() if test in ways["stock"] or test in ways["overlay"])
            for way, outcomes in second.items():
                if test in outcomes:
                    ways[way][test] = outcomes[test]
    if not problems:
        plain = {
            g: {w: {t: astuple(o) for t, o in os_.items()} for w, os_ in ways.items()} for g, ways in found.items()
        }
        saved.write_text(json.dumps(plain))
    text = report({g: found[g] for g in GROUPS if g in found}, worse)
    typer.echo(text)
    if page is not None:
        page.write_text(text)
    problems += [f"worse with the plugin: {test}" for test in worse]
    for line in problems:
        typer.echo(f"FAILED {line}", err=True)
    raise typer.Exit(1 if problems else 0)


def _group(work: Path, test: str, chosen: list[str]) -> str:
    file = _file(work, test)
    return next(g for g in chosen if any(file == p or file.startswith(p + "/") for p in GROUPS[g]))


def _file(work: Path, test: str) -> str:
    """The file of a junit test id: ``tests.v1.core.test_x.TestY::test_z`` or, uncollected, ``tests.v1.core.test_x``."""
    parts = test.split("::")[0].split(".")
    for end in range(len(parts), 0, -1):
        path = Path(*parts[:end]).with_suffix(".py")
        if (work / path).is_file():
            return str(path)
    raise FileNotFoundError(test)


if __name__ == "__main__":
    typer.run(main)
