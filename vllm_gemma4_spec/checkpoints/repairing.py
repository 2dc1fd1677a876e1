"""Writes a copy of a checkpoint whose NaN block scales are repaired, with the bf16 parent if there is one.

Shapes and dtypes stay, so a shard is copied and the bytes of the repaired blocks are written over: memory
holds one tensor at a time, and everything else stays as it was, byte for byte.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import read_tensor, scan
from vllm_gemma4_spec.checkpoints.layers import Quantized
from vllm_gemma4_spec.checkpoints.tensor_info import TensorInfo
from vllm_gemma4_spec.errors import CheckpointError

# Relative error of 4-bit weights against their parent is about 0.1; of unrelated weights, above 1.
_MISMATCH = 0.6

# Where ModelOpt folds the pre_quant_scale of projections that share an input
_NORMS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "pre_feedforward_layernorm",
    "mlp.up_proj": "pre_feedforward_layernorm",
}


class Change(BaseModel):
    """What was done to one linear, in blocks of sixteen weights."""

    module: str
    file: str
    saturated: int
    zeroed: int
    restored: int


class Repair(BaseModel):
    """The whole of ``repair``."""

    path: str
    out: str
    parent: str | None
    changes: list[Change]
    rewritten: list[str]


class Parent:
    """The unquantized checkpoint that a quantized one was made from."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self.folder = checkpoint.folder

    def _find(self, name: str) -> TensorInfo | None:
        for old, new in (("", ""), ("model.language_model.", "model."), ("model.", "model.language_model.")):
            if name.startswith(old) and new + name[len(old) :] in self._tensors:
                return self._tensors[new + name[len(old) :]]
        return None

    def rows(self, module: Quantized, rows: Tensor) -> Tensor:
        """``rows`` int64 [R] of the parent's weight [N, K] of a linear or of an expert in a stacked tensor: [R, K].

        Raises:
            CheckpointError: the parent has none, or one of another shape.
        """
        shape = module.parts["weight"].shape
        info, wanted = self._find(f"{module.module}.weight"), (shape[0], shape[1] * 2)
        expert: tuple[int, ...] = ()
        offset = 0
        root, _, rest = module.module.partition(".experts.")
        if info is None and rest:
            number, _, projection = rest.partition(".")
            down = projection == "down_proj"
            info = self._find(f"{root}.experts.{'down_proj' if down else 'gate_up_proj'}")
            wanted = (wanted[0] if down else 2 * wanted[0], wanted[1])
            expert, offset = (int(number),), shape[0] if projection == "up_proj" else 0
        if info is None:
            raise CheckpointError(f"{self.folder}: does not match, it has no {module.module}.weight")
        found = info.shape[1:] if expert else info.shape
        if found != wanted or info.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(
                f"{info}: {info.dtype} {list(info.shape)}, expected unquantized {list(wanted)}; "
                f"{self.folder} is not the parent"
            )
        with safe_open(info.file, "pt") as opened:
            tensor = opened.get_slice(info.name)
            picked = [tensor[(*expert, slice(row + offset, row + offset + 1))] for row in rows.tolist()]
        return torch.cat(picked)

    def norm(self, name: str) -> Tensor | None:
        info = self._find(name)
        return read_tensor(info) if info is not None else None


def _scaled_parent(module: Quantized, rows: Tensor, child: Checkpoint, parent: Parent) -> Tensor:
    """The rows [R, K] that the exporter quantized: the parent's over pre_quant_scale, less the low-rank part.

    A scale that was folded into a norm is read off the two norms. Rounded to the parent's dtype, as
    ModelOpt does.
    """
    weight = parent.rows(module, rows)
    scale = module.parts.get("pre_quant_scale")
    factor = read_tensor(scale).float() if scale is not None else None
    layer = module.module.rpartition(".self_attn." if ".self_attn." in module.module else ".mlp.")[0]
    kind = module.module[len(layer) + 1 :]
    if factor is None and kind in _NORMS:
        name = f"{layer}.{_NORMS[kind]}.weight"
        theirs = parent.norm(name)
        if theirs is not None and name in child.tensors:
            factor = read_tensor(child.tensors[name]).float() / theirs.float()
    if factor is not None:
        weight = (weight * (1.0 / factor)).to(weight.dtype)
    if "svdquant_lora_a" in module.parts:
        a, b = (read_tensor(module.parts[f"svdquant_lora_{x}"]) for x in "ab")
        weight = weight - (b[rows] @ a).to(weight.dtype)
    return weight


