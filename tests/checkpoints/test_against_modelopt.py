"""ModelOpt 0.42.0 itself, run by an interpreter of its own: exports, decoding, repair and the quantize tool.

Set ``GEMMA4_MODELOPT_PYTHON`` to a Python that has nvidia-modelopt 0.42.0, transformers 5.5.4 and torch 2.10.0, all
three: ``.exporters/modelopt-pinned/bin/python``, which ``make test-exporters`` makes; it runs this file, too. Later
releases of torch (2.13.0) saturate casts to float8_e4m3fn, so the NaN scales that ``repair`` is for are not written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import reference
from tests.checkpoints.export_with_modelopt import CLIPPING, FIXTURES, PINNED, WIDE, names
from vllm_gemma4_spec.checkpoints.files import Checkpoint, read_header
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.checkpoints.repairing import repair

PYTHON = os.environ.get("GEMMA4_MODELOPT_PYTHON", "")
ROOT = Path(__file__).parents[2]
RELEASES = {"nvidia-modelopt": "0.42.0", "torch": "2.10.0", "transformers": "5.5.4"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="GEMMA4_MODELOPT_PYTHON names no interpreter with " + ", ".join(map(" ".join, RELEASES.items())),
    ),
]

CLIPPED = [n for n in names() if n.endswith(CLIPPING)]


def _parent(name: str) -> str:
    recipe = next(recipe for recipe in PINNED if name.endswith(f"-{recipe}"))
    return name.removesuffix(recipe) + "bf16"


def _export(out: Path, *wanted: str) -> None:
    script = str(ROOT / "tests/checkpoints/export_with_modelopt.py")
    subprocess.run([PYTHON, script, str(out), *wanted], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some fifty checkpoints: three models, text and multimodal, five recipes, clamped and not, and parents."""
    code = f"from importlib.metadata import version; print(*map(version, {[*RELEASES]!r}))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    there = [each.partition("+")[0] for each in found.stdout.split()]
    if there != [*RELEASES.values()]:
        has = " ".join(there) or found.stderr.strip().rpartition("\n")[2]
        wanted = " ".join(f"{name}=={release}" for name, release in RELEASES.items())
        pytest.fail(f"GEMMA4_MODELOPT_PYTHON={PYTHON}: needs {wanted}; has {has}", pytrace=False)
    out = tmp_path_factory.mktemp("exports")
    _export(out, *names(), *WIDE, *sorted({_parent(name) for name in WIDE}))
    return out


def _matrices(folder: Path) -> dict[str, torch.Tensor]:
    """The reference's, each times the norm in front of it, into which AWQ folds a scale."""
    state = reference.fold(folder)
    norms = {"self_attn": "input_layernorm", "mlp": "pre_feedforward_layernorm"}
    out = {}
    for name, weight in state.items():
        layer, part, projection = (*name.removesuffix(".weight").rsplit(".", 2), "", "")[:3]
        norm = state.get(f"{layer}.{norms.get(part)}.weight") if projection not in ("o_proj", "down_proj") else None
        if weight.dim() > 1:
            out[name] = weight if norm is None else weight * norm
    return out


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in read_header(file).items()}


@pytest.mark.parametrize("name", [*FIXTURES, *WIDE])
def test_the_committed_fixtures_are_modelopts(name: str, exports: Path) -> None:
    """Byte for byte, or with other vector instructions than those that wrote them: last bits of sums differ then, and
    AWQ's search may choose another scale. The weights must be as close to the parent's as the committed ones.
    """
    committed = Path(__file__).parent / ("wide" if name in WIDE else "fixtures") / name
    for file in ("config.json", "hf_quant_config.json"):
        assert (committed / file).read_bytes() == (exports / name / file).read_bytes()
    file = "model.safetensors"
    if (committed / file).read_bytes() == (exports / name / file).read_bytes():
        return
    assert not name.endswith(("-nvfp4", "-awq-clip")), "these two recipes gave the same bytes on every CPU so far"
    assert _header(committed / file) == _header(exports / name / file)
    ours, theirs, parent = map(_matrices, (committed, exports / name, exports / _parent(name)))
    assert ours.keys() == theirs.keys() == parent.keys()
    for key, weight in parent.items():
        errors = [float((each[key] - weight).norm() / weight.norm()) for each in (ours, theirs)]
        assert max(errors) < 0.2, key
        assert max(errors) <= 1.5 * min(errors), key
        sizes = [float((each[key] * weight).sum() / (weight * weight).sum()) for each in (ours, theirs)]
        assert abs(sizes[0] - sizes[1]) < 0.02, key


