"""Which kernel takes which batches of a GEMM: measured once per card and shape, kept in vLLM's cache.

A card that nobody tried is then not slower than with vLLM's Marlin, or a drafter's cuBLAS, alone.

- :func:`chosen`: the streaming kernel is compiled for several numbers of rows; each form gets its batches if it was
  faster than Marlin with the smallest and the largest; where it overlaps with the kernel ahead, if it was as fast.
- :func:`fastest`: a layer with the small-batch kernel's copy of its weights. The fastest form of that kernel gets the
  batches up to a number of rows that was measured, if it was faster there than what runs else (streaming or Marlin).
  So does a kernel for a drafter's bfloat16 weights, beside cuBLAS.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vllm_gemma4_spec._version import __version__

logger = logging.getLogger("vllm.plugins.gemma4_spec")

WORTH = 0.97  # of another kernel's time; a difference below that may be noise
# Of Marlin's, where the streaming kernel starts while the one ahead ends, which is of no use to it alone: on two H200s
# 4.5 us of each of 31B's GEMMs that take either kernel 19 us alone.
OVERLAPPING = 1.03
_patience = 60.0  # seconds for which another process may measure
Times = dict[int, tuple[float, float]]  # microseconds by rows, two of each form: streaming, Marlin
Kernels = dict[int, dict[str, float]]  # microseconds by rows and by kernel; one of them is OTHER
T = TypeVar("T")
OTHER = "other"  # streaming or Marlin, as chosen() says; cuBLAS
BFLOAT16 = ", bfloat16"  # of a shape whose weights are not NVFP4


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


@functools.cache
def worth() -> float:
    """What the streaming kernel may take on this card, over Marlin's time."""
    import torch

    from vllm_gemma4_spec.kernels import cuda

    return OVERLAPPING if torch.cuda.is_available() and cuda.starts_early(torch.device("cuda")) else WORTH


def faster(times: Mapping[int, tuple[float, float]]) -> int:
    """Bit i is set if the i-th form was faster than Marlin, or as fast where that is enough, at both ends."""
    most = worth()
    return sum(
        all(ours <= most * marlins for ours, marlins in (times[first], times[last])) << i
        for i, (first, last) in enumerate(_forms(times))
    )


def read(file: Path) -> dict[str, Any]:
    """The cache, or nothing where there is none or it cannot be read: it is measured again then."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _pair(us: Any) -> tuple[float, float]:
    return float(us[0]), float(us[1])


def _by_kernel(us: Any) -> dict[str, float]:
    found = {str(kernel): float(value) for kernel, value in us.items()}
    found[OTHER]
    return found


def _kept(file: Path, card: str, shape: str, maker: str, read_us: Callable[[Any], T]) -> dict[int, T] | None:
    try:
        entry = read(file)[card][shape]
        if entry["made_by"] != maker:
            return None
        return {int(rows): read_us(us) for rows, us in entry["us"].items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _keep(file: Path, card: str, shape: str, maker: str, times: Mapping[int, Any]) -> None:
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


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process of this machine at a time, the others then read what it found: ranks that choose differently wait for
    the slower one in every layer, and engines that measure at once spoil each other's times."""
    global _patience
    from filelock import FileLock, Timeout

    lock = FileLock(f"{file}.lock", is_singleton=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_patience)
    except Timeout:
        _patience = 0.0  # whoever holds it will not let go
    except (OSError, NotImplementedError):
        pass  # a folder that cannot be written; a file system without locks, of which filelock 3 has no patience left
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


_chosen: dict[tuple[Path, str, str, str], dict[int, Any]] = {}


def _times(
    shape: str,
    maker: str,
    measure: Callable[[], dict[int, T]],
    read_us: Callable[[Any], T],
    say: Callable[[dict[int, T]], str],
) -> dict[int, T]:
    file, name = path(), card()
    key = (file, name, shape, maker)
    if key not in _chosen:
        times = _kept(file, name, shape, maker, read_us)
        if times is None:
            with _alone(file):
                times = _kept(file, name, shape, maker, read_us)
                if times is None:
                    times = measure()
                    _keep(file, name, shape, maker, times)
        _chosen[key] = times
        logger.info("%s: %s", named(shape), say(times))
    return _chosen[key]


def chosen(n: int, k: int, maker: str, measure: Callable[[], Times], gelu: bool = False) -> int:
    """Which forms a GEMM of ``[N, K]`` weights takes on this card, as :func:`faster` says it.

    Args:
        maker: of :func:`made_by`.
        measure: called where the cache has no times.
        gelu: of those that give the activation, too; against Marlin with the activation's kernel.
    """
    return faster(_times(f"{n}x{k}" + ", gelu" * gelu, maker, measure, _pair, described))


def fastest(shape: str, maker: str, measure: Callable[[], Kernels]) -> dict[int, str]:
    """By the largest number of rows that it is for: the kernel a GEMM takes on this card, :data:`OTHER` or one faster.

    Args:
        shape: what the cache keeps it under.
        maker, measure: as in :func:`chosen`.
    """
    return {rows: _fastest(us) for rows, us in _times(shape, maker, measure, _by_kernel, described_kernels).items()}


def _fastest(us: Mapping[str, float]) -> str:
    """What runs else, unless another is worth it; of those the first that is as fast as any."""
    least = min(us.values())
    return next(kernel for kernel in (OTHER, *us) if WORTH * us[kernel] <= least)


def clock(device: Any, calls: int = 5) -> Callable[[Callable[[], Any]], float]:
    """A function: microseconds of the fastest of so many calls with cold caches, after one that does not count.

    Not their median: what else runs on the card while an engine starts only ever makes a call slower.
    """
    import torch

    passes_by = torch.empty(2**27, dtype=torch.uint8, device=device)
    busy = 5

    def once(call: Callable[[], Any]) -> float:
        nonlocal busy
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            for _ in range(busy):  # the card is busy while the host prepares the launch, and the L2 holds other things
                passes_by.zero_()
            start.record()
            call()
            end.record()
            late = start.query()  # the card has waited for the host, whose time it would be
            end.synchronize()
            if not late or busy > 100:
                return float(start.elapsed_time(end) * 1000)
            busy *= 2

    return lambda call: min([once(call) for _ in range(calls + 1)][1:])


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


def described_kernels(times: Kernels) -> str:
    """``8x16 to 16 rows, other to 80 rows (…)``"""
    spans: list[tuple[str, int]] = []
    for rows in sorted(times):
        kernel = _fastest(times[rows])
        if spans and spans[-1][0] == kernel:
            spans.pop()
        spans.append((kernel, rows))
    who = ", ".join(f"{kernel} to {rows} rows" for kernel, rows in spans)
    us = ", ".join(f"{times[rows][kernel]:.1f}/{times[rows][OTHER]:.1f}" for kernel, rows in spans)
    return f"{who} ({us} us there, this and {OTHER})"


def named(shape: str) -> str:
    """What a GEMM is called in the log and by ``doctor``."""
    return f"GEMM {shape}" if BFLOAT16 in shape else f"NVFP4 GEMM {shape}"


def of_card(card: str) -> dict[str, str]:
    """What the cache says of a card, by shape; for people."""
    found, file = read(path()).get(card), path()
    said = {}
    for shape, entry in (found if isinstance(found, dict) else {}).items():
        maker = entry.get("made_by", "") if isinstance(entry, dict) else ""
        if pairs := _kept(file, card, shape, maker, _pair):
            said[shape] = described(pairs)
        elif kernels := _kept(file, card, shape, maker, _by_kernel):
            said[shape] = described_kernels(kernels)
    return said