def _repair(
    module: Quantized, found: nvfp4.NanBlocks, child: Checkpoint, parent: Parent | None
) -> tuple[Change, Tensor, Tensor]:
    """The linear's new ``weight`` and ``weight_scale``."""
    packed, scale = (read_tensor(module.parts[x]) for x in ("weight", "weight_scale"))
    scale_2 = read_tensor(module.parts["weight_scale_2"]).reshape(())
    nvfp4.repair_(scale, found)
    lost = found.index[found.destroyed]
    restored = 0
    if parent is not None and len(lost) and bool(scale_2 > 0):
        touched = found.index[:, 0].unique()
        wanted = _scaled_parent(module, touched, child, parent)
        _check_parent(module, packed, scale, scale_2, wanted, found, parent)
        rows, blocks = lost.T
        full = torch.full((len(lost), 1), nvfp4.SCALE_MAX).to(torch.float8_e4m3fn)
        place = torch.searchsorted(touched, rows.contiguous())
        codes = nvfp4.encode(wanted.unflatten(-1, (-1, nvfp4.BLOCK))[place, blocks], full, scale_2)
        packed.unflatten(-1, (-1, nvfp4.BLOCK // 2))[rows, blocks] = codes
        scale[rows, blocks] = full[:, 0]
        restored = len(lost)
    change = Change(
        module=module.module,
        file=module.parts["weight_scale"].file.name,
        saturated=found.count - found.lost,
        zeroed=found.lost - restored,
        restored=restored,
    )
    return change, packed, scale


def _check_parent(
    module: Quantized,
    packed: Tensor,
    scale: Tensor,
    scale_2: Tensor,
    wanted: Tensor,
    found: nvfp4.NanBlocks,
    parent: Parent,
) -> None:
    """The blocks that are whole must look like the parent's."""
    rows = found.index[:, 0].unique()
    ours = nvfp4.dequantize(packed[rows], scale[rows], scale_2)
    known = torch.ones(scale.shape, dtype=torch.bool)
    known[tuple(found.index.T)] = False
    mask = known[rows].repeat_interleave(nvfp4.BLOCK, dim=-1)
    error = (ours - wanted.float())[mask].norm() / wanted.float()[mask].norm().clamp(min=1e-30)
    if mask.any() and not error < _MISMATCH:
        raise CheckpointError(
            f"{parent.folder}: not the parent, its {module.module} differs by {float(error):.0%} in whole blocks"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when all went well, and is removed when not.

    Raises:
        CheckpointError: ``out`` exists, or the disk is full or read-only.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name a folder that does not")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in [*partial.iterdir(), partial]:  # on disk before the name says so
            if file.is_file() or file == partial:
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        partial.rename(out)
    except OSError as error:
        why = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise CheckpointError(f"{out}: cannot be written ({why}); nothing was left there") from None
    except SafetensorError as error:
        raise CheckpointError(f"{out}: cannot be written ({error}); nothing was left there") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_space(checkpoint: Checkpoint, out: Path) -> None:
    folder = next(p for p in (out, *out.resolve().parents) if p.exists())
    needed = sum(f.stat().st_size for f in checkpoint.folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{out}: no space left, {needed / 1e9:.1f} GB needed and {free / 1e9:.1f} GB free")


def _copy(checkpoint: Checkpoint, target: Path, step: Callable[[Path], None]) -> None:
    """Every file, the shards with a ``step`` each. Not ``copytree``: it goes on after a disk is full."""
    for file in sorted(checkpoint.folder.rglob("*")):
        place = target / file.relative_to(checkpoint.folder)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif file.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
        if file in checkpoint.files:
            step(file)


def repair(
    checkpoint: Checkpoint,
    out: Path,
    parent: Checkpoint | None = None,
    step: Callable[[Path], None] = lambda file: None,
) -> Repair:
    """Write ``out``, a copy of ``checkpoint`` without NaN block scales; the input is only read.

    Blocks whose codes are intact get scale 448 with the NaN's sign; destroyed ones are requantized from
    ``parent`` at scale 448, or zeroed without one. A checkpoint without NaN is copied as it is. ``step`` is
    called twice for each shard: when it is copied and when it is repaired.

    Raises:
        CheckpointError: bad input, a parent that does not match, ``out`` exists, no space. Nothing is left then.
    """
    if out.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise CheckpointError(f"{out}: lies inside the checkpoint; name a folder elsewhere")
    changes: list[Change] = []
    rewritten: set[str] = set()
    source = Parent(parent) if parent is not None else None
    _require_space(checkpoint, out)
    with new_folder(out) as partial:
        _copy(checkpoint, partial, step)
        for module, found in scan(checkpoint, step):
            change, packed, scale = _repair(module, found, checkpoint, source)
            changes.append(change)
            for suffix, tensor in (("weight", packed), ("weight_scale", scale)):
                if suffix == "weight" and not change.restored:
                    continue
                info = module.parts[suffix]
                rewritten.add(info.file.name)
                with (partial / info.file.relative_to(checkpoint.folder)).open("r+b") as stream:
                    stream.seek(info.start)
                    stream.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return Repair(
        path=str(checkpoint.folder),
        out=str(out),
        parent=str(parent.folder) if parent is not None else None,
        changes=changes,
        rewritten=sorted(rewritten),
    )
