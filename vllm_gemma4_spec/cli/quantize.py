"""``vllm-gemma4-spec quantize``: NVFP4 with ModelOpt, without the NaN scales that it writes before 0.45."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_gemma4_spec.errors import CheckpointError, SettingError


def command(
    src: Annotated[Path, typer.Argument(help="Folder of the bf16 Gemma 4 checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="nvfp4, awq-lite, awq-clip, awq-full, svdquant, w4a16 or mixed."),
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", help="A card's memory, as in 24GiB: choose the recipe that fits it.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Text or JSON lines to calibrate on; else a few built-in texts."),
    ] = None,
    python: Annotated[
        Path | None, typer.Option("--python", help="Interpreter of an environment that has nvidia-modelopt.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print inspect's JSON object of the result.")] = False,
) -> None:
    """Quantize SRC into OUT, on the GPU or, slowly, on the CPU; the result has no NaN block scale.

    An MTP assistant is written without ModelOpt, with --recipe w4a16. OUT
    appears when it is complete. Exit code: 0 written, 2 bad input, no ModelOpt
    or no space.

    Example: vllm-gemma4-spec quantize ./gemma-4-31B-it ./nvfp4 --recipe awq-full --calibration prompts.jsonl
    """
    import vllm_gemma4_spec
    from vllm_gemma4_spec.checkpoints import sizing
    from vllm_gemma4_spec.checkpoints.recipes import RECIPES
    from vllm_gemma4_spec.cli import _checks

    if (recipe is None) == (fit is None):
        raise SettingError("give one of --recipe and --fit")
    if recipe is not None and recipe not in RECIPES:
        raise SettingError(f"--recipe {recipe}: expected one of {', '.join(RECIPES)}")
    memory = sizing.read_size(fit) if fit is not None else 0
    source = _checks.checkpoint(src)  # a wrong folder is named before ModelOpt is imported
    _checks.new_folder("OUT", out)
    towers = True
    if source.config.get("model_type") == "gemma4_assistant":
        if recipe != "w4a16":
            raise SettingError(f"{src} is an MTP assistant: give --recipe w4a16; it needs no calibration")
        from vllm_gemma4_spec.checkpoints import assistants

        assistants.quantize(source, out)
        _show(out, as_json)
        return
    if recipe is None:
        choice = sizing.choose(source, memory)
        recipe, towers = choice.recipe, choice.towers
        kept = "" if towers else ", without towers"
        typer.echo(f"--fit {fit}: {recipe}{kept}, about {choice.bytes / 2**30:.2f} GiB", err=True)
    interpreter = str(python or sys.executable)
    if shutil.which(interpreter) is None:
        raise SettingError(f"--python {interpreter}: no such program; name a Python that has nvidia-modelopt")
    root = str(Path(vllm_gemma4_spec.__file__).parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    arguments = [str(src), str(out), recipe, str(calibration or ""), *([] if towers else ["--no-towers"])]
    # A process of its own also here: ModelOpt changes transformers, and prints on stdout.
    process = subprocess.Popen(
        [interpreter, "-m", "vllm_gemma4_spec.checkpoints.quantizer", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=sys.stderr if not as_json else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = "the quantizer ended without a word"
    for line in process.stderr or ():  # ModelOpt's own progress, shown as it comes
        last = line.strip() or last
        if not as_json and sys.stderr.isatty():
            sys.stderr.write(line)
    if process.wait():
        missing = re.fullmatch(r"ModuleNotFoundError: No module named '(\w+)[\w.]*'", last)
        if missing:
            advice = "in the checkout, pip install '.[quantize]', or name another with --python"
            raise SettingError(f"quantize needs {missing[1]}, which {interpreter} does not have: {advice}")
        raise CheckpointError(last.removeprefix("vllm-gemma4-spec: "))
    _show(out, as_json)


def _show(out: Path, as_json: bool) -> None:
    """What was written."""
    from vllm_gemma4_spec.checkpoints.files import Checkpoint
    from vllm_gemma4_spec.checkpoints.inspection import inspect
    from vllm_gemma4_spec.cli._progress import shards

    made = Checkpoint(out)
    with shards("checking", len(made.files), quiet=as_json) as step:
        report = inspect(made, step)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        typer.echo(f"{report.algorithm}, {report.bytes / 1e9:.2f} GB, no NaN block scale: {out}")