def test_an_export_is_deterministic(exports: Path, tmp_path: Path) -> None:
    """With one torch on one machine."""
    again = ("31b-awq-full", "31b-svdquant", "e4b-awq-lite")
    _export(tmp_path, *again)
    for name in again:
        first, second = (folder / name / "model.safetensors" for folder in (exports, tmp_path))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", CLIPPED)
def test_repair_equals_an_exporter_with_the_clamp(name: str, exports: Path, tmp_path: Path) -> None:
    """Byte for byte, but for codes on an edge of rounding: pre_quant_scale is exported in bf16, used in float32."""
    model = name.removesuffix("-awq-clip").removesuffix("-awq-full")
    done = repair(Checkpoint(exports / name), tmp_path / "out", Checkpoint(exports / f"{model}-bf16"))
    assert done.changes
    ours, fixed = (load_file(f / "model.safetensors") for f in (tmp_path / "out", exports / f"{name}-clamped"))
    assert ours.keys() == fixed.keys()
    differing = sum(int((ours[n].view(torch.uint8) != fixed[n].view(torch.uint8)).sum()) for n in ours if ours[n].dim())
    assert differing <= (1 if name.endswith("awq-full") else 0)
    assert all(torch.equal(ours[n], fixed[n]) for n in ours if not n.endswith("weight"))


DECODE = """
import pathlib, sys, torch
from safetensors.torch import load_file, save_file
from modelopt.torch.quantization.qtensor import NVFP4QTensor
for folder in pathlib.Path(sys.argv[1]).iterdir():
    t, out = load_file(folder / "model.safetensors"), {}
    for n, w in t.items():
        if w.dtype == torch.uint8:
            q, b = NVFP4QTensor((w.shape[0], w.shape[1] * 2), torch.float32, w), n.removesuffix("weight")
            scales = {"scale": t[b + "weight_scale"], "double_scale": t[b + "weight_scale_2"]}
            out[n] = q.dequantize(torch.float32, block_sizes={-1: 16}, **scales).contiguous()
    save_file(out, pathlib.Path(sys.argv[2]) / (folder.name + ".safetensors"))
"""


@pytest.fixture(scope="module")
def decoded(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``NVFP4QTensor.dequantize`` of every export, run where ModelOpt is."""
    out = tmp_path_factory.mktemp("decoded")
    subprocess.run([PYTHON, "-c", DECODE, str(exports), str(out)], check=True)
    return out


@pytest.mark.parametrize("name", [n for n in names() if not n.endswith("bf16")])
def test_decoding_equals_modelopts(name: str, exports: Path, decoded: Path) -> None:
    """The reference decoder, bit for bit; where ModelOpt has NaN the reference applies the repair rule."""
    tensors = reference.read(exports / name)
    theirs = load_file(decoded / f"{name}.safetensors")
    assert theirs
    for key, weight in theirs.items():
        base = key.removesuffix("weight")
        ours = reference.decode(tensors[key][1], tensors[base + "weight_scale"][1], tensors[base + "weight_scale_2"][1])
        known = ~weight.isnan()
        assert torch.equal(torch.from_numpy(ours)[known], weight[known])


@pytest.mark.parametrize(
    ("model", "recipe"), [*(("e4b", recipe) for recipe in PINNED), ("31b", "svdquant"), ("26b-mm", "awq-full")]
)
def test_quantize_writes_a_clean_checkpoint(model: str, recipe: str, exports: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("".join(f"{json.dumps(list(range(5 + i, 29 + i)))}\n" for i in range(4)))
    code = "from vllm_gemma4_spec.cli import main; main()"
    options = ["--recipe", recipe, "--calibration", str(tmp_path / "ids.jsonl"), "--python", PYTHON, "--json"]
    command = [sys.executable, "-c", code, "quantize", str(exports / f"{model}-bf16"), str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    report = json.loads(done.stdout)
    assert report["clean"]
    others = {"nvfp4": "NVFP4", "awq-clip": "NVFP4", "svdquant": "NVFP4_SVD", "mixed": "MIXED_PRECISION"}
    assert report["algorithm"] == others.get(recipe, "NVFP4_AWQ")
    assert inspect(Checkpoint(tmp_path / "out")).clean
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.jsonl", "out"]
