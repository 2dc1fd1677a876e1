"""The network of a Gemma 4 assistant, as transformers' ``gemma4_assistant`` computes it.

One pass takes a token and a hidden state of the target's width and gives the next of both: the embedding (the
target's own, scaled) and the hidden state are concatenated and projected down to the assistant's width; four Gemma 4
layers with queries alone follow, which read the keys and values of the target's last sliding and last full layer; the
head is tied to the assistant's own embedding matrix, and the normed state, projected up, is the next hidden state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.gemma4 import Gemma4MLP

from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.mtp import donors, interface
from vllm_gemma4_spec.mtp.centroids import CentroidHead
from vllm_gemma4_spec.performance import compile_settings, head_norms


class AssistantAttention(nn.Module):
    """Queries alone; keys and values are the donor's, normed and rotated by the target."""

    def __init__(self, vllm_config: VllmConfig, index: int, donor: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        quant_config = vllm_config.quant_config
        kind = config.layer_types[index]
        heads, self.head_dim = config.num_attention_heads, donor.head_size
        self.num_heads = heads // get_tensor_model_parallel_world_size()
        name = f"model.layers.{index}.self_attn"  # as in the checkpoint: its quantization may leave layers out
        self.q_proj = ColumnParallelLinear(
            config.hidden_size,
            heads * self.head_dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{name}.q_proj",
            return_bias=False,
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{name}.o_proj",
            return_bias=False,
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim,
            # The target's positions are what the assistant is given, whatever its own maximum length.
            max_position=max(config.max_position_embeddings, vllm_config.model_config.max_model_len),
            rope_parameters=dict(config.rope_parameters[kind]),
            is_neox_style=True,
        )
        if compile_settings.marked(vllm_config, head_norms.MARK):
            suited = head_norms.turns(self.rotary_emb, self.head_dim) and head_norms.norms(self.q_norm, weighted=True)
            head_norms.take(self, (self.num_heads, 0, self.head_dim), suited, vllm_config)
        # Queries are normalised: no further scale.
        self.attn = donors.attention(donor, self.num_heads, 1.0, vllm_config.cache_config, f"{prefix}.attn")

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        q = self.q_proj(hidden_states)
        if getattr(self, head_norms.OURS, False):
            table, weight, eps = self.rotary_emb.cos_sin_cache, self.q_norm.weight, self.q_norm.variance_epsilon
            operator = torch.ops.vllm.gemma4_spec_norm_heads
            q = operator(q, positions, table, weight, weight, self.num_heads, 0, eps).view_as(q)
        else:
            q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2, -1)
            q, _ = self.rotary_emb(positions, q)
        return self.o_proj(self.attn(q, None, None))


class AssistantLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, index: int, donor: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.self_attn = AssistantAttention(vllm_config, index, donor, f"{prefix}.self_attn")
        self.mlp = Gemma4MLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_activation,
            vllm_config.quant_config,
            f"model.layers.{index}.mlp",
        )
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            setattr(self, name, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.self_attn(positions, self.input_layernorm(hidden_states))
        hidden_states = self.post_attention_layernorm(hidden_states) + residual
        residual = hidden_states
        hidden_states = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        hidden_states = self.post_feedforward_layernorm(hidden_states) + residual
        return hidden_states * self.layer_scalar


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0})
class AssistantModel(nn.Module):
    """A pass up to the head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config, quant_config = vllm_config.model_config, vllm_config.quant_config
        config, backbone = model_config.hf_text_config, model_config.hf_config.backbone_hidden_size
        of_kind = donors.find(vllm_config)
        # Set after loading: the target's embedding, which the assistant shares.
        self.embed_tokens: nn.Module | None = None
        self.register_buffer("normalizer", torch.tensor(backbone**0.5), persistent=False)
        self.pre_projection = ReplicatedLinear(
            2 * backbone,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix="pre_projection",
            return_bias=False,
        )
        self.layers = nn.ModuleList(
            AssistantLayer(vllm_config, i, of_kind[kind], f"{prefix}.layers.{i}")
            for i, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_projection = ReplicatedLinear(
            config.hidden_size,
            backbone,
            bias=False,
            quant_config=quant_config,
            prefix="post_projection",
            return_bias=False,
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        assert self.embed_tokens is not None
        return self.embed_tokens(input_ids) * self.normalizer

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([self.embed_input_ids(input_ids), hidden_states], dim=-1)
        hidden_states = self.pre_projection(inputs)
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        hidden_states = self.norm(hidden_states)
        return hidden_states, self.post_projection(hidden_states)


class Gemma4MTP(interface.Gemma4MTP):
    """An assistant: what ``Gemma4MTPModel`` names."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, text = vllm_config.model_config.hf_config, vllm_config.model_config.hf_text_config
        self.config = config
        self.model = AssistantModel(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.centroid_head: CentroidHead | None = None
        self.lm_head: nn.Module | None = None
        if config.use_ordered_embeddings:
            # Every rank holds all of it: what a pass reads of it is a hundredth, chosen by the hidden state.
            self.centroid_head = CentroidHead(
                text.vocab_size, text.hidden_size, config.num_centroids, config.centroid_intermediate_top_k
            )
        else:
            self.lm_head = ParallelLMHead(
                text.vocab_size, text.hidden_size, quant_config=vllm_config.quant_config, prefix="lm_head"
            )
            self.logits_processor = LogitsProcessor(text.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            input_ids: ``[num_reqs]``.
            positions: ``[num_reqs]`` int64.
            hidden_states: ``[num_reqs, backbone_hidden_size]``.

        Returns:
            ``[num_reqs, hidden_size]`` for the head and ``[num_reqs, backbone_hidden_size]`` for the next pass.
        """
        return self.model(input_ids, positions, hidden_states)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        if self.centroid_head is not None:
            return self.centroid_head.logits(hidden_states)
        return self.logits_processor(self.lm_head, hidden_states)

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """``[num_reqs, hidden_size]`` -> ``[num_reqs]`` int64, the likeliest tokens."""
        if self.centroid_head is not None:
            return self.centroid_head.argmax(hidden_states)
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        known: dict[str, Tensor] = dict(self.named_parameters()) | dict(self.named_buffers())
        loaded: set[str] = set()
        for name, weight in weights:
            ours, shard = self._place(name)
            parameter = known.get(ours)
            if parameter is None:
                raise CheckpointError(f"assistant: {name} is no tensor of a Gemma 4 assistant's network")
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, weight, *shard)
            loaded.add(ours)
        if self.centroid_head is not None:
            if "centroid_head.token_ordering" not in loaded:
                raise CheckpointError("assistant: masked_embedding.token_ordering is missing; download the file again")
            self.centroid_head.order()
        return loaded

    def _place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A checkpoint's name -> ours, and the part of a merged matrix."""
        if name.startswith(("pre_projection.", "post_projection.")):
            return f"model.{name}", ()
        if name.startswith("masked_embedding."):
            return name.replace("masked_embedding.", "centroid_head.").replace("centroids.weight", "centroids"), ()
        head = "centroid_head" if self.centroid_head is not None else "lm_head"
        for theirs in ("model.embed_tokens.", "lm_head."):
            if name.startswith(theirs):
                return f"{head}.{name.removeprefix(theirs)}", ()
        for i, part in enumerate(("gate_proj", "up_proj")):
            if f".{part}." in name:
                return name.replace(part, "gate_up_proj"), (i,)
        return name, ()
