"""inspect, repair and quantize: on ModelOpt's exports, on damaged copies of them, and interrupted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import reference
from vllm_gemma4_spec.checkpoints import nvfp4, repairing
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.errors import CheckpointError

FIXTURES = Path(__file__).parent / "fixtures"
# What ModelOpt 0.42.0 wrote: (algorithm, NaN blocks, layers with any)
FOUND = {
    "31b-nvfp4": ("NVFP4", 0, 0),
    "31b-awq-full": ("NVFP4_AWQ", 9, 5),
    "31b-svdquant": ("NVFP4_SVD", 0, 0),
    "e4b-awq-lite": ("NVFP4_AWQ", 0, 0),
    "e4b-awq-clip": ("NVFP4", 70, 20),
    "26b-mm-awq-lite": ("NVFP4_AWQ", 0, 0),
}


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """The command line: exit code, stdout, stderr."""
    from vllm_gemma4_spec import cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["vllm-gemma4-spec", *map(str, arguments)]),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def parent(name: str, folder: Path) -> Path:
    """The bf16 model that the fixture was quantized from, rebuilt from its seed."""
    from tests.checkpoints import tiny

    kind, _, rest = name.partition("-")
    tiny.build(kind, rest.startswith("mm")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FOUND)
def test_decoding_equals_the_reference(name: str) -> None:
    for module in Checkpoint(FIXTURES / name).quantized.values():
        tensors = reference.read(FIXTURES / name)
        raw = [tensors[f"{module.module}.{part}"][1] for part in ("weight", "weight_scale", "weight_scale_2")]
        packed, scale = torch.from_numpy(raw[0].copy()), torch.from_numpy(raw[1].copy()).view(torch.float8_e4m3fn)
        if nvfp4.has_nan(scale):
            nvfp4.repair_(scale, nvfp4.find_nan(packed, scale))
        ours = nvfp4.dequantize(packed, scale, torch.tensor(raw[2].item()))
        assert torch.equal(ours, torch.from_numpy(reference.decode(*raw)))
        exact = nvfp4.decode(packed, scale, torch.bfloat16).float()
        assert torch.equal(exact, nvfp4.decode(packed, scale))  # six significant bits: nothing is rounded


@pytest.mark.parametrize("name", FOUND)
def test_inspect(name: str) -> None:
    report = inspect(Checkpoint(FIXTURES / name))
    assert (report.algorithm, report.nan_blocks, len(report.nan)) == FOUND[name]
    assert report.clean == (FOUND[name][1] == 0)
    assert all(layer.destroyed == layer.blocks for layer in report.nan)  # ModelOpt destroys the codes too
    assert report.producer == "modelopt 0.42.0"


def test_inspect_by_kind() -> None:
    kinds = {k.kind: k for k in inspect(Checkpoint(FIXTURES / "e4b-awq-lite")).kinds}
    assert kinds["self_attn.q_proj"].layers == 4
    assert kinds["self_attn.q_proj"].pre_quant_scale == 2  # the two layers that reuse KV
    assert kinds["mlp.down_proj"].pre_quant_scale == 4
    assert kinds["mlp.gate_proj"].pre_quant_scale == 0
    kinds = {k.kind: k for k in inspect(Checkpoint(FIXTURES / "26b-mm-awq-lite")).kinds}
    assert kinds["experts.gate_up_proj"].formats == {"BF16": 2}
    assert kinds["router.proj"].formats == {"BF16": 2}


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("31b-awq-full", "refuses it: quant_algo NVFP4_AWQ is unknown"),
        ("31b-svdquant", "refuses it: quant_algo NVFP4_SVD is unknown"),
        ("e4b-awq-clip", "loads it and answers from NaN weights"),
        ("31b-nvfp4", "loads it; refuses it on a CPU"),
    ],
)
def test_what_vllm_alone_does(name: str, alone: str) -> None:
    assert inspect(Checkpoint(FIXTURES / name)).vllm_alone == alone


def test_inspect_command() -> None:
    code, out, err = run("inspect", FIXTURES / "31b-awq-full", "--json")
    report = json.loads(out)
    assert (code, err) == (1, "")
    assert (report["nan_blocks"], report["clean"]) == (9, False)
    code, out, _ = run("inspect", FIXTURES / "31b-nvfp4")
    assert code == 0
    assert "self_attn.o_proj" in out


def test_repair_without_the_parent_zeroes(tmp_path: Path) -> None:
    before = snapshot(FIXTURES / "e4b-awq-clip")
    done = repairing.repair(Checkpoint(FIXTURES / "e4b-awq-clip"), tmp_path / "out")
    assert sum(c.zeroed for c in done.changes) == 70
    assert inspect(Checkpoint(tmp_path / "out")).clean
    assert snapshot(FIXTURES / "e4b-awq-clip") == before
    old, new = (load_file(f / "model.safetensors") for f in (FIXTURES / "e4b-awq-clip", tmp_path / "out"))
    for name, tensor in old.items():
        if name.endswith("weight_scale"):
            nan = tensor.float().isnan()
            assert (new[name].float()[nan] == 0).all()
            assert torch.equal(new[name].float()[~nan], tensor.float()[~nan])
        else:
            assert torch.equal(new[name], tensor)


def test_repair_saturates_where_the_codes_are_whole(tmp_path: Path) -> None:
    source = damaged(tmp_path, lambda tensors: nan_at(tensors, "model.layers.0.mlp.down_proj.weight_scale", 3, 1, 0xFF))
    done = repairing.repair(Checkpoint(source), tmp_path / "out")
    assert [(c.saturated, c.zeroed, c.restored) for c in done.changes] == [(1, 0, 0)]
    scale = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.weight_scale"]
    assert scale[3, 1].float() == -448


@pytest.mark.parametrize("name", ["31b-awq-full", "e4b-awq-clip"])
def test_repair_with_the_parent_brings_the_weights_back(name: str, tmp_path: Path) -> None:
    """Every restored block is the closest that a scale of 448 allows; exact bytes: test_against_modelopt.py."""
    source = Checkpoint(FIXTURES / name)
    done = repairing.repair(source, tmp_path / "out", Checkpoint(parent(name, tmp_path / "parent")))
    assert sum(c.restored for c in done.changes) == FOUND[name][1]
    out = Checkpoint(tmp_path / "out")
    blind = Checkpoint(repairing.repair(source, tmp_path / "blind").out)
    right = reference.model(tmp_path / "parent").eval()
    tokens = [5, 9, 20, 31, 44, 17, 8, 60, 3, 71, 12, 33]
    with torch.inference_mode():
        wanted = torch.log_softmax(right(input_ids=torch.tensor([tokens])).logits[0, :-1], -1)
    restored, zeroed = ((reference.logprobs(c.folder, tokens) - wanted).norm() for c in (out, blind))
    assert restored < zeroed


def test_repair_is_idempotent(tmp_path: Path) -> None:
    repairing.repair(Checkpoint(FIXTURES / "31b-awq-full"), tmp_path / "once")
    done = repairing.repair(Checkpoint(tmp_path / "once"), tmp_path / "twice")
    assert done.changes == []
    assert snapshot(tmp_path / "once") == snapshot(tmp_path / "twice")


def test_only_affected_shards_are_rewritten(tmp_path: Path) -> None:
    source = shutil.copytree(FIXTURES / "31b-awq-full", tmp_path / "two")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    broken = {n for n, t in tensors.items() if n.endswith("weight_scale") and t.float().isnan().any()}
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        shards["b.safetensors" if name in broken else "a.safetensors"][name] = tensor
    for file, part in shards.items():
        save_file(part, source / file)
    weights = {name: file for file, part in shards.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    done = repairing.repair(Checkpoint(source), tmp_path / "out")
    assert done.rewritten == ["b.safetensors"]
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == (source / "a.safetensors").read_bytes()


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_it_leaves_nothing(stop: int, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(FIXTURES / "31b-awq-full")
    repair, calls = repairing._repair, iter(range(1, 99))

    def failing(*arguments: Any) -> Any:
        if next(calls) == stop:
            raise error
        return repair(*arguments)

    monkeypatch.setattr(repairing, "_repair", failing)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        repairing.repair(Checkpoint(FIXTURES / "31b-awq-full"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert snapshot(FIXTURES / "31b-awq-full") == before


def test_killed_it_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vllm_gemma4_spec.checkpoints import repairing\n"
        "from vllm_gemma4_spec.checkpoints.files import Checkpoint\n"
        "repairing.scan = lambda *a: os._exit(9)\n"
        "repairing.repair(Checkpoint(sys.argv[1]), Path(sys.argv[2]))"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(FIXTURES / "31b-awq-full"), str(out)], check=False)
    assert done.returncode == 9
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    repairing.repair(Checkpoint(FIXTURES / "31b-awq-full"), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


PEAK = """
import sys
from pathlib import Path
from vllm_gemma4_spec.checkpoints import inspection, repairing
from vllm_gemma4_spec.checkpoints.files import Checkpoint
checkpoint = Checkpoint(sys.argv[1])
if sys.argv[2] == "inspect":
    inspection.inspect(checkpoint)
