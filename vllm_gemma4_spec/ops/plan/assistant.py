"""An MTP assistant as a drafter of the plan: queries alone, no KV of its own, its own output matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_gemma4_spec.ops.plan.model import WEIGHT_BYTES, Matrix, Model


@dataclass(frozen=True)
class Assistant(Model):
    """``backbone``: the target's hidden size; ``head_rows``: rows of the output matrix that a pass reads, centroids
    included."""

    backbone: int = 0
    head_rows: int = 0

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        text, hidden = self.text, int(self.text.hidden_size)
        out = [Matrix("pre_projection", 2 * self.backbone * hidden), Matrix("post_projection", self.backbone * hidden)]
        for i in range(self.layers):
            queries = hidden * int(text.num_attention_heads) * self.attention(i)[1]
            out.append(Matrix(f"model.layers.{i}.self_attn.q_proj", queries))
            out.append(Matrix(f"model.layers.{i}.self_attn.o_proj", queries))
            out.append(Matrix(f"model.layers.{i}.mlp", 3 * hidden * int(text.intermediate_size)))
        return tuple(out)

    def copies(self, marlin: bool, memory: float, drafter: bool) -> float:
        """The NVFP4 copy of a head that is read whole; a head by centroids has none."""
        whole = self.head_rows == int(self.text.vocab_size) and self.weights != "float32"
        return self.head_bytes * WEIGHT_BYTES["nvfp4"] / WEIGHT_BYTES["bf16"] if whole else 0.0

    def read_bytes(self, tokens: int) -> float:
        whole = super().read_bytes(tokens) - self.head_bytes
        rows = min(int(self.text.vocab_size), self.head_rows * tokens)
        return whole + self.head_bytes * rows / int(self.text.vocab_size)


def fields(raw: dict[str, Any], text: Any) -> dict[str, int]:
    """What :class:`Assistant` has beside a model's own fields, of a ``gemma4_assistant`` config."""
    vocab, rows = int(text.vocab_size), int(text.vocab_size)
    if raw.get("use_ordered_embeddings"):
        centroids = int(raw.get("num_centroids", 2048))
        rows = centroids + vocab // centroids * int(raw.get("centroid_intermediate_top_k", 32))
    return {"backbone": int(raw.get("backbone_hidden_size", 1536)), "head_rows": rows}
