"""vLLM 0.19.1's own tests, without and with the overlay: no outcome may get worse.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from vllm_gemma4_spec.patching.version import SUPPORTED

ROOT = Path(__file__).parents[1]
CHAT = "tests/entrypoints/openai"

GROUPS: dict[str, tuple[str, ...]] = {
    "reasoning and tool parsers": (
        "tests/reasoning",
        "tests/tool_parsers",
        f"{CHAT}/tool_parsers",
        "tests/tool_use/test_chat_completion_request_validations.py",
        "tests/tool_use/test_tool_choice_required.py",
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
        "tests/renderers/test_gemma4_chat_template.py",
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
RANK = {"passed": 3, "xfailed": 3, "skipped": 2, "failed": 1, "error": 1, "absent": 0}

# Why a test cannot pass here, by what its message says; the first that fits.
CAUSES = {
    "needs a download": r"couldn't connect|offline|LocalEntryNotFound|ConnectionError|NameResolution|HfHub|"
    r"Repo id must|not a local folder|MaxRetryError|Can't load|Failed to load the tokenizer|No such file .*/hub",
    "needs a GPU": r"cuda|Unsupported platform|nvidia|NVML|GPU|Triton|triton|No module named 'flashinfer",
    "needs a package": r"No module named|ModuleNotFound|ImportError|could not import",
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


@dataclass
class Run:
    """One group, run one way."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    patches: dict[str, str] = field(default_factory=dict)  # name -> state at the end of the run
    seconds: float = 0.0


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


def read_junit(path: Path) -> dict[str, Outcome]:
    """Test id -> outcome. A module that cannot be collected is one entry, named after the module."""
    out: dict[str, Outcome] = {}
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


def run_pytest(work: Path, selection: list[str], way: str, limit: float, timeout: int, tag: str) -> Run:
    """Run ``selection`` in a process group of its own, and end all of it when the results are there."""
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
    done = Run(seconds=round(time.monotonic() - started, 1))
    if junit.exists():
        done.outcomes = read_junit(junit)
    if states.exists():
        done.patches = json.loads(states.read_text())
    return done


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