else:
    repairing.repair(checkpoint, Path(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
@pytest.mark.parametrize("tool", ["inspect", "repair"])
def test_memory_is_bounded_by_the_largest_tensor(tool: str, tmp_path: Path) -> None:
    """Twelve times the layers, the same peak: within one tensor of 8 MiB."""

    def peak(layers: int) -> int:
        folder = tmp_path / f"{layers}"
        folder.mkdir()
        config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {}
        for layer in range(layers):
            scale = torch.full((2048, 512), 0x38, dtype=torch.uint8)
            scale[5, 7] = 0x7F
            parts = {
                "weight": torch.zeros(2048, 4096, dtype=torch.uint8),
                "weight_scale": scale.view(torch.float8_e4m3fn),
            }
            parts |= {"weight_scale_2": torch.tensor(1.0), "input_scale": torch.tensor(1.0)}
            tensors |= {f"model.layers.{layer}.mlp.down_proj.{name}": value for name, value in parts.items()}
        save_file(tensors, folder / "model.safetensors")
        what = tool if tool == "inspect" else str(tmp_path / f"out{layers}")
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder), what], capture_output=True, text=True, check=True
        )
        return int(done.stdout) * 1024

    few, many = peak(2), peak(24)
    assert many - few < 8 << 20, f"{few >> 20} MiB with 2 layers, {many >> 20} MiB with 24"


