"""What is read from disk and from the environment: checkpoints, configs, settings, logs.

Every error is one of this package's errors, one line long; nothing outside a checkpoint's folder is opened.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.source import Source
from vllm_gemma4_spec.errors import CheckpointError, Gemma4SpecError, SettingError

NAMES = ["a.weight", "a.weight_scale", "a.weight_scale_2", "a.input_scale", "a.pre_quant_scale", "a.svdquant_lora_a"]
NAMES += ["a.weight_quantizer._svdquant_lora_b", "model.layers.0.self_attn.q_proj.weight", "b.weight_packed", "x", ""]
NAMES += ["model.layers.0.experts.gate_up_proj", "..", "__metadata__"]
DTYPES = ["U8", "F8_E4M3", "F32", "BF16", "F16", "I64", "BOOL", "F4", "X9", "", "u8", 8, None, ["U8"], {"F32": 1}]
CONFIG_KEYS = [
    "quantization",
    "quantization_config",
    "quant_algo",
    "quant_method",
    "group_size",
    "config_groups",
    "weights",
]
CONFIG_KEYS += ["group_0", "exclude_modules", "ignore", "kv_cache_quant_algo", "producer", "name", "version", "targets"]
CONFIG_KEYS += ["kv_cache_scheme", "architectures", "weight_map", "metadata", "num_bits", "type", "format", "dtype"]
SCALARS = [
    "NVFP4",
    "NVFP4_AWQ",
    "NVFP4_SVD",
    "nvfp4",
    "FP8",
    "modelopt",
    "modelopt_fp4",
    "lm_head",
    "*",
    "model.*",
    "[",
    16,
    "16",
]
SCALARS += [8, 0.5, True, None, "a.safetensors", "sub/a.safetensors", "../outside.safetensors", "/etc/hostname", "a\nb"]
MODEL_KEYS = ["model_type", "text_config", "hidden_size", "num_hidden_layers", "layer_types", "head_dim", "vocab_size"]
MODEL_KEYS += ["num_attention_heads", "num_key_value_heads", "sliding_window", "rope_parameters", "enable_moe_block"]
MODEL_SCALARS = ["gemma4", "gemma4_text", "full_attention", "sliding_attention", 1, 2, 64, 10**6, *SCALARS]


def one_line(error: BaseException) -> None:
    assert str(error).strip()
    assert len(str(error).splitlines()) == 1, f"not one line: {error!r}"


@functools.cache
def folder() -> Path:
    """An empty folder in memory, with a file beside it that nothing may open."""
    base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    (base / "outside.safetensors").write_bytes(_file({}, b""))
    inside = base / "checkpoint"
    (inside / "sub").mkdir(parents=True)
    return inside


def _file(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def header(data: bytes) -> None:
    """A safetensors file: what the library takes is read the same; what cannot be right is refused in one line."""
    from safetensors import SafetensorError, deserialize

    from vllm_gemma4_spec.checkpoints.files import read_header

    source = Source(data)
    kind = source.below(4)
    if kind == 0:
        content = source.rest()
    else:
        entries: dict[str, Any] = {}
        end = 0
        for _ in range(source.below(6)):
            name = source.pick(NAMES)
            if kind == 1:
                shape: Any = [source.below(4) for _ in range(source.below(4))]
                dtype: Any = source.pick(DTYPES[:5])
                size = {"U8": 1, "F8_E4M3": 1, "F32": 4}.get(dtype, 2)
                for n in shape:
                    size *= n
                entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
                end += size
            else:
                keys = ("dtype", "shape", "data_offsets", "data_offsets", "extra")
                values = [
                    *DTYPES[:9],
                    [1],
                    [2, 2],
                    [0, 4],
                    [0, 16],
                    [4, 0],
                    [-4, 4],
                    [0, 2**63],
                    [2**31, 2**31],
                    "aaaa",
                ]
                entries[name] = source.json(keys, values, 3) if source.byte() & 1 else {}
                if isinstance(entries[name], dict):
                    entries[name] = {"dtype": source.pick(DTYPES), "shape": source.pick(values), **entries[name]}
                end = 16
        content = _file(entries, b"\0" * max(0, end - (source.byte() == 7)))
    path = folder() / "a.safetensors"
    path.write_bytes(content)
    try:
        theirs = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in deserialize(content)}
    except (SafetensorError, ValueError, OverflowError):
        theirs = None
    try:
        found = read_header(path)
    except CheckpointError as error:
        one_line(error)
        found = None
    if found is None:
        assert theirs is None, "the library reads what is refused"
        return
    for info in found.values():
        assert 0 <= info.start <= info.end <= len(content)
        assert isinstance(info.dtype, str)
        assert all(isinstance(n, int) and n >= 0 for n in info.shape)
    if theirs is not None:
        assert {name: (i.dtype, i.shape, i.bytes) for name, i in found.items()} == theirs


def checkpoint(data: bytes) -> None:
    """A folder with arbitrary config.json, hf_quant_config.json and index; no path leads out of it."""
    from vllm_gemma4_spec.checkpoints.files import INDEX, Checkpoint
    from vllm_gemma4_spec.checkpoints.inspection import inspect

    source = Source(data)
    path = folder()
    flags = source.byte()
    files: dict[str, Any] = {"config.json": source.json(CONFIG_KEYS, SCALARS)}
    if flags & 1:
        files["hf_quant_config.json"] = source.json(CONFIG_KEYS, SCALARS)
    if flags & 2:
        names = [n for n in NAMES if n != "__metadata__"]
        weight_map = {source.pick(names): source.json(names, SCALARS[-9:], 1) for _ in range(source.below(5))}
        files[INDEX] = {"weight_map": weight_map} if flags & 4 else source.json(["weight_map", *names], SCALARS)
    tensors: dict[str, Any] = {}
    end = 0
    for _ in range(source.below(8)):
        dtype = source.pick(["U8", "F8_E4M3", "F32", "BF16"])
        shape = source.pick([[], [1], [16], [2, 8], [2, 1], [2, 16], [0], [1, 8], [1, 1]])
        size = {"U8": 1, "F8_E4M3": 1, "F32": 4}.get(dtype, 2)
        for n in shape:
            size *= n
        tensors[source.pick(NAMES[:-1])] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = source.rest()
    for name in ("config.json", "hf_quant_config.json", INDEX):
        if name in files:
            text = json.dumps(files[name])
            (path / name).write_text("[" * 100_000 if flags & 240 == 240 and name == "config.json" else text)
        else:
            (path / name).unlink(missing_ok=True)
    used = [t for t in tensors.values() if t["data_offsets"][1] <= end]
    body = (raw + b"\x7f" * end)[:end] if used else b""
    (path / "a.safetensors").write_bytes(_file(tensors, body))
    with Watched(path) as opened:
        try:
            report = inspect(Checkpoint(path))
            report.model_dump_json()
        except CheckpointError as error:
            one_line(error)
    assert not opened, f"opened outside the folder: {opened}"


class Watched:
    """Which files outside ``path`` are opened for reading meanwhile, told by Python's audit events."""

    _hooked = False
    _inside = ""
    _opened: list[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> list[str]:
        if not Watched._hooked:
            import sys

            Watched._hooked = True
            sys.addaudithook(Watched._audit)
        Watched._inside = str(self.path.resolve()) + "/"
        Watched._opened = []
        return Watched._opened

    def __exit__(self, *_: Any) -> None:
        Watched._opened = None

    @staticmethod
    def _audit(event: str, args: tuple[Any, ...]) -> None:
        if Watched._opened is None or event != "open":
            return
        name = args[0]
        if isinstance(name, (str, os.PathLike)):
            where = os.path.abspath(os.fspath(name))
            data = where.endswith(("safetensors", "hostname", ".json"))
            if data and not where.startswith(Watched._inside):
                Watched._opened.append(where)


def quantization(data: bytes) -> None:
    """A quantization config: taken, or refused with a ValueError, as vLLM's own configs refuse."""
    from types import SimpleNamespace

    # vLLM's module first: its import is what a patch that is on waits for, and the patch imports ours.
    import vllm.model_executor.layers.quantization.modelopt  # noqa: F401

    from vllm_gemma4_spec.quantization.config import Nvfp4Config
    from vllm_gemma4_spec.quantization.loading import known_algorithm

    source = Source(data)
    value = source.json(CONFIG_KEYS[:18], SCALARS)
    flags = source.byte()
    if flags & 3:
        section = {"quant_algo": source.pick(SCALARS[:5]), "exclude_modules": [], "kv_cache_quant_algo": None}
        section[source.pick(CONFIG_KEYS[2:12])] = value
        section[source.pick(CONFIG_KEYS[2:12])] = source.json(CONFIG_KEYS[:12], SCALARS, 2)
        value = section if flags & 4 else {"quantization": section}
        value[source.pick(["producer", "quant_method"])] = source.pick(
            [{"name": "modelopt"}, "modelopt", ["modelopt"], None]
        )
    config = value if isinstance(value, dict) else {"quantization": value}
    before = json.dumps(config)
    try:
        made = Nvfp4Config.from_config(config)
    except Gemma4SpecError as error:
        one_line(error)
    except (ValueError, OverflowError):
        pass  # vLLM's own; int() of infinity is the second
    else:
        made.is_layer_excluded("model.layers.0.self_attn.qkv_proj")
        assert made.quant_algo in ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "FP8")
    assert json.dumps(config) == before, "the config was changed"
    asked: list[Any] = []
    normalize = known_algorithm(lambda self, c: asked.append(c))
    hf = SimpleNamespace(quantization_config=value if source.byte() & 1 else config)
    if isinstance(hf.quantization_config, dict):
        taken = normalize(None, hf)
        assert (taken is None) == bool(asked)


