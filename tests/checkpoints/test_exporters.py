"""Newest and pinned exporters write tiny models; the real engine gives the float32 reference's log-probabilities.

``GEMMA4_EXPORTERS`` names a folder of virtual environments (``make test-exporters`` makes it). The table of
docs/how-to/checkpoints.md is written where ``GEMMA4_EXPORTERS_PAGE`` names the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.checkpoints import reference, tiny
from tests.quantization.comparison import TOKENS, engine_logprobs, text_only
from vllm_gemma4_spec.checkpoints import sizing
from vllm_gemma4_spec.checkpoints.files import Checkpoint

FOLDER = os.environ.get("GEMMA4_EXPORTERS", "")
ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- exporters: begin -->", "<!-- exporters: end -->"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="GEMMA4_EXPORTERS names no folder of exporters' environments"),
]


@dataclass(frozen=True)
class Exporter:
    """A virtual environment, the script that it runs and the models that it writes."""

    package: str
    script: str
    names: tuple[str, ...]


EXPORTERS = {
    "transformers": Exporter(
        "transformers", "export_with_modelopt.py", ("31b-bf16", "e4b-bf16", "26b-bf16", "31b-mm-bf16", "e4b-mm-bf16")
    ),
    "modelopt-pinned": Exporter(
        "nvidia-modelopt",
        "export_with_modelopt.py",
        ("31b-nvfp4", "31b-awq-full", "31b-svdquant", "e4b-awq-lite", "e4b-mixed", "26b-mm-mixed"),
    ),
    "modelopt-newest": Exporter(
        "nvidia-modelopt",
        "export_with_modelopt.py",
        (
            *("31b-nvfp4", "31b-w4a16", "31b-mixed", "31b-svdquant", "e4b-awq-full", "e4b-mixed"),
            *("26b-mm-nvfp4", "26b-mm-w4a16", "26b-mm-mixed"),
        ),
    ),
    "llm-compressor": Exporter(
        "llmcompressor",
        "export_with_llmcompressor.py",
        ("31b-NVFP4", "31b-NVFP4A16", "e4b-mm-NVFP4A16", "26b-mm-NVFP4", "26b-mm-NVFP4A16"),
    ),
}
# Of the float64 truth: transformers in float32 is itself off by more for one of the models (E4B, AWQ_FULL: 2e-4).
TOLERANCE = 1e-4

_rows: list[tuple[str, ...]] = []
_made: dict[str, Path] = {}


def _python(name: str) -> Path:
    return Path(FOLDER) / name / "bin" / "python"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where exports go; afterwards the rows of what ran replace theirs in the page."""
    yield tmp_path_factory.mktemp("exports")
    page = os.environ.get("GEMMA4_EXPORTERS_PAGE")
    if page and _rows:
        _write(Path(page))


def _exports(name: str, out: Path) -> Path:
    """All models of one exporter, written when the first of them is asked for."""
    if name not in _made:
        exporter = EXPORTERS[name]
        script = ROOT / "tests/checkpoints" / exporter.script
        subprocess.run([_python(name), script, out / name, *exporter.names], check=True, cwd=ROOT)
        _made[name] = out / name
    return _made[name]


def _write(page: Path) -> None:
    head, _, rest = page.read_text().partition(BEGIN)
    old, _, tail = rest.partition(END)
    kept = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in old.splitlines() if "|" in line]
    found = {(row[0], row[2]): row for row in (*kept, *_rows)}
    order = [(exporter, name) for exporter, each in EXPORTERS.items() for name in each.names]
    rows = [found[key] for key in order if key in found]
    table = [
        "| environment | exporter | model and recipe | plugin | transformers in float32 |",
        "|---|---|---|---|---|",
    ]
    table += [f"| {' | '.join(row)} |" for row in rows]
    page.write_text("\n".join([head + BEGIN, "", *table, "", END]) + tail)


