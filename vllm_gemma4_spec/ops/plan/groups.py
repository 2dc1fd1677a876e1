"""KV cache groups and capacity by the rules of vLLM 0.19.1, from the configs.

Computed here, because importing vLLM takes seconds and a laptop has none; tests hold every group, member and
capacity to vLLM's own functions and to a real engine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace

from vllm_gemma4_spec.ops.output import Output
from vllm_gemma4_spec.ops.plan.configs import PlanError
from vllm_gemma4_spec.ops.plan.model import KV_BYTES, Model


class Group(Output):
    """One KV cache group; its layers have equal specs."""

    number: int
    owner: str
    """target, drafter, or both: vLLM puts layers with equal specs together, whosever they are"""
    kind: str
    """sliding or full"""
    window: int
    """tokens; 0: full attention"""
    block_size: int
    """tokens"""
    page_bytes: int
    """one block of one layer"""
    target_layers: list[int]
    drafter_layers: list[int]

    @property
    def size(self) -> int:
        return len(self.target_layers) + len(self.drafter_layers)


@dataclass(frozen=True)
class Cache:
    """Groups and what they cost.

    Attributes:
        groups: in vLLM's order, the target's first.
        bytes_per_token: growth per token once all windows are full, padding of blocks included.
        request_bytes: what vLLM reserves at most for one request of ``context`` tokens.
        blocks: of the pool that the memory given holds.
        requests: of ``context`` tokens that fit at once, as vLLM reports it at start-up.
        longest_prompt: tokens of the longest prompt that the pool holds, alone, up to the target's own maximum.
    """

    groups: tuple[Group, ...]
    bytes_per_token: float
    request_bytes: int
    blocks: int
    requests: float
    longest_prompt: int


@dataclass(frozen=True)
class Spec:
    """What decides a layer's group: ``window`` (0: full attention), the shape of its KV, tokens of a block."""

    window: int
    heads: int
    head_size: int
    itemsize: int
    block_size: int

    @property
    def page_bytes(self) -> int:
        return 2 * self.block_size * self.heads * self.head_size * self.itemsize

    def request_pages(self, context: int, batched_tokens: int) -> int:
        """Blocks that one request takes at most: a window, and the tokens scheduled in one step beside it."""
        tokens = min(self.window - 1 + batched_tokens, context) if self.window else context
        # A window may begin inside a block, so it touches one more.
        return _blocks(tokens, self.block_size) + (1 if self.window else 0)

    def held(self, tokens: int, batched_tokens: int, drafts: int) -> int:
        """Blocks that a request of ``tokens`` holds at once with the patch ``long-prompts``."""
        whole = _blocks(tokens, self.block_size)
        if not self.window:
            return whole
        return min(whole, _blocks(self.window - 2 + 2 * drafts + batched_tokens, self.block_size) + 1)


def _blocks(tokens: int, size: int) -> int:
    return -(-tokens // size)


def specs(model: Model, owner: str, block_size: int, itemsize: int) -> dict[tuple[str, int], Spec]:
    """(owner, layer) -> spec, for the layers that have KV of their own."""
    out = {}
    for i in range(model.first_shared):
        heads, size = model.attention(i)
        window = 0 if model.is_full(i) else int(model.text.sliding_window)
        out[owner, i] = Spec(window, heads, size, itemsize, block_size)
    return out


def plan_cache(
    target: Model,
    drafter: Model | None,
    memory_bytes: int,
    context: int,
    kv_dtype: str = "bf16",
    block_size: int = 16,
    batched_tokens: int = 8192,
    drafts: int = 0,
) -> Cache:
    """Group the layers of both models and fill ``memory_bytes`` with blocks; ``drafts`` a step at most.

    Raises:
        PlanError: the layers' page sizes cannot be unified.
    """
    itemsize = int(KV_BYTES[kv_dtype])
    layers = specs(target, "target", block_size, itemsize)
    if drafter is not None:
        layers |= specs(drafter, "drafter", block_size, itemsize)
    if len({s.window for s in layers.values()}) == 1 and len(set(layers.values())) > 1:
        raise PlanError("every layer has one window but not one shape; plan knows models with both kinds of layers")
    page = max(s.page_bytes for s in layers.values())
    by_spec: dict[Spec, list[tuple[str, int]]] = defaultdict(list)
    for layer, spec in layers.items():
        if page % spec.page_bytes:
            raise PlanError(f"vLLM cannot put these layers into one cache: pages of {spec.page_bytes} and {page} bytes")
        # One size of page for all layers: a smaller KV gets blocks of more tokens.
        by_spec[replace(spec, block_size=spec.block_size * (page // spec.page_bytes))].append(layer)
    counts = [len(members) for members in by_spec.values()]
    # Groups of the rarest kind's number of layers; of the most common kind's where that is less than half as many more.
    size = max(counts) if max(counts) < min(counts) * 1.5 else min(counts)
    found = []
    for spec, members in by_spec.items():
        parts = _blocks(len(members), size)
        found += [(spec, members[i::parts]) for i in range(parts)]
    groups = tuple(_group(n, spec, members) for n, (spec, members) in enumerate(found))
    widest = max(g.size for g in groups)
    grows = sum(g.page_bytes * widest / g.block_size for g in groups if not g.window)
    pages = sum(spec.request_pages(context, batched_tokens) for spec, _ in found)
    blocks = max(0, memory_bytes) // page // widest
    longest = bisect_right(
        range(1, int(target.text.max_position_embeddings) + 1),
        blocks - 1,  # the null block is nobody's
        key=lambda tokens: sum(spec.held(tokens, batched_tokens, drafts) for spec, _ in found),
    )
    return Cache(groups, grows, pages * page * widest, blocks, blocks / pages, max(0, longest - 1))  # an answer follows


def _group(number: int, spec: Spec, layers: list[tuple[str, int]]) -> Group:
    owners = {owner for owner, _ in layers}
    return Group(
        number=number,
        owner="both" if len(owners) == 2 else owners.pop(),
        kind="sliding" if spec.window else "full",
        window=spec.window,
        block_size=spec.block_size,
        page_bytes=spec.page_bytes,
        target_layers=[i for owner, i in layers if owner == "target"],
        drafter_layers=[i for owner, i in layers if owner == "drafter"],
    )