def settings(data: bytes) -> None:
    """An environment: what is refused is named, what is taken can be read."""
    from vllm_gemma4_spec import settings as s

    source = Source(data)
    patches = ["draft-groups", "chat-output", "own-blocks"]
    known = [setting.name for setting in s.all_settings(patches)]
    environ: dict[str, str] = {}
    for _ in range(source.below(5)):
        name = source.pick([*known, s.PREFIX + "_", s.PATCH_PREFIX + "X", "VLLM_GEMMA4_SPECTRUM", "PATH", ""])
        if source.byte() & 64:
            name += source.pick(["", "_", "é", "\n", "X" * 100, "=", " "])
        environ[name] = source.pick(
            ["0", "1", " 1 ", "", "2", "strict", "repair", "auto", "packed", "a\nb", "🙂", "1" * 5000]
        )
    refused = ""
    try:
        s.check_environment(patches, environ)
    except SettingError as error:
        one_line(error)
        refused = str(error)
    if refused:
        assert any(refused.startswith((ascii(name)[1:-1], name)) for name in environ if name)
        return
    for setting in s.all_settings(patches):
        assert not setting.choices or setting.read(environ) in setting.choices
    for name in environ:
        assert name in known or not (name == s.PREFIX or name.startswith(s.PREFIX + "_"))


