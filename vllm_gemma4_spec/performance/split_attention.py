"""Attention of few queries per request: split as vLLM splits that of one token, and launched with numbers that suit it.

TRITON_ATTN has two kernels. One program per query block and KV head ("2D") walks the whole context: a
verification of k + 1 tokens at one request is 16 programs in a 31B target's sliding layers and 12 in its
full ones, on a card with 132 multiprocessors. The other ("3D") also cuts the context into 16 segments, but
is chosen for one token per request only, while its scratch holds the batch. It is written for any query length; only
its choice is not.

On Hopper and Blackwell :func:`launch` chooses among three by the batch's shape: both kernels with tiles, stages and
segments that were measured on an H200, and for sliding layers one of this package (``kernels/few_query_attention.py``),
which cuts up what a query sees: of a long context a sliding layer sees 1,024 keys, which lie in one or two of the 16
segments. Elsewhere short queries run vLLM's 3D kernel as it is. Where few KV heads leave most of a card idle, as in
small drafters, :func:`cluster` comes first: both steps as one kernel (``kernels/cluster_attention.py``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import cuda
from vllm_gemma4_spec.kernels.scratch import PARTS

if TYPE_CHECKING:
    from vllm_gemma4_spec.kernels.cluster_attention import Form as ClusterForm
    from vllm_gemma4_spec.kernels.few_query_attention import Form

logger = logging.getLogger("vllm.plugins.gemma4_spec")

# Programs from which on the 2D kernel fills a GPU: vLLM's MIN_LAUNCH_GRID_SIZE_2D.
_FULL_GRID = 128
# Rows of a query block (BLOCK_M): vLLM's constant for up to 16 query heads per KV head.
_BLOCK_ROWS = 16


def fits(q: torch.Tensor, num_seqs: int, num_kv_heads: int, segments: int, scratch: torch.Tensor | None) -> bool:
    """Whether the 3D kernel is better than 2D and its scratch holds the batch; a function of shapes alone.

    Args:
        q: ``[num_tokens, num_query_heads, head_size]``.
        num_seqs: requests in the batch.
        num_kv_heads: KV heads of this layer.
        segments: parts that a context is cut into.
        scratch: the builder's, ``[tokens, heads, segments, head_size]`` float32, sized for the target's heads.
    """
    num_tokens, num_heads, head_size = q.shape
    group = num_heads // num_kv_heads
    if scratch is None or group > _BLOCK_ROWS:
        return False
    blocks = num_tokens // (_BLOCK_ROWS // group) + num_seqs
    # The kernels index scratch by their own head counts and sizes; maxima and sums have no room for head_size.
    held = scratch.shape[0] * scratch.shape[1]
    return (
        blocks * num_kv_heads <= _FULL_GRID
        and num_tokens * num_heads <= held
        and head_size <= scratch.shape[3]
        and segments == scratch.shape[2]
    )


# Floats of the scratch for split attention, per process and device, 33 MiB: what the streaming GEMM has on an H200.
_FLOATS = 33 * 2**18
_MANY = 64  # programs of a full layer from which on half as many segments are faster, at 256 as at 30,000 tokens
_REQUESTS = 64  # most requests for which one of ours is chosen
_changed: dict[str, int] = {}  # numbers of the launches to come


@dataclass(frozen=True)
class Launch:
    """How a batch is attended to.

    Attributes:
        own: by this package's kernel, in this form.
        segments: else by vLLM's 3D kernel with so many; 0: by its 2D kernel.
        numbers: what vLLM's kernel is launched with in place of its own.
    """

    own: Form | None = None
    segments: int = 0
    numbers: tuple[tuple[str, int], ...] = ()

    def floats(self, num_tokens: int, num_heads: int, head_size: int, window: int) -> int:
        """What the scratch must hold."""
        if self.own:
            return self.own.scratch(num_tokens, num_heads, head_size, window)
        return num_tokens * num_heads * self.segments * (head_size + 2)


def _numbers(tile: int, warps: int, stages: int) -> tuple[tuple[str, int], ...]:
    return ("TILE_SIZE", tile), ("num_warps", warps), ("num_stages", stages)


def launch(q: torch.Tensor, k: torch.Tensor, num_seqs: int, window: int) -> Launch | None:
    """What was fastest on an H200 over contexts of 256 to 120,000 tokens (``benchmarks/NOTES.md``, 80 to 82, 108).

    Of shapes alone, which a CUDA graph keeps. The number of parts is that of the requests, not of their queries.

    Args:
        q: ``[num_tokens, num_query_heads, head_size]``.
        k: ``[blocks, block_size, num_kv_heads, head_size]``.
        num_seqs: requests in the batch.
        window: keys that a query sees at most; 0: all.

    Returns:
        None where vLLM's choice stays.
    """
    from vllm_gemma4_spec.kernels.few_query_attention import Form

    num_tokens, num_heads, head_size = q.shape
    kv_heads = k.shape[2]
    group = num_heads // kv_heads
    if q.element_size() > 2 or group > _BLOCK_ROWS or num_seqs > _REQUESTS:
        return None
    fp8 = k.element_size() == 1
    programs, blocks = num_seqs * kv_heads, num_tokens // (_BLOCK_ROWS // group) + num_seqs
    found = None
    if head_size == 256 and window:
        if programs <= _FULL_GRID:
            found = Launch(Form(max(2, min(8, 256 // programs)), 32, 4, 2))
        elif not fp8:
            found = Launch(numbers=_numbers(64, 4, 2))
    elif head_size == 512 and not window:
        numbers = () if fp8 else _numbers(32, 4, 2)
        if blocks * kv_heads <= _FULL_GRID or (num_tokens == num_seqs and programs <= _FULL_GRID):
            segments = 64 if programs <= 8 and not fp8 else 8 if programs >= _MANY else 16
            found = Launch(segments=segments, numbers=numbers)
        elif not fp8:
            found = Launch(numbers=numbers)
    return found if found and found.floats(num_tokens, num_heads, head_size, window) <= _FLOATS else None


_FILLED = 28  # clusters with which a full layer's long contexts are read as fast as by vLLM's kernel
_UNITS = 32  # tiles of eight rows, of all requests and KV heads, for which a cluster each is faster


def cluster(q: torch.Tensor, k: torch.Tensor, num_seqs: int, window: int, queries: int) -> ClusterForm | None:
    """The kernel over clusters for requests of at most ``queries`` tokens, where it is the fastest; else None.

    Of shapes alone, as :func:`launch`, whose arguments these are; ``cluster_attention.takes`` looks at dtypes.
    """
    from vllm_gemma4_spec.kernels import cluster_attention

    num_heads, head_size = q.shape[1:]
    if not window and queries > 1:  # each tile of rows would read all keys again
        return None
    form = cluster_attention.form(head_size, num_heads // k.shape[2], window, k.shape[1], queries)
    if form is None:
        return None
    units = num_seqs * k.shape[2] * form.tiles(queries)
    if units > _UNITS or not cluster_attention.at_once(form, units):
        return None
    count = cluster_attention.clusters(window, units)
    if not window and units * count < _FILLED:
        return None
    return form if form.scratch(units, count) <= _FLOATS else None


@functools.cache
def _suits(device: torch.device) -> bool:
    """A card that launches kernels early, unless a batch's size must not change the order of sums."""
    import vllm.envs as envs

    return not envs.VLLM_BATCH_INVARIANT and cuda.starts_early(device)


