"""Which batches of a GEMM of NVFP4 weights stream: measured once per card and shape, kept in vLLM's cache folder.

A card that nobody tried is then never slower than with vLLM's Marlin alone. The streaming kernel is compiled for
several numbers of rows; each form gets its batches if it was faster than Marlin with the smallest and the largest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_gemma4_spec._version import __version__

logger = logging.getLogger("vllm.plugins.gemma4_spec")

WORTH = 0.97  # of Marlin's time; a difference below that may be noise
Times = dict[int, tuple[float, float]]  # microseconds by rows, two of each form: streaming, Marlin


def path() -> Path:
    import vllm.envs

    return Path(vllm.envs.VLLM_CACHE_ROOT) / "gemma4_spec" / "nvfp4-rows.json"


def card() -> str:
    """The current device, as the cache names it."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name}, {found.multi_processor_count} multiprocessors"


def made_by(*sources: str) -> str:
    """What times depend on beside card and shape: the kernels and whoever launches them."""
    import torch
    import vllm

    words = (__version__, vllm.__version__, torch.__version__, *sources)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _forms(times: Mapping[int, tuple[float, float]]) -> list[tuple[int, int]]:
    """The smallest and the largest batch of each form."""
    rows = sorted(times)
    return list(zip(rows[::2], rows[1::2], strict=True))


def faster(times: Mapping[int, tuple[float, float]]) -> int:
    """Bit i is set if the i-th form was faster than Marlin at both ends."""
    return sum(
        all(ours <= WORTH * marlins for ours, marlins in (times[first], times[last])) << i
        for i, (first, last) in enumerate(_forms(times))
    )


def read(file: Path) -> dict[str, Any]:
    """The cache, or nothing where there is none or it cannot be read: it is measured again then."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kept(file: Path, card: str, shape: str, maker: str) -> Times | None:
    try:
        entry = read(file)[card][shape]
        if entry["made_by"] != maker:
            return None
        return {int(rows): (float(us[0]), float(us[1])) for rows, us in entry["us"].items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _keep(file: Path, card: str, shape: str, maker: str, times: Times) -> None:
    """Other processes may write, too: the last one wins, and what it lost is measured again by whoever needs it."""
    found = read(file)
    shapes = found.setdefault(card, {})
    if not isinstance(shapes, dict):
        shapes = found[card] = {}
    shapes[shape] = {"made_by": maker, "us": {str(rows): us for rows, us in times.items()}}
    new = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        logger.info("NVFP4 GEMMs are measured again at the next start: %s cannot be written (%s)", file, error.strerror)


_chosen: dict[tuple[Path, str, str], int] = {}


def chosen(n: int, k: int, maker: str, measure: Callable[[], Times]) -> int:
    """Which forms a GEMM of ``[N, K]`` weights takes on this card, as :func:`faster` says it.

    Args:
        maker: of :func:`made_by`.
        measure: called where the cache has no times.
    """
    file, name, shape = path(), card(), f"{n}x{k}"
    key = (file, name, shape)
    if key not in _chosen:
        times = _kept(file, name, shape, maker)
        if times is None:
            times = measure()
            _keep(file, name, shape, maker, times)
        _chosen[key] = faster(times)
        logger.info("NVFP4 GEMM %s: %s", shape, described(times))
    return _chosen[key]


def described(times: Times) -> str:
    mask, forms = faster(times), _forms(times)
    streams: list[list[int]] = []
    for i, (first, last) in enumerate(forms):
        if not mask >> i & 1:
            continue
        if streams and streams[-1][1] == first - 1:
            streams[-1][1] = last
        else:
            streams.append([first, last])
    who = "streams " + " and ".join(f"{a} to {b}" for a, b in streams) + " rows" if streams else "Marlin"
    us = ", ".join(f"{times[last][0]:.0f}/{times[last][1]:.0f}" for _, last in forms)
    return f"{who} ({us} us, this kernel's and Marlin's, at {', '.join(str(last) for _, last in forms)} rows)"


def of_card(card: str) -> dict[str, str]:
    """What the cache says of a card, by shape; for people."""
    found = read(path()).get(card)
    shapes = found if isinstance(found, dict) else {}
    return {
        shape: described(times)
        for shape, entry in shapes.items()
        if isinstance(entry, dict) and (times := _kept(path(), card, shape, entry.get("made_by", "")))
    }
