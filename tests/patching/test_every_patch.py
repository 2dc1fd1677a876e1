"""Every patch names the tests that show what stock vLLM 0.19.1 does, and those that only pass with the patch."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fresh import run_after_vllm
from tests.support.stock import LEAVE_OUT
from vllm_gemma4_spec.registry import PATCHES
from vllm_gemma4_spec.settings import patch_switch

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Shown:
    """``folder/file::test[case]`` below ``tests``: one of stock vLLM, and one that fails there.

    ``fails``: what the latter says without the patch, a pattern in pytest's lines about the error. Any other failure
    (a module that is missing, a fixture that broke) proves nothing. ``spawns``: vLLM makes ranks in processes of their
    own, which the patch's switch reaches.
    """

    stock: str
    proof: str
    fails: str
    spawns: bool = False


_STOCK = "patching/test_stock"
_GRAPHS = "performance/test_draft_capture"
_KERNELS = "kernels/test_patches"
_REQUESTS = "requests/test_requests_engine"

SHOWN = {
    "transformers-version": Shown(
        "startup/test_transformers_version::test_stock_asks_for_no_release",
        "startup/test_transformers_version::test_a_gemma_4_does_not_start[5.24.0]",
        r"DID NOT RAISE",
    ),
    "patch-failures": Shown(
        "patching/test_failures::test_stock_makes_an_engine_whatever_has_failed",
        "patching/test_failures::test_no_engine_is_made_once_a_patch_has_failed",
        r"DID NOT RAISE",
    ),
    "engine-checks": Shown(
        "engine/test_checks::test_stock_takes_every_setting",
        "engine/test_checks::test_the_v2_model_runner",
        r"DID NOT RAISE",
    ),
    "config-form": Shown(
        f"{_STOCK}::test_sizes_by_layer_are_not_read",
        "quantization/test_config_form::test_logprobs_equal_the_reference[26b-mm-awq-lite]",
        r"Error",
    ),
    "draft-groups": Shown(
        f"{_STOCK}::test_draft_layers_in_several_groups_are_refused",
        "spec_decode/test_draft_groups::test_a_model_as_its_own_drafter_accepts_every_draft[target-3-plain-half]",
        r"All drafting layers should belong to the same kv cache group",
    ),
    "own-blocks": Shown(
        "spec_decode/test_own_blocks::test_stock_writes_drafts_where_the_request_owns_nothing",
        "spec_decode/test_own_blocks::test_first_step_looks_ahead",
        r"would be written to block \d+, which it does not own",
    ),
    "kv-shared-layers": Shown(
        f"{_STOCK}::test_a_saved_e4b_lacks_weights_that_nothing_reads",
        "engine/test_truth::test_logits_are_those_of_transformers[drafter]",
        r"weights were not initialized from checkpoint.*k_norm",
    ),
    "one-group-windows": Shown(
        f"{_STOCK}::test_one_group_takes_one_window",
        "spec_decode/test_draft_groups::test_another_drafter_changes_no_token[drafter-3-one-group]",
        r"must have the same window size",
    ),
    "text-drafter": Shown(
        f"{_STOCK}::test_a_multimodal_target_is_refused_with_a_draft_model",
        "multimodal/test_images::test_towers_of_a_drafter_are_neither_built_nor_loaded",
        r"does not support multimodal models yet",
    ),
    "chunk-boundaries": Shown(
        "eagle/test_heads::test_stock_follows_a_chunk_with_the_prompts_last_token",
        "eagle/test_heads::test_a_head_drafts_as_its_reference[eagle3-two-groups-chunked-prefill]",
        r"where False = any\(",
    ),
    "length-limit": Shown(
        "spec_decode/test_max_length::test_without_the_patch_acceptance_decays",
        "spec_decode/test_max_length::test_every_draft_is_accepted_beside_a_request_that_ends_at_the_limit",
        r"= Acceptance\(.*\)\.accepted",
    ),
    "drafter-checks": Shown(
        f"{_STOCK}::test_a_drafter_that_does_not_fit_is_not_named_in_one_line",
        "spec_decode/test_config_validation::test_folder_without_config",
        r"Invalid repository ID",
    ),
    "prefix-hits": Shown(
        f"{_STOCK}::test_a_block_of_every_hit_is_dropped_beside_an_eagle_head",
        "eagle/test_heads::test_prefix_hits_are_those_of_plain_decoding[eagle3-two-groups]",
        r"assert",
    ),
    "acceptance-watch": Shown(
        "spec_decode/test_invariants::test_stock_says_nothing_about_acceptance",
        "spec_decode/test_invariants::test_a_drafter_that_knows_nothing_is_reported",
        r"_gemma4_spec_acceptance",
    ),
    "skipped-drafts": Shown(
        "metrics/test_reports::test_stock_counts_no_dropped_draft",
        "metrics/test_reports::test_drafts_skipped_are_the_requests_that_were_not_drafted_for",
        r"assert 0 > 0",
    ),
    "long-prompts": Shown(
        "scheduling/test_no_deadlock::test_stock_waits_for_ever",
        "scheduling/test_no_deadlock::test_every_request_ends",
        r"assert|Error",
    ),
    "waiting-requests": Shown(
        "scheduling/test_no_deadlock::test_stock_waits_in_silence",
        "scheduling/test_no_deadlock::test_a_request_that_waits_is_named_once",
        r"assert",
    ),
    "embedder-norm": Shown(
        "multimodal/test_images::test_stock_projects_before_it_normalises",
        "multimodal/test_images::test_logits_after_images_are_those_of_transformers",
        r"assert .* < ",
    ),
    "image-attention": Shown(
        "multimodal/test_image_attention::test_stock_attends_causally",
        "multimodal/test_image_attention::test_logits_after_images_are_those_of_transformers[one-image]",
        r"= max\(",
    ),
    "image-turns": Shown(
        "multimodal/test_image_turns::test_stock_lets_all_wait_behind_an_image",
        "multimodal/test_image_turns::test_an_image_and_what_is_behind_it_wait_a_few_steps[False]",
        r"assert",
    ),
    "image-sizes": Shown(
        "multimodal/test_image_sizes::test_stock_takes_one_resolution",
        "multimodal/test_image_sizes::test_several_resolutions_one_image_at_a_time",
        r"Error",
    ),
    "mtp-assistant": Shown(
        "mtp/test_mtp_validation::test_stock_does_not_know_assistants",
        "mtp/test_mtp_validation::test_the_method_is_mtp_given_or_not",
        r"gemma4_assistant|Gemma4Assistant",
    ),
    "mtp-scheduling": Shown(
        "mtp/test_stock_scheduling::test_stock_scheduling_stops_before_the_maximum_length",
        "mtp/test_drafts::test_drafts_go_on_to_the_maximum_length[31b]",
        r"assert 249 > \(",
    ),
    "mtp-checks": Shown(
        "mtp/test_mtp_validation::test_stock_takes_another_targets_assistant",
        "mtp/test_mtp_validation::test_another_targets_assistant",
        r"DID NOT RAISE",
    ),
    "lora-aliases": Shown(
        "lora/test_lora::test_stock_ignores_the_adapter",
        "lora/test_lora::test_requests_with_and_without_an_adapter[target]",
        r"\]\] != \[\[",
    ),
    "lora-adapters": Shown(
        f"{_STOCK}::test_the_class_of_published_checkpoints_takes_no_adapter",
        "lora/test_multimodal::test_an_adapter_gives_the_merged_models_answers",
        r"LoRA",
    ),
    "draft-argmax": Shown(
        f"{_KERNELS}::test_stock_computes_every_logit",
        f"{_KERNELS}::test_the_drafters_argmax_takes_two_passes",
        r"all logits",
    ),
    "whole-copies": Shown(
        f"{_STOCK}::test_a_whole_drafter_beside_several_ranks_is_refused",
        "engine/test_tensor_parallel::test_a_whole_drafter_on_each_rank[target]",
        r"Error|exception",
        spawns=True,
    ),
    "draft-graphs": Shown(
        f"{_GRAPHS}::test_stock_drafts_kernel_by_kernel",
        f"{_GRAPHS}::test_captured_drafts_are_replayed",
        r"object has no attribute",
    ),
    "draft-pieces": Shown(
        f"{_GRAPHS}::test_stock_gives_a_draft_model_no_piecewise_graphs",
        f"{_GRAPHS}::test_vllms_own_method_gives_a_draft_model_piecewise_graphs",
        r"assert \[\] == \[",
    ),
    "adaptive-k": Shown(
        "performance/test_adaptive_k::test_stock_runs_every_pass_whatever_is_accepted",
        "performance/test_adaptive_k::test_answers_are_those_of_plain_decoding[drafter]",
        r"\* 0\.5\) < 0",
    ),
    "async-drafts": Shown(  # it asserts both
        "performance/test_async_drafts::test_the_window_of_the_real_length_keeps_its_blocks",
        "performance/test_async_drafts::test_the_window_of_the_real_length_keeps_its_blocks",
        r"where False = all\(",
    ),
    "local-argmax": Shown(
        f"{_STOCK}::test_local_argmax_ends_the_engine",
        "performance/test_local_argmax::test_local_argmax_drafts_the_same_tokens",
        r"get_top_tokens",
    ),
    "draft-compile": Shown(
        "performance/test_draft_compile::test_stock_compiles_a_drafter_as_the_target",
        "performance/test_draft_compile::test_a_drafter_has_compiler_settings_of_its_own",
        r"enable_pdl",
    ),
    "draft-graph-key": Shown(
        "performance/test_draft_graph_key::test_stock_runs_the_graph_of_the_drafter_before",
        "performance/test_draft_graph_key::test_a_drafter_runs_its_own_graph",
        r"assert \[6.0, 6.0\] == \[6.0, 10.0\]",
        spawns=True,
    ),
    "target-compile": Shown(
        "performance/test_target_compile::test_stock_compiles_a_target_without_dependent_launch",
        "performance/test_target_compile::test_a_target_is_compiled_with_dependent_launch",
        r"enable_pdl",
    ),
    "fused-all-reduce": Shown(
        "performance/test_fused_all_reduce::test_stock_leaves_two_norms_behind_an_all_reduce",
        "performance/test_fused_all_reduce::test_an_all_reduce_takes_the_norms_behind_it",
        r"all_reduce",
    ),
    "per-layer-gather": Shown(
        "performance/test_per_layer_gather::test_stock_gathers_per_layer_inputs_by_an_all_gather",
        "performance/test_per_layer_gather::test_one_operator_gathers_per_layer_inputs",
        r"assert \['vllm.all_gather'\] ==",
    ),
    "split-attention": Shown(
        f"{_KERNELS}::test_stock_walks_the_context_in_one_piece",
        f"{_KERNELS}::test_a_verification_splits_the_context",
        r"kernel_unified_attention_2d",
    ),
    "cache-write": Shown(
        "performance/test_cache_write::test_stock_waits_for_all_before",
        "performance/test_cache_write::test_a_layer_in_scope_writes_early",
        r"stock",
    ),
    "first-pass-slots": Shown(
        "performance/test_first_pass_slots::test_stock_finds_slots_with_pytorchs_functions",
        "performance/test_first_pass_slots::test_one_kernel_finds_a_first_passs_slots",
        r"assert False|\[\]",
    ),
    "last-tokens": Shown(
        "performance/test_last_tokens::test_stock_runs_all_layers_for_all_tokens",
        "performance/test_last_tokens::test_shared_layers_see_the_last_tokens_alone",
        r"assert \(410, 410\) == \(410, 4\)",
    ),
    "step-slots": Shown(
        "performance/test_step_slots::test_stock_launches_a_kernel_a_group",
        "performance/test_step_slots::test_one_launch_finds_the_slots_of_all_groups",
        r"assert \(2, 0\) == \(0, 1\)",
    ),
    "table-copies": Shown(
        "performance/test_table_copies::test_stock_copies_each_table",
        "performance/test_table_copies::test_one_launch_copies_the_tables_of_all_groups",
        r"assert \(2, \[\]\) == \(0, \[False\]\)",
    ),
    "greedy-sampling": Shown(
        "performance/test_greedy_sampling::test_stock_copies_the_logits_first",
        "performance/test_greedy_sampling::test_two_kernels_sample_greedily",
        r"assert \[\] == \['tokens', 'verdict'\]",
    ),
    "step-indices": Shown(
        "performance/test_step_indices::test_stock_copies_indices_each_step",
        "performance/test_step_indices::test_a_step_like_the_last_has_its_indices",
        r"assert \[False, False",
    ),
    "compiled-at-start": Shown(
        "performance/test_compiled_at_start::test_stock_compiles_while_requests_wait",
        "performance/test_compiled_at_start::test_nothing_is_compiled_while_requests_wait",
        r"assert \d+ == 0",
    ),
    "soft-cap": Shown(
        "performance/test_soft_cap::test_stock_caps_with_three_kernels",
        "performance/test_soft_cap::test_one_kernel_caps_logits",
        r"assert 0 == 1",
    ),
    "head-norms": Shown(
        "performance/test_head_norms::test_stock_norms_heads_one_by_one",
        "performance/test_head_norms::test_one_operator_norms_heads",
        r"assert 0 == 1",
    ),
    "heads-into-cache": Shown(
        "performance/test_heads_into_cache::test_stock_writes_the_cache_behind_the_heads",
        "performance/test_heads_into_cache::test_the_kernel_of_the_heads_writes",
        r"assert 0 == 1",
    ),
    "expert-routing": Shown(
        "performance/test_expert_routing::test_stock_chooses_with_pytorchs_functions",
        "performance/test_expert_routing::test_one_kernel_chooses_on_a_gpu",
        r"assert False|isinstance",
    ),
    "cpu-runner": Shown(
        f"{_STOCK}::test_the_cpu_refuses_speculation",
        "spec_decode/test_own_blocks::test_first_step_looks_ahead",
        r"spec decode is not supported",
    ),
    "cpu-kernels": Shown(
        f"{_STOCK}::test_triton_kernels_cannot_be_launched_on_a_cpu",
        "spec_decode/test_own_blocks::test_first_step_looks_ahead",
        # What a launch ends in without Triton, with it, and with it where vLLM puts a stand-in in its place.
        r"object is not subscriptable|0 active drivers|module 'triton' has no attribute",
    ),
    "draft-products": Shown(
        f"{_KERNELS}::test_stock_loads_a_drafter_as_any_model",
        f"{_KERNELS}::test_a_drafters_activation_is_part_of_its_gemm",
        r"assert \[\] == \[True\]",
    ),
    "modelopt-nvfp4": Shown(
        "quantization/test_nvfp4_config::test_undo_gives_vllm_its_class_back",
        "quantization/test_nvfp4_engine::test_logprobs_equal_the_reference",
        r"ModelOpt currently only supports",
    ),
    "kv-scales": Shown(
        "quantization/test_kv_scales::test_the_kernel_drops_the_scales_of_fp8_queries",
        "quantization/test_kv_scales::test_scales_are_loaded_and_applied[target-]",
        r"assert .* is None",
    ),
    "compressed-nvfp4": Shown(
        "quantization/test_nvfp4_compressed_tensors::test_stock_has_no_nvfp4_on_a_cpu",
        "quantization/test_nvfp4_compressed_tensors::test_logprobs_equal_the_reference[26b-True]",
        r"NVFP4|FP4",
    ),
    "cpu-moe-gelu": Shown(
        f"{_STOCK}::test_experts_on_a_cpu_do_not_know_gelu",
        "quantization/test_nvfp4_engine::test_experts_in_nvfp4",
        r"MoEActivation\.GELU is not supported",
    ),
    "grammar-positions": Shown(
        f"{_REQUESTS}::test_stock_vllm_forgets_grammar_budget_and_stop_strings",
        f"{_REQUESTS}::test_constrained_text_fits_its_constraint[near-3]",
        r"\('(choice|regex|json|grammar)', \d+",
    ),
    "thinking-budget": Shown(
        f"{_REQUESTS}::test_stock_vllm_forgets_grammar_budget_and_stop_strings",
        f"{_REQUESTS}::test_budgets_are_kept[near-3]",
        r"assert \d+ == \d+",
    ),
    "min-tokens": Shown(
        f"{_REQUESTS}::test_stock_vllm_forgets_grammar_budget_and_stop_strings",
        f"{_REQUESTS}::test_every_answer_is_that_of_plain_decoding[self-5]",
        r"\('least 8', 5\)",
    ),
    "allowed-tokens": Shown(
        "requests/test_allowed_tokens::test_stock_leaves_them_to_another_request",
        "requests/test_allowed_tokens::test_each_request_keeps_its_own",
        r"\('c', \[3, 4\]\)",
    ),
    "stop-strings": Shown(
        f"{_REQUESTS}::test_stock_vllm_forgets_grammar_budget_and_stop_strings",
        f"{_REQUESTS}::test_the_stop_string_that_ends_first_ends_the_answer[near-3]",
        r"assert (None|'.*') == '",
    ),
    "responses-schema": Shown(
        "requests/test_responses::test_stock_dies_before_the_first_event",
        "requests/test_responses::test_a_stream_is_the_whole_answer",
        r"validation errors for ResponseCreatedEvent",
    ),
    "request-errors": Shown(
        "requests/test_validation::test_stock_names_no_field",
        "requests/test_validation::test_what_is_refused_is_named",
        r"ValueError: Grammar error: Invalid type: nothing",  # without the field's name
    ),
    "chat-output": Shown(
        "chat/test_serving::test_stock_is_wrong",
        "chat/test_server_e2e::test_openai_chat_completions",
        r"First\. Second\.",
    ),
    "error-paths": Shown(
        "chat/test_leaks::test_stock_tells_clients_where_it_is_installed",
        "chat/test_leaks::test_errors_carry_no_path_and_no_internals",
        r"AssertionError: \('/v1/",
    ),
    "server-figures": Shown(
        "metrics/test_api_servers::test_stock_shows_what_the_files_hold_and_no_more",
        "metrics/test_api_servers::test_metrics_beside_those_of_the_files",
        r"KeyError: 'gemma4_spec_process'",
    ),
}


def node(test: str) -> str:
    file, _, name = test.partition("::")
    return f"{TESTS / file}.py::{name}"


def test_every_patch_names_its_tests_and_they_exist() -> None:
    assert list(SHOWN) == [p.name for p in PATCHES]
    for shown in SHOWN.values():
        for test in (shown.stock, shown.proof):
            file, name = node(test).split("::")
            functions = [n.name for n in ast.parse(Path(file).read_text()).body if isinstance(n, ast.FunctionDef)]
            assert name.partition("[")[0] in functions, test


def test_every_wrapper_names_its_patch_its_evidence_and_the_related_change() -> None:
    from tools import wrapper_docs

    for path, paragraphs in wrapper_docs.wanted().items():
        assert wrapper_docs.written(path.read_text(), paragraphs) == path.read_text(), f"make ledger: {path}"


@pytest.mark.slow
@pytest.mark.parametrize("patch", SHOWN)
def test_the_proof_fails_without_the_patch(patch: str) -> None:
    """In a process that never applies it, whatever asks for it; all other patches are on."""
    switch = {patch_switch(patch).name: "0"} if SHOWN[patch].spawns else {}
    # An example that fails is enough: the smallest takes minutes.
    options = ["-x", "-q", "-p", "tests.support.stock", "-p", "no:cacheprovider", "--hypothesis-profile", "unshrunk"]
    code = f"import pytest, sys; sys.exit(pytest.main({[*options, node(SHOWN[patch].proof)]!r}))"
    done = run_after_vllm(code, **{LEAVE_OUT: patch}, **switch)
    if re.match(r"\d+ skipped\b", done.stdout.splitlines()[-1]):
        pytest.skip(f"its proof is skipped here: {SHOWN[patch].proof}")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    said = "\n".join(line for line in done.stdout.splitlines() if line.startswith("E  "))
    assert re.search(SHOWN[patch].fails, said), said[-3000:]
    assert re.search(r"^1 (failed|error)", done.stdout.splitlines()[-1]), done.stdout[-500:]