class Kernel:
    """Stands for one of vLLM's kernels, and launches it with those of :data:`_changed` that it is to take.

    Args:
        kernel: vLLM's.
        names: numbers that it takes from there.
    """

    def __init__(self, kernel: Any, names: Collection[str]) -> None:
        self._kernel, self._names = kernel, names

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launched: Callable[..., Any] = self._kernel[grid]
        changed = {name: number for name, number in _changed.items() if name in self._names}
        return lambda *args, **kwargs: launched(*args, **kwargs | changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def attention_kernel(original: Any) -> Kernel:
    """``kernel_unified_attention_2d`` and ``_3d``: launched with the numbers of :func:`launch`.

    Patch: ``split-attention``. Evidence: ``tests/kernels/test_patches.py::test_stock_walks_the_context_in_one_piece``.
    Related upstream change: none found for the choice of kernel; #43257, open, tunes it for head size 512.
    """
    return Kernel(original, ("TILE_SIZE", "num_warps", "num_stages"))


def reduce_kernel(original: Any) -> Kernel:
    """``reduce_segments``, which adds up what the 3D kernel left: with its tiles.

    Patch: ``split-attention``. Evidence: ``tests/kernels/test_patches.py::test_stock_walks_the_context_in_one_piece``.
    Related upstream change: none found for the choice of kernel; #43257, open, tunes it for head size 512.
    """
    return Kernel(original, ("TILE_SIZE",))


# Arguments of ``unified_attention`` with which vLLM's choice stays.
_OTHERS = ("alibi_slopes", "sinks", "qq_bias", "output_scale", "q_descale")


class FewQueries:
    """Batches for which :func:`launch` knows more than vLLM's choice."""

    def __init__(self) -> None:
        self.works: bool | None = None  # this package's kernel; not tried yet
        self.clusters = True  # the kernel over clusters has not failed to compile
        self._compiled: set[ClusterForm] = set()
        self._scratch: dict[torch.device, torch.Tensor] = {}
        self._arrivals: dict[torch.device, torch.Tensor] = {}

    def scratch(self, device: torch.device) -> torch.Tensor | None:
        """Made by the first call, a warm-up: not within a CUDA graph, where it would be that graph's."""
        if device not in self._scratch:
            if device.type != "cpu" and torch.cuda.is_current_stream_capturing():
                return None
            held = PARTS.floats(device, _FLOATS)
            self._scratch[device] = torch.empty(_FLOATS, device=device) if held is None else held
            self._arrivals[device] = torch.zeros(_UNITS * 8, dtype=torch.int32, device=device)
        return self._scratch[device]

    def __call__(self, original: Callable[..., None], given: dict[str, Any]) -> bool:
        """Whether ``out`` has been filled, for these arguments of ``unified_attention``."""
        q, k, window = given["q"], given["k"], given["window_size"][0] + 1
        if not _suits(q.device) or given["softcap"] or any(given.get(other) is not None for other in _OTHERS):
            return False
        scratch = self.scratch(q.device)
        if scratch is None:
            return False
        form = cluster(q, k, len(given["seqused_k"]), window, given["max_seqlen_q"])
        if form and self._cluster(form, given, scratch):
            return True
        how = launch(q, k, len(given["seqused_k"]), window)
        if how is None:
            return False
        if how.own:
            return self._own(how.own, given, window, scratch)
        changed = given | {"seq_threshold_3D": 0}
        if how.segments:
            lines = q.shape[0] * q.shape[1] * how.segments
            parts = scratch[: lines * (q.shape[2] + 2)].split([lines * q.shape[2], lines, lines])
            changed |= {
                "max_seqlen_q": 1,
                "seq_threshold_3D": len(given["seqused_k"]),
                "num_par_softmax_segments": how.segments,
                **dict(zip(("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"), parts, strict=True)),
            }
        _changed.update(how.numbers)
        try:
            original(**changed)
        finally:
            _changed.clear()
        return True

    def _cluster(self, form: ClusterForm, given: dict[str, Any], scratch: torch.Tensor) -> bool:
        from vllm_gemma4_spec.kernels import cluster_attention

        q, k, v, out = given["q"], given["k"], given["v"], given["out"]
        if not self.clusters or not cluster_attention.takes(q, k, v, out):
            return False
        if form not in self._compiled:
            if torch.cuda.is_current_stream_capturing():  # nothing may be loaded then
                return False
            try:
                cluster_attention.kernel(form)
            except (ImportError, RuntimeError) as error:
                logger.info("Attention of few queries stays two kernels: %s", f"{error}".partition("\n")[0])
                self.clusters = False
                return False
            self._compiled.add(form)
        batch = given["block_table"], given["seqused_k"], given["cu_seqlens_q"], given["softmax_scale"]
        cluster_attention.attention(
            form, out, q, k, v, *batch, scratch, self._arrivals[q.device], given["max_seqlen_q"]
        )
        return True

    def _own(self, how: Form, given: dict[str, Any], window: int, scratch: torch.Tensor) -> bool:
        from vllm_gemma4_spec.kernels.few_query_attention import attention

        q, k, v = given["q"], given["k"], given["v"]
        if self.works is False or k.dtype not in (q.dtype, torch.float8_e4m3fn):
            return False
        # vLLM's kernels, too, apply scales to a 16-bit query alone.
        scales = (given["k_descale"], given["v_descale"]) if k.dtype != q.dtype else None
        batch = given["block_table"], given["seqused_k"], given["cu_seqlens_q"], given["softmax_scale"], window
        try:
            attention(how, given["out"], q, k, v, *batch, scratch, scales, one=given["max_seqlen_q"] == 1)
        except Exception as error:  # of Triton's compiler, which raises anything
            if self.works:
                raise
            logger.info("Short queries run on vLLM's own attention kernels: %s", f"{error}".partition("\n")[0])
            self.works = False
            return False
        self.works = True
        return True


few_queries = FewQueries()
# Attributes of the scratch of a metadata builder in scope; the kernel's caller is given tensors and no config.
IN_SCOPE = "_gemma4_spec_in_scope"
QUERIES = "_gemma4_spec_queries"  # most tokens of a request in batches for FewQueries


def _most_queries(vllm_config: Any) -> int:
    """Those of a draft's first pass: what CUDA graphs do not warm up would be compiled while requests wait.

    Halves of a batch that run at once would share the scratch.
    """
    if getattr(getattr(vllm_config, "parallel_config", None), "use_ubatching", True):
        return 0
    spec = getattr(vllm_config, "speculative_config", None)
    return 1 if spec is None else 2 + int(getattr(spec, "num_speculative_tokens", 0))


def _shared(own: torch.Tensor) -> torch.Tensor:
    """In place of a builder's scratch: all layers run one after the other, and :data:`PARTS` serves them, too.

    Before any CUDA graph is captured. vLLM's builders of 31B have 4 MiB each, six of them.
    """
    PARTS.reserve(own.device, max(own.numel(), _FLOATS if _suits(own.device) else 0), 1)
    return PARTS.on(own.device)[0][: own.numel()].view(own.shape)


def builder_init(original: Callable[..., None]) -> Callable[..., None]:
    """``TritonAttentionMetadataBuilder.__init__``: the scratch of an engine in scope is one for all, and marked.

    Patch: ``split-attention``. Evidence: ``tests/kernels/test_patches.py::test_stock_walks_the_context_in_one_piece``.
    Related upstream change: none found for the choice of kernel; #43257, open, tunes it for head size 512.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_engine(self.vllm_config):
            queries = _most_queries(self.vllm_config)
            if queries:
                self.softmax_segm_output = _shared(self.softmax_segm_output)
            setattr(self.softmax_segm_output, IN_SCOPE, True)
            setattr(self.softmax_segm_output, QUERIES, queries)

    return __init__


def unified_attention(original: Callable[..., None]) -> Callable[..., None]:
    """``triton_attn.unified_attention``: few queries run :class:`FewQueries`, or count as one token per request.

    The original reads ``max_seqlen_q`` and ``seq_threshold_3D`` for its choice of a kernel and for nothing else.

    Patch: ``split-attention``. Evidence: ``tests/kernels/test_patches.py::test_stock_walks_the_context_in_one_piece``.
    Related upstream change: none found for the choice of kernel; #43257, open, tunes it for head size 512.
    """

    @functools.wraps(original)
    def wrapper(**kwargs: Any) -> None:
        scratch = kwargs.get("softmax_segm_output")
        if not getattr(scratch, IN_SCOPE, False) or kwargs.get("mm_prefix_range") is not None:
            original(**kwargs)
            return
        if kwargs["max_seqlen_q"] <= getattr(scratch, QUERIES, 0) and few_queries(original, kwargs):
            return
        q, k, num_seqs = kwargs["q"], kwargs["k"], len(kwargs["seqused_k"])
        segments = kwargs.get("num_par_softmax_segments")
        if kwargs["max_seqlen_q"] > 1 and segments is not None and fits(q, num_seqs, k.shape[2], segments, scratch):
            kwargs["max_seqlen_q"] = 1
            kwargs["seq_threshold_3D"] = num_seqs
        original(**kwargs)

    return wrapper
