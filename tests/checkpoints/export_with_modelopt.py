"""Exports tiny Gemma 4 models with ModelOpt; run by its own interpreter, see docs/how-to/checkpoints.md.

    python tests/checkpoints/export_with_modelopt.py OUT [NAME ...]

NAME is ``[wide-]<kind>[-mm]-<recipe>[-clamped]``; none means all but the wide ones. ``--fixtures`` writes the few
that the repository holds. ``bf16`` as the recipe writes the parent; ``wide`` models have the genuine head sizes.
"""

from __future__ import annotations

import sys
import warnings
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.checkpoints import tiny
from vllm_gemma4_spec.checkpoints import quantizer

RANK = 8  # keeps SVDQuant's fixtures small; ModelOpt's own default is 32
FIXTURES = (
    "31b-nvfp4",
    "31b-awq-full",
    "31b-svdquant",
    "e4b-awq-lite",
    "e4b-awq-clip",
    "26b-mm-awq-lite",
)
WIDE = ("wide-31b-awq-full", "wide-31b-awq-clip", "wide-31b-svdquant", "wide-e4b-awq-lite", "wide-26b-awq-lite")
PINNED = tuple(recipe for recipe in quantizer.RECIPES if recipe != "w4a16")  # what ModelOpt 0.42.0 has
CLIPPING = ("awq-clip", "awq-full")  # the recipes that write NaN scales without the clamp


def names() -> list[str]:
    out = []
    for kind, mm, recipe in product(tiny.KINDS, ("", "-mm"), ("bf16", *PINNED)):
        out.append(f"{kind}{mm}-{recipe}")
        if recipe in CLIPPING:
            out.append(f"{kind}{mm}-{recipe}-clamped")
    return out


def export(name: str, folder: Path) -> None:
    kind, _, recipe = name.removesuffix("-clamped").removeprefix("wide-").partition("-")
    multimodal = recipe.startswith("mm-")
    recipe = recipe.removeprefix("mm-")
    model = tiny.build(kind, multimodal, wide=name.startswith("wide-"))
    if recipe == "bf16":
        model.save_pretrained(folder)
        return
    with quantizer.modelopt_fixed(clamp=name.endswith("-clamped")):
        quantizer.quantize(model, recipe, lambda m: [m(input_ids=row[None]) for row in tiny.calibration()], RANK)
        quantizer.export(model, str(folder))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out, *wanted = sys.argv[1:]
    for name in (*FIXTURES, *WIDE) if wanted == ["--fixtures"] else (wanted or names()):
        export(name, Path(out, name))