def report(runs: dict[str, dict[str, Run]], again: dict[str, list[Difference]]) -> str:
    """The page: counts, what differs, and every test that passes neither way, with its cause."""
    lines = ["| tests of vLLM 0.19.1 | stock | with the overlay | better | worse |", "|---|---|---|---|---|"]
    better: list[str] = []
    worse: list[str] = []
    neither: dict[str, Counter[str]] = {}
    causes: Counter[str] = Counter()
    for group, ways in runs.items():
        pairs = list(differences(ways["stock"].outcomes, ways["overlay"].outcomes))
        bad = [p for p in pairs if p.worse and p.test in {a.test for a in again.get(group, []) if a.worse}]
        good = [p for p in pairs if not p.worse]
        lines.append(
            f"| {group} | {counts(ways['stock'].outcomes)} | {counts(ways['overlay'].outcomes)} | {len(good)} "
            f"| {len(bad)} |"
        )
        better += [f"- `{p.test}`: {p.stock.state} → {p.overlay.state}" for p in good]
        worse += [f"- `{p.test}`: {p.stock.state} → {p.overlay.state}: {p.overlay.message}" for p in bad]
        for test, outcome in ways["overlay"].outcomes.items():
            stock = ways["stock"].outcomes.get(test, Outcome("absent"))
            if outcome.state in ("failed", "error") and stock.state in ("failed", "error"):
                module = re.split(r"::", test)[0].removesuffix(".py").replace("/", ".")
                neither.setdefault(module, Counter())[outcome.cause] += 1
                causes[outcome.cause] += 1
    both = sum(n for n in causes.values())
    lines += ["", f"## Worse with the overlay: {len(worse)}", "", *(worse or ["None."])]
    lines += ["", f"## Better with the overlay: {len(better)}", "", *(better or ["None."])]
    lines += ["", f"## Failing both ways: {both}", ""]
    lines += ["Alike without and with the overlay, for what this machine lacks.", "", "| module | tests | cause |"]
    lines += ["|---|---|---|"]
    for module, found in sorted(neither.items()):
        lines += [f"| `{module}` | {n} | {cause} |" for cause, n in found.most_common()]
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
    limit: Annotated[int, typer.Option(help="Seconds for one group run one way.")] = 1800,
    page: Annotated[Path | None, typer.Option(help="Write the report (Markdown) here, too.")] = None,
    resume: Annotated[bool, typer.Option(help="Take groups from an earlier run's results where they are.")] = False,
) -> None:
    """Run vLLM's own tests without and with the overlay and compare every outcome."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = [g for g in GROUPS if only is None or g in only]
    if only and set(only) - set(GROUPS):
        raise typer.BadParameter(f"no such group: {', '.join(sorted(set(only) - set(GROUPS)))}; {', '.join(GROUPS)}")
    if not (resume and (work / "tests").exists()):
        prepare(work, cache)
    runs: dict[str, dict[str, Run]] = {}
    again: dict[str, list[Difference]] = {}
    failed: list[str] = []
    for group in chosen:
        tag = re.sub(r"\W+", "-", group).lower()
        saved = work / "results" / f"{tag}.json"
        if resume and saved.exists():
            runs[group] = {w: _load(r) for w, r in json.loads(saved.read_text()).items()}
        else:
            paths = [p for p in GROUPS[group] if (work / p).exists()]
            runs[group] = {way: run_pytest(work, paths, way, limit, timeout, tag) for way in WAYS}
            saved.write_text(json.dumps({w: asdict(r) for w, r in runs[group].items()}))
        stock, overlay = (runs[group][way] for way in WAYS)
        for way, run in runs[group].items():
            typer.echo(f"{group} [{way}] {run.seconds} s: {counts(run.outcomes) or 'NO RESULTS'}")
            if not run.outcomes:
                failed.append(f"{group} [{way}]: no results; see {work / 'results'}")
        if stock.patches and set(stock.patches.values()) != {"off"}:
            failed.append(f"{group} [stock]: patches were on")
        if overlay.patches and not {"on", "waiting"} >= set(overlay.patches.values()):
            failed.append(f"{group} [overlay]: patches were not on")
        pairs = list(differences(stock.outcomes, overlay.outcomes))
        for pair in pairs:
            typer.echo(f"  {pair.test}: {pair.stock.state} -> {pair.overlay.state}  {pair.overlay.message[:200]}")
        # A test that got worse once has its whole module run again, both ways: only what is worse twice counts.
        modules = sorted({_file(work, p.test) for p in pairs if p.worse})
        if modules:
            second = {way: run_pytest(work, modules, way, limit, timeout, f"{tag}-again") for way in WAYS}
            again[group] = list(differences(second["stock"].outcomes, second["overlay"].outcomes))
            twice = {p.test for p in again[group] if p.worse} & {p.test for p in pairs if p.worse}
            failed += [f"{test}: worse with the overlay, twice" for test in sorted(twice)]
            for pair in pairs:
                if pair.worse and pair.test not in twice:
                    typer.echo(f"  {pair.test}: not worse when run again")
    text = report(runs, again)
    typer.echo(text)
    if page is not None:
        page.write_text(text)
    on = {n for g in runs.values() for n, state in g["overlay"].patches.items() if state == "on"}
    typer.echo(f"Patches whose targets these tests imported: {', '.join(sorted(on))}")
    for line in failed:
        typer.echo(f"FAILED {line}", err=True)
    raise typer.Exit(1 if failed else 0)


def _load(saved: dict[str, object]) -> Run:
    outcomes = {t: Outcome(**o) for t, o in saved.pop("outcomes").items()}  # type: ignore[attr-defined]
    return Run(outcomes=outcomes, **saved)  # type: ignore[arg-type]


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
