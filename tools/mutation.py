"""Removes the lines of patches one at a time: for each, a test must fail.

    python -m tools.mutation [MODULE[:LINE,LINE...] ...] [--jobs N] [--seconds N]

vLLM is imported once; each removal runs in a fork of that process, on the module's own fast tests, in a copy of the
checkout without the statement: processes that tests start import it from there, too. A removal that no test notices is
printed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import forks
from tools.forks import PACKAGE

ROOT = Path(__file__).parents[1]
COPIES = ROOT / "build" / "mutation"
LIMIT = 120  # seconds of one run, or twice what the module takes as it is; a removal that makes a test hang is found
WHOLE = 1200  # seconds of a module as it is
# Module -> the tests (below ``tests``) that are to notice.
MODULES: dict[str, list[str]] = {
    "performance.argmax": ["kernels/test_patches.py"],
    "performance.draft_graphs": [
        "performance/test_draft_replay.py::test_a_capture_runs_the_original_on_inputs_of_its_own",
        "performance/test_draft_replay.py::test_padding_stands_in_the_null_block_and_the_batch_where_it_was",
        "performance/test_draft_replay.py::test_batches_that_no_graph_fits",
        "performance/test_draft_replay.py::test_batch_sizes_follow_the_targets_and_thin_out",
        "performance/test_draft_capture.py",
    ],
    "performance.graph_capture": ["performance/test_draft_capture.py"],
    "performance.split_attention": [
        "performance/test_split_attention.py::test_what_fits",
        "performance/test_split_attention.py::test_one_token_per_request_and_image_prefixes_are_left_alone",
        "performance/test_split_attention.py::test_launches_by_layer_and_batch",
        "performance/test_split_attention.py::test_launches_with_a_cache_in_fp8",
        "performance/test_split_attention.py::test_few_queries_run_this_packages_kernel",
        "performance/test_split_attention.py::test_a_full_layer_gets_segments_and_their_scratch",
        "performance/test_split_attention.py::test_numbers_reach_the_kernels_and_no_later_launch",
        "performance/test_split_attention.py::test_dtypes_of_the_cache",
        "performance/test_split_attention.py::test_what_the_kernel_does_not_know_is_left_to_vllm",
        "performance/test_split_attention.py::test_engines_out_of_scope_or_without_a_number_are_left_to_vllm",
        "performance/test_split_attention.py::test_a_first_call_within_a_graph_makes_no_memory",
        "performance/test_split_attention.py::test_a_kernel_that_does_not_compile_is_one_line",
        "performance/test_split_attention.py::test_cards_and_settings",
        "performance/test_split_attention.py::test_few_queries_of_a_small_drafter_run_over_clusters",
        "performance/test_split_attention.py::test_a_full_layer_of_one_query_a_request_runs_over_clusters",
        "performance/test_split_attention.py::test_other_batches_do_not_run_over_clusters",
        "performance/test_split_attention.py::test_several_queries_of_a_full_layer_do_not_run_over_clusters",
        "performance/test_split_attention.py::test_a_kernel_over_clusters_is_not_loaded_within_a_graph",
        "performance/test_split_attention.py::test_without_the_kernel_over_clusters_two_stay_and_the_log_says_so",
        "performance/test_split_attention.py::test_a_builder_in_scope_marks_its_scratch",
        "performance/test_split_attention.py::test_builders_have_one_scratch_and_it_is_the_gemms",
        "kernels/test_patches.py::test_a_verification_splits_the_context",
        "kernels/test_patches.py::test_another_models_verification_is_left_as_it_is",
    ],
    "performance.cache_write": ["performance/test_cache_write.py"],
    "performance.first_pass_slots": ["performance/test_first_pass_slots.py"],
    "performance.last_tokens": ["performance/test_last_tokens.py"],
    "performance.step_slots": ["performance/test_step_slots.py"],
    "performance.table_copies": ["performance/test_table_copies.py"],
    "performance.greedy_sampling": ["performance/test_greedy_sampling.py"],
    "performance.step_indices": ["performance/test_step_indices.py"],
    "performance.draft_graph_key": ["performance/test_draft_graph_key.py"],
    "performance.compiled_at_start": ["performance/test_compiled_at_start.py"],
    "performance.soft_cap": ["performance/test_soft_cap.py"],
    "performance.head_norms": ["performance/test_head_norms.py"],
    "performance.heads_into_cache": ["performance/test_heads_into_cache.py"],
    "performance.per_layer_gather": ["performance/test_per_layer_gather.py"],
    "performance.compile_settings": [
        "performance/test_launch_early.py",
        "performance/test_draft_compile.py",
        "performance/test_target_compile.py",
    ],
    "requests.thinking": ["requests/test_thinking.py", "requests/test_grammar_positions.py"],
    "requests.thinking_budget": ["requests/test_thinking.py", "requests/test_step_cost.py"],
    "requests.min_tokens": ["requests/test_min_tokens.py", "requests/test_thinking.py", "requests/test_step_cost.py"],
    "requests.grammar": [
        "requests/test_grammar_positions.py::test_a_rollback_leads_to_where_it_was",
        "requests/test_grammar_positions.py",
    ],
    "requests.structured_output": ["requests/test_grammar_positions.py"],
    "requests.channel": ["requests/test_prompt_channel.py", "requests/test_grammar_positions.py"],
    "requests.stop_strings": ["requests/test_stop_strings.py"],
    "requests.allowed_tokens": ["requests/test_allowed_tokens.py"],
    "requests.validation": ["requests/test_validation.py"],
    "requests.responses_stream": ["requests/test_responses.py"],
    "scheduling.admission": [
        "scheduling/test_admission.py",
        "scheduling/test_long_prompts.py::test_a_pool_too_small_lowers_the_maximum_length",
        "scheduling/test_no_deadlock.py",
    ],
    "spec_decode.config_validation": ["spec_decode/test_config_validation.py"],
    "multimodal.segments": ["multimodal/test_segments.py"],
    "metrics.reports": ["metrics/test_api_servers.py", "metrics/test_reports.py"],
    "patching.failure": ["patching/test_failures.py"],
    "patching.engine": ["patching/test_patcher.py", "patching/test_failures.py", "patching/test_engine.py"],
}


class _Without(ast.NodeTransformer):
    """Replaces the statement with the given number by ``pass``."""

    def __init__(self, number: int) -> None:
        self.number, self.count, self.line, self.inside = number, 0, 0, 0

    def visit(self, node: ast.AST) -> Any:
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if self.inside and isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.If)):
            nothing = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not nothing:
                self.count += 1
                if self.count == self.number:
                    self.line = node.lineno
                    return ast.copy_location(ast.Pass(), node)
        self.inside += function
        self.generic_visit(node)
        self.inside -= function
        return node


def mutants(source: str) -> Iterator[tuple[int, ast.Module]]:
    """Each removal: the line, and the module without its statement."""
    number = 1
    while True:
        without = _Without(number)
        tree = without.visit(ast.parse(source))
        if not without.line:
            return
        yield without.line, ast.fix_missing_locations(tree)
        number += 1


@contextlib.contextmanager
def _copy(module: str, tree: ast.Module | None) -> Iterator[Path]:
    """The checkout, with ``tree`` in place of a module."""
    copy = COPIES / str(os.getpid())
    copy.mkdir(parents=True)
    try:
        for each in ROOT.iterdir():
            if each.name in (PACKAGE, "tests"):
                shutil.copytree(each, copy / each.name, copy_function=os.link)
            elif each.name != "build":
                (copy / each.name).symlink_to(each)
        if tree is not None:
            file = copy / _file(module).relative_to(ROOT)
            file.unlink()  # not the original, which it was a link to
            file.write_text(ast.unparse(tree))
        yield copy
    finally:
        shutil.rmtree(copy)


@dataclass
class _Run:
    """A fork that runs the tests of a module, without one statement or as it is."""

    module: str
    line: int
    child: int
    since: float
    until: float

    def survived(self) -> bool | None:
        """Whether all tests passed; None while they run."""
        done, status = os.waitpid(self.child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() < self.until:
            return None
        forks.end(self.child)
        shutil.rmtree(COPIES / str(self.child), ignore_errors=True)
        if self.line:
            seconds = self.until - self.since
            print(f"{_name(self.module)}:{self.line}: not done after {seconds:.0f} s, taken for noticed", flush=True)
        return False


def start(module: str, line: int, tree: ast.Module | None, seconds: float) -> _Run:
    import pytest

    def work() -> int:
        with _copy(module, tree) as copy:
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            paths = [str(copy / "tests" / t) for t in MODULES[module]]
            return int(pytest.main(["-x", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *paths]))

    child = forks.fork(work)
    now = time.monotonic()
    return _Run(module, line, child, now, now + seconds)


def _name(module: str) -> str:
    return f"{PACKAGE}.{module}"


def _file(module: str) -> Path:
    return ROOT / PACKAGE / f"{module.replace('.', '/')}.py"


def _removals(wanted: list[str]) -> Iterator[tuple[str, int, ast.Module | None]]:
    """First every module as it is, then each removal."""
    modules = {m.partition(":")[0]: m.partition(":")[2] for m in wanted}
    for module in modules:
        yield module, 0, None
    for module, lines in modules.items():
        only = {int(line) for line in lines.split(",") if line}
        for at, tree in mutants(_file(module).read_text()):
            if not only or at in only:
                yield module, at, tree


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("modules", nargs="*", default=list(MODULES), metavar="MODULE[:LINE,...]")
    ap.add_argument("--jobs", type=int, default=1, help="removals tried at a time")
    ap.add_argument("--seconds", type=float, default=float("inf"), help="stop after this much processor time")
    args = ap.parse_args()
    forks.preload()
    counts: dict[str, dict[str, int]] = {}
    running: list[_Run] = []
    broken: set[str] = set()
    took: dict[str, float] = {}

    def finish(at_most: int) -> None:
        while len(running) > at_most:
            for run in running[:]:
                survived = run.survived()
                if survived is None:
                    continue
                running.remove(run)
                if not run.line:
                    took[run.module] = time.monotonic() - run.since
                    if not survived:
                        broken.add(run.module)
                        print(f"{run.module}: its tests fail as it is, {took[run.module]:.0f} s", flush=True)
                    continue
                counts[run.module]["unnoticed" if survived else "noticed"] += 1
                if survived:
                    file = _file(run.module)
                    text = file.read_text().splitlines()[run.line - 1].strip()
                    print(f"{file.relative_to(ROOT)}:{run.line}: no test fails without: {text}", flush=True)
            forks.hold_servers()
            time.sleep(0.05)

    def report() -> None:
        """The counts of the module whose removals were tried last."""
        finish(0)
        for module, each in list(counts.items())[-1:]:
            print(f"{module}: {_said(each)}", flush=True)

    for module, line, tree in _removals(args.modules):
        if line and module not in counts:
            report()  # and what fails as it is shows nothing
            counts[module] = {"noticed": 0, "unnoticed": 0, "not run": 0}
        if module in broken:
            continue
        if _processor_seconds() >= args.seconds:
            if line:
                counts[module]["not run"] += 1
            continue
        running.append(start(module, line, tree, max(LIMIT, 2 * took[module]) if line else WHOLE))
        finish(args.jobs - 1)
    report()
    total = {key: sum(each[key] for each in counts.values()) for key in ("noticed", "unnoticed", "not run")}
    print(f"{_said(total)}, {_processor_seconds():.0f} s of processor time")
    return 1 if total["unnoticed"] or broken else 0


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def _processor_seconds() -> float:
    """Of the tests."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    raise SystemExit(main())