def _release(name: str) -> str:
    package = EXPORTERS[name].package
    code = f"from importlib.metadata import version; print(version({package!r}))"
    found = subprocess.run([_python(name), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return f"{package} {found}"


def off_float64(folder: Path, ours: torch.Tensor) -> tuple[float, float]:
    """By how much the engine's log-probabilities, and transformers' in float32, miss those in float64 at most."""
    truth = reference.logprobs(folder, TOKENS, double=True)
    off, theirs = (float((each - truth).abs().max()) for each in (ours, reference.logprobs(folder, TOKENS)))
    return off, theirs


@pytest.mark.parametrize(("exporter", "name"), [(e, n) for e, x in EXPORTERS.items() for n in x.names])
def test_logprobs_equal_the_reference(exporter: str, name: str, out: Path) -> None:
    folder = _exports(exporter, out) / name
    layers: dict[str, float] = {}
    ours = engine_logprobs(folder, layers, **text_only(folder))
    off, theirs = off_float64(folder, ours)
    _rows.append((exporter, _release(exporter), name, f"{off:.0e}", f"{theirs:.0e}"))
    assert off < TOLERANCE
    assert name.endswith("bf16") or layers
    assert max(layers.values(), default=0.0) < 1e-5


def test_a_loss_is_seen(out: Path) -> None:
    """The difference between two recipes of one model is far above the tolerance."""
    one, other = (_exports("modelopt-newest", out) / name for name in ("31b-nvfp4", "31b-mixed"))
    gap = (reference.logprobs(one, TOKENS) - reference.logprobs(other, TOKENS)).abs().max()
    assert torch.isfinite(gap)
    assert gap > 100 * TOLERANCE


def _fits(parent: Path, recipe: str, towers: bool) -> str:
    """A card on which that recipe is just the first that fits."""
    wanted = sizing.predict(Checkpoint(parent), recipe, towers) + 64
    return f"{wanted / (sizing.UTILIZATION - 1 / 8) / 2**20:.6f}MiB"


QUANTIZED: dict[str, tuple[str, Callable[[Path], list[str]], str, str]] = {
    "weights alone": ("e4b", lambda p: ["--recipe", "w4a16"], "W4A16_NVFP4", "Gemma4ForCausalLM"),
    "a card with room": (
        "31b-mm",
        lambda p: ["--fit", _fits(p, "mixed", towers=True)],
        "MIXED_PRECISION",
        "Gemma4ForConditionalGeneration",
    ),
    "a card without": (
        "31b-mm",
        lambda p: ["--fit", _fits(p, "awq-full", towers=False)],
        "NVFP4_AWQ",
        "Gemma4ForCausalLM",
    ),
    "a larger model, a card without": (
        "31b-mm-larger",
        lambda p: ["--fit", _fits(p, "awq-full", towers=False)],
        "NVFP4_AWQ",
        "Gemma4ForCausalLM",
    ),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantize_with_the_newest_modelopt(case: str, tmp_path: Path) -> None:
    model, options, algorithm, family = QUANTIZED[case]
    kind, *more = model.split("-")
    parent, made = tmp_path / "parent", tmp_path / "made"
    tiny.build(kind, "mm" in more, larger="larger" in more).save_pretrained(parent)
    (tmp_path / "ids.jsonl").write_text("".join(f"{json.dumps(row.tolist())}\n" for row in tiny.calibration()))
    asked = [
        *options(parent),
        "--calibration",
        tmp_path / "ids.jsonl",
        "--python",
        _python("modelopt-newest"),
        "--json",
    ]
    code = "from vllm_gemma4_spec.cli import main; main()"
    command = [sys.executable, "-c", code, "quantize", parent, made, *asked]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-800:]
    assert json.loads(done.stdout)["algorithm"] == algorithm
    assert json.loads((made / "config.json").read_text())["architectures"] == [family]
    tensors = Checkpoint(made).tensors
    assert any("vision_tower" in name for name in tensors) == (family != "Gemma4ForCausalLM")
    assert all(f"{name}_scale" in tensors for name in tensors if name.endswith("self_attn.o_proj.weight"))
    if "larger" in more:
        wanted = sizing.predict(Checkpoint(parent), "awq-full", towers=False)
        assert sum(info.bytes for info in tensors.values()) == pytest.approx(wanted, rel=0.01)
    off, theirs = off_float64(made, engine_logprobs(made, **text_only(made)))
    assert off < max(TOLERANCE, 2 * theirs)  # a larger model's float32 is 1.2e-4 off by itself