def other_format(tmp_path: Path, method: str, parts: dict[str, torch.Tensor]) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    config = {"architectures": ["Gemma4ForCausalLM"], "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"model.layers.0.mlp.down_proj.{k}": v for k, v in parts.items()}, folder / "model.safetensors")
    return folder


def test_other_formats_are_named_and_left_alone(tmp_path: Path) -> None:
    fp8 = torch.zeros(8, 32).to(torch.float8_e4m3fn)
    one = torch.tensor(1.0)
    report = inspect(
        Checkpoint(other_format(tmp_path, "modelopt", {"weight": fp8, "weight_scale": one, "input_scale": one.clone()}))
    )
    assert (report.clean, report.kinds[0].formats) == (True, {"F8_E4M3": 1})
    shutil.rmtree(tmp_path / "other")
    packed = {"weight_packed": torch.zeros(8, 16, dtype=torch.uint8), "weight_scale": fp8[:, :2].contiguous()}
    report = inspect(Checkpoint(other_format(tmp_path, "compressed-tensors", packed)))
    assert (report.clean, report.kinds[0].formats) == (True, {"NVFP4 (compressed-tensors)": 1})
    assert (report.vllm_alone, report.with_overlay) == ("loads it; refuses it on a CPU", "loads it on any backend")


# ---- bad input ----


def damaged(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], name: str = "31b-nvfp4") -> Path:
    folder = shutil.copytree(FIXTURES / name, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def nan_at(tensors: dict[str, torch.Tensor], name: str, row: int, block: int, byte: int) -> None:
    tensors[name].view(torch.uint8)[row, block] = byte


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value(tensors[name]).contiguous()})


O_PROJ, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"
BAD: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing block scales": ("31b-nvfp4", lambda t: t.pop(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale: missing"),
    "missing global scale": ("31b-nvfp4", lambda t: t.pop(f"{DOWN}.weight_scale_2"), f"{DOWN}.weight_scale_2: missing"),
    "missing input scale": ("31b-nvfp4", lambda t: t.pop(f"{DOWN}.input_scale"), f"{DOWN}.input_scale: missing"),
    "missing weight": ("31b-nvfp4", lambda t: t.pop(f"{DOWN}.weight"), f"{DOWN}.weight: missing"),
    "block scales of 32": ("31b-nvfp4", put(f"{DOWN}.weight_scale", lambda s: s[:, ::2]), f"{DOWN}.weight_scale"),
    "block scales in bf16": ("31b-nvfp4", put(f"{DOWN}.weight_scale", torch.Tensor.bfloat16), f"{DOWN}.weight_scale"),
    "scale too long": (
        "31b-awq-full",
        put(f"{O_PROJ}.pre_quant_scale", lambda s: torch.cat((s, s))),
        f"{O_PROJ}.pre_quant_scale",
    ),
    "scale of integers": (
        "31b-awq-full",
        put(f"{O_PROJ}.pre_quant_scale", torch.Tensor.int),
        f"{O_PROJ}.pre_quant_scale",
    ),
    "factor cut": (
        "31b-svdquant",
        put(f"{O_PROJ}.weight_quantizer._svdquant_lora_a", lambda a: a[:, :-16]),
        f"{O_PROJ}.weight_quantizer._svdquant_lora_a",
    ),
    "factor alone": (
        "31b-svdquant",
        lambda t: t.pop(f"{O_PROJ}.weight_quantizer._svdquant_lora_b"),
        "partner is missing",
    ),
    "global scale NaN": (
        "31b-nvfp4",
        put(f"{DOWN}.weight_scale_2", lambda s: s * float("nan")),
        f"{DOWN}.weight_scale_2",
    ),
    "input scale infinite": ("31b-nvfp4", put(f"{DOWN}.input_scale", lambda s: s / 0), f"{DOWN}.input_scale"),
}


