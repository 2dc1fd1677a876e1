"""The KV cache groups of one drafter, and the adapters that give each of them its own metadata.

``SpecDecodeBaseProposer.propose`` builds metadata for every entry of ``draft_attn_groups`` through
``get_metadata_builder().build_for_drafting(common_attn_metadata, draft_index)`` before it asks for the
slot mapping (0.19.1, both in the first pass and in every further draft step), with ``positions`` already
those of the pass. So an adapter in the builder's place can swap in its group's block table and slots.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.spec_decode.invariants import check_pass
from vllm_gemma4_spec.spec_decode.slot_mapping import PADDING_SLOT_ID, group_slot_mappings

# Metadata of these backends depends on the group only through these two fields, so one build serves
# every group of the same spec. FlashInfer's, for one, is derived from the block table and is rebuilt.
_SHAREABLE = {"TritonAttentionMetadata", "CPUAttentionMetadata", "FlashAttentionMetadata"}


@dataclass
class GroupBuilder:
    """Stands where ``propose`` looks for an ``AttentionMetadataBuilder``."""

    groups: DraftGroups
    index: int
    builder: Any

    @property
    def kv_cache_spec(self) -> Any:
        return self.builder.kv_cache_spec

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> Any:
        if self.index == 0:
            self.groups.start_pass(common_attn_metadata)
        return self.groups.build(self.index, common_attn_metadata, draft_index)


class DraftGroups:
    """Slot mapping buffers, block tables and metadata builders of a drafter that spans several groups.

    Args:
        proposer: the drafter; its ``positions`` buffer says where the tokens of a pass stand.
        runner: the model runner; its input batch holds the block table of every KV cache group.
        attn_groups: attention groups of the draft layers, each with one metadata builder.
        block_sizes: tokens in a kernel block, per KV cache group id.
    """

    def __init__(
        self, proposer: Any, runner: Any, attn_groups: Sequence[AttentionGroup], block_sizes: Sequence[int]
    ) -> None:
        self._proposer = proposer
        self._runner = runner
        self._check = settings.CHECK.on()
        # KV cache group ids in use; several attention groups may share one (other backend or head size).
        self._gids = sorted({g.kv_cache_group_id for g in attn_groups})
        self._block_sizes = [block_sizes[gid] for gid in self._gids]
        # Persistent, so that CUDA graphs see the same addresses; -1, so that a dummy run writes nowhere.
        self._slots = torch.full(
            (len(self._gids), proposer.max_num_tokens), PADDING_SLOT_ID, dtype=torch.int64, device=proposer.device
        )
        self._num_slots = 0  # tokens of the pass being prepared; 0 when there is none
        self._row = [self._gids.index(g.kv_cache_group_id) for g in attn_groups]
        self._built: dict[tuple[Any, ...], Any] = {}
        self.attn_groups = [
            replace(g, metadata_builders=[GroupBuilder(self, i, g.get_metadata_builder())])
            for i, g in enumerate(attn_groups)
        ]
        self.builders = [g.get_metadata_builder() for g in attn_groups]

    @functools.cached_property
    def slot_kernel(self) -> Any:
        """Fills all groups' slots at once; None without a GPU.

        Made when first used: with sleep mode, what is allocated together with the KV cache loses its contents.
        """
        if self._proposer.device.type != "cuda":
            return None
        from vllm_gemma4_spec.kernels.slot_mapping import GroupSlotKernel

        return GroupSlotKernel(self._block_sizes, self._slots)

    def block_tables(self, num_reqs: int) -> list[torch.Tensor]:
        # Looked up each time: the runner makes a new input batch after the drafter's groups are known.
        tables = self._runner.input_batch.block_table
        return [tables[gid].get_device_tensor(num_reqs) for gid in self._gids]

    def start_pass(self, cad: CommonAttentionMetadata) -> None:
        """Fill every group's slots for the pass that ``cad`` describes (host-side; no device sync)."""
        num_tokens, num_reqs = cad.num_actual_tokens, cad.num_reqs
        positions = self._proposer._get_positions(num_tokens)
        self._tables = self.block_tables(num_reqs)
        positions = positions if positions.dim() == 1 else positions[0]  # M-RoPE: alike for text
        if self.slot_kernel is not None:
            self.slot_kernel.bind(self._tables)
            self.slot_kernel(cad.query_start_loc, num_reqs, positions, cad.slot_mapping)
        else:
            group_slot_mappings(
                self._tables,
                self._block_sizes,
                positions,
                cad.query_start_loc[1 : num_reqs + 1],
                self._proposer.arange[:num_tokens],
                cad.slot_mapping[:num_tokens],
                self._slots,
            )
        self._num_slots = num_tokens
        self._pass = cad
        self._built.clear()
        if self._check:
            check_pass(self._runner, self._gids, cad, positions, self._slots[:, :num_tokens])

    def build(self, index: int, cad: CommonAttentionMetadata, draft_index: int) -> Any:
        """Metadata of one attention group; built once per distinct spec and then shared."""
        row, builder = self._row[index], self.builders[index]
        own = copy.copy(cad)
        own.block_table_tensor = self._tables[row]
        own.slot_mapping = self._slots[row, : cad.num_actual_tokens]
        key = (type(builder), builder.kv_cache_spec)
        made = self._built.get(key)
        if made is None:
            made = builder.build_for_drafting(common_attn_metadata=own, draft_index=draft_index)
            if type(made).__name__ in _SHAREABLE:
                self._built[key] = made
            return made
        return replace(made, block_table=own.block_table_tensor, slot_mapping=own.slot_mapping)

    def build_for_last_tokens(self, positions: torch.Tensor, layers: set[str]) -> dict[str, Any]:
        """Metadata, by layer, for each request's last token alone, in the pass that :meth:`start_pass` has begun.

        Args:
            positions: ``[requests]`` int64, where those tokens stand.
            layers: names of the layers that the pass is for; they write no KV.
        """
        cad, num_reqs = self._pass, self._pass.num_reqs
        own = replace(
            cad,
            query_start_loc=self._proposer.arange[: num_reqs + 1],
            query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32),
            # Rejected tokens may follow a request's last one. Past the longest context `cad.seq_lens` is the limit.
            seq_lens=torch.minimum(cad.seq_lens, (positions + 1).to(cad.seq_lens.dtype)),
            num_actual_tokens=num_reqs,
            max_query_len=1,
            _seq_lens_cpu=None,
            _num_computed_tokens_cpu=None,
            _num_computed_tokens_cache=None,
        )
        self._built.clear()
        found: dict[str, Any] = {}
        for index, group in enumerate(self.attn_groups):
            if names := layers.intersection(group.layer_names):
                found |= dict.fromkeys(names, self.build(index, own, draft_index=0))
        return found

    def slot_mapping(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """Layer name -> ``[num_tokens]`` int64 view; padding beyond the pass's tokens is -1."""
        self._slots[:, self._num_slots : num_tokens] = PADDING_SLOT_ID
        # A dummy run asks without a pass before it: everything is padding then.
        self._num_slots = 0
        return {
            name: self._slots[row, :num_tokens]
            for row, group in zip(self._row, self.attn_groups, strict=True)
            for name in group.layer_names
        }