def plan(data: bytes) -> None:
    """A model's config.json for ``plan``."""
    from vllm_gemma4_spec.ops.plan import model as planned

    source = Source(data)
    path = folder()
    (path / "hf_quant_config.json").unlink(missing_ok=True)
    value = source.json([*MODEL_KEYS, *CONFIG_KEYS[:10]], MODEL_SCALARS)
    if isinstance(value, dict) and source.byte() & 3:
        value["model_type"] = source.pick(["gemma4", "gemma4_text"])
    (path / "config.json").write_text(json.dumps(value))
    try:
        model = planned.load(path)
        assert model.weights in planned.WEIGHT_BYTES
    except planned.PlanError as error:
        one_line(error)


def lines(data: bytes) -> None:
    """Text files of the tools: prompts, calibration texts, a server's log, an address."""
    from vllm_gemma4_spec.checkpoints.quantizer import read_calibration
    from vllm_gemma4_spec.demo.server import last_error
    from vllm_gemma4_spec.ops.bench.prompts import read as prompts
    from vllm_gemma4_spec.ops.server import base_url

    source = Source(data)
    path = folder() / "lines.txt"
    made: list[str] = []
    if source.byte() & 1:
        for _ in range(source.below(4)):
            value = source.json(
                ["prompt", "turns", "text", "x"], ["a", "b c", ["d"], [1, 2], "ERROR 1 x] E: y", "ValueError: z"]
            )
            made.append(source.pick(["", "(APIServer pid=1) ", "ERROR a] ", "  "]) + json.dumps(value))
        content = "\n".join(made).encode()
    else:
        content = source.rest()
    path.write_bytes(content)
    readers: Sequence[Callable[[], Any]] = (
        lambda: read_calibration(path),
        lambda: prompts(path, 3),
        lambda: base_url(content.decode("latin-1")),
    )
    for reader in readers:
        try:
            assert reader()
        except Gemma4SpecError as error:
            one_line(error)
    line = last_error(path)
    assert line
    assert len(line.splitlines()) <= 1
    assert len(line) <= 300