def test_two_configs_that_differ_are_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "31b-awq-full", tmp_path / "model")
    file = folder / "hf_quant_config.json"
    file.write_text(file.read_text().replace("NVFP4_AWQ", "NVFP4"))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: quant_algo NVFP4, .* NVFP4_AWQ; keep"):
        inspect(Checkpoint(folder))


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_one_line_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    name, edit, message = BAD[case]
    folder = damaged(tmp_path, edit, name)
    for act in (lambda: inspect(Checkpoint(folder)), lambda: repairing.repair(Checkpoint(folder), tmp_path / "out")):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def truncate(folder: Path, by: int) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - by if by > 0 else -by)


@pytest.mark.parametrize(("by", "message"), [(100, "ends"), (-200, "header"), (-4, "header")])
def test_a_truncated_shard_is_named(by: int, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "31b-nvfp4", tmp_path / "cut")
    truncate(folder, by)
    code, out, err = run("inspect", folder)
    assert (code, out) == (2, "")
    assert "model.safetensors" in err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_shard_that_the_index_promises_is_missing(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "31b-nvfp4", tmp_path / "m")
    names = {"a.weight": "gone.safetensors", "b.weight": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"gone.safetensors: cannot be read"):
        inspect(Checkpoint(folder))


def test_a_header_that_lies(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "31b-nvfp4", tmp_path / "m")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
    file.write_bytes(data[:8] + header.replace(b'"shape":[96,64]', b'"shape":[96,65]') + data[8 + len(header) :])
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight .*the file is damaged"):
        inspect(Checkpoint(folder))


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v[:, :-16].contiguous() if k.endswith("o_proj.weight") else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.flip(-1).contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def other_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k.replace("layers.", "blocks."): v for k, v in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [(other_shape, "is not the parent"), (other_weights, "not the parent, its model"), (other_names, "does not match")],
)
def test_a_parent_that_does_not_match(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    wrong = parent("31b-awq-full", tmp_path / "parent")
    change(wrong)
    code, _, err = run("repair", FIXTURES / "31b-awq-full", "--out", tmp_path / "out", "--parent", wrong)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(repairing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="no space left"):
        repairing.repair(Checkpoint(FIXTURES / "31b-awq-full"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """The file system says no in the middle of a shard; in a process of its own, since the limit is one-way."""
    before = snapshot(FIXTURES / "31b-awq-full")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from vllm_gemma4_spec.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "repair", str(FIXTURES / "31b-awq-full"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "out: cannot be written (File too large)" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert snapshot(FIXTURES / "31b-awq-full") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["repair", FIXTURES / "31b-awq-full", "--out", FIXTURES / "31b-nvfp4"], "exists already"),
        (["repair", FIXTURES / "31b-awq-full", "--out", FIXTURES / "31b-awq-full" / "out"], "lies inside"),
        (["quantize", FIXTURES, "out", "--recipe", "int3"], "--recipe int3: expected one of"),
        (["quantize", "nowhere", "out", "--recipe", "nvfp4"], "nowhere: no such folder"),
        (["quantize", FIXTURES / "31b-nvfp4", FIXTURES, "--recipe", "nvfp4"], "exists already"),
        (
            ["quantize", FIXTURES / "31b-nvfp4", "out", "--recipe", "nvfp4", "--python", "nowhere/python"],
            "--python nowhere/python: no such program",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str | Path], message: str, tmp_path: Path) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
