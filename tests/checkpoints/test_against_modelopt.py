"""ModelOpt 0.42.0 itself, run by an interpreter of its own: exports, decoding, repair and the quantize tool.

Set ``GEMMA4_MODELOPT_PYTHON`` to a Python that has nvidia-modelopt==0.42.0, torch and transformers 5.5.4.
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
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.checkpoints.repairing import repair

PYTHON = os.environ.get("GEMMA4_MODELOPT_PYTHON", "")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="GEMMA4_MODELOPT_PYTHON names no interpreter with ModelOpt 0.42.0"),
]

CLIPPED = [n for n in names() if n.endswith(CLIPPING)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some fifty checkpoints: three models, text and multimodal, five recipes, clamped and not, and parents."""
    out = tmp_path_factory.mktemp("exports")
    script = str(ROOT / "tests/checkpoints/export_with_modelopt.py")
    subprocess.run([PYTHON, script, str(out), *names(), *WIDE], check=True, cwd=ROOT)
    return out


@pytest.mark.parametrize("name", [*FIXTURES, *WIDE])
def test_the_committed_fixtures_are_modelopts(name: str, exports: Path) -> None:
    for file in ("model.safetensors", "config.json", "hf_quant_config.json"):
        committed = Path(__file__).parent / ("wide" if name in WIDE else "fixtures") / name / file
        assert committed.read_bytes() == (exports / name / file).read_bytes()


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
