"""Runs ModelOpt, 0.42.0 or newer, on a Gemma 4 model, on GPU or CPU, and writes a checkpoint without NaN scales.

Also a program (``python -m vllm_gemma4_spec.checkpoints.quantizer SRC OUT RECIPE CALIBRATION [--no-towers]``), so that
the command line can run it with the interpreter of another environment; CALIBRATION may be empty.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.recipes import RECIPES as RECIPES
from vllm_gemma4_spec.checkpoints.repairing import new_folder
from vllm_gemma4_spec.errors import CheckpointError

# Kept in the model's own dtype, as vLLM builds them without quantization.
_EXCLUDED = ("*vision_tower*", "*embed_vision*", "*audio_tower*", "*embed_audio*")


def fake_quantize(x: Tensor, block_size: int, amax: Tensor, *_: Any) -> Tensor:
    """What ModelOpt's CUDA kernel does to a tensor: NVFP4 with dynamic block scales, back in ``x``'s dtype.

    Takes the arguments of ``dynamic_block_quantize_op``; the formats after ``amax`` must be E2M1 and E4M3.
    """
    scale_2 = amax.float().amax() / (nvfp4.CODE_MAX * nvfp4.SCALE_MAX)
    scale_2 = torch.where(scale_2 > 0, scale_2, torch.full_like(scale_2, 1e-12))
    blocks = x.float().unflatten(-1, (-1, block_size))
    scale = (blocks.abs().amax(-1) / (nvfp4.CODE_MAX * scale_2)).clamp(max=nvfp4.SCALE_MAX).to(torch.float8_e4m3fn)
    step = scale.float() * scale_2
    step = torch.where(step >= 1e-5, step, torch.ones_like(step))  # the kernel's guard
    one = torch.ones((), device=x.device)
    codes = nvfp4.encode(blocks.flatten(-2), step, one)
    table = torch.tensor(nvfp4.E2M1, device=x.device)
    values = table[nvfp4.unpack(codes).int()].unflatten(-1, (-1, block_size))
    return (values * step.unsqueeze(-1)).flatten(-2).to(x.dtype)


def _clamped(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``NVFP4QTensor.get_weights_scaling_factor`` with the clamp that 0.42.0 lacks."""

    @functools.wraps(original)
    def clamped(*args: Any, keep_high_precision: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
        scale, scale_2 = original(*args, keep_high_precision=True, **kwargs)
        if not keep_high_precision:
            scale = scale.nan_to_num(nan=1.0).clamp(max=nvfp4.SCALE_MAX).to(torch.float8_e4m3fn)
        return scale, scale_2

    return clamped


@contextmanager
def modelopt_fixed(*, clamp: bool = True) -> Iterator[None]:
    """ModelOpt able to run without CUDA and, with ``clamp``, unable to write a NaN block scale, as before 0.45."""
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    tensor_class = nvfp4_tensor.NVFP4QTensor
    changes: list[tuple[Any, str, Any]] = []
    if not torch.cuda.is_available():
        changes += [(tensor_quant, "dynamic_block_quantize_op", fake_quantize)]
        changes += [(nvfp4_tensor, "fp4_compatible", lambda: False)]
    if clamp and not hasattr(nvfp4_tensor, "_cast_per_block_scale_to_fp8"):  # 0.45 and later clamp themselves
        method = "get_weights_scaling_factor"
        changes += [(tensor_class, method, staticmethod(_clamped(getattr(tensor_class, method))))]
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _add(rules: Any, pattern: str, numbers: dict[str, Any] | None) -> None:
    """Quantizers that match ``pattern`` get ``numbers``, or are switched off; later rules win.

    ModelOpt 0.42 has an object of patterns, 0.45 and later a list of rules.
    """
    if isinstance(rules, dict):
        rules[pattern] = {"enable": False} if numbers is None else {**numbers, "enable": True}
    else:
        rules.append({"quantizer_name": pattern, **({"enable": False} if numbers is None else {"cfg": numbers})})


def quantize(model: Any, recipe: str, forward: Callable[[Any], None], rank: int | None = None) -> Any:
    """Quantize ``model`` in place with ModelOpt's configuration for ``recipe`` and return it.

    ``forward`` runs the calibration text through the model it is given; ``rank`` is SVDQuant's (ModelOpt: 32).
    """
    import modelopt.torch.quantization as mtq

    if not hasattr(mtq, RECIPES[recipe]):
        raise CheckpointError(
            f"recipe {recipe}: this ModelOpt has no {RECIPES[recipe]}; install nvidia-modelopt 0.47.0"
        )
    config = copy.deepcopy(getattr(mtq, RECIPES[recipe]))
    if recipe == "mixed":
        for quantizer in ("weight", "input"):
            _add(config["quant_cfg"], f"*self_attn*{quantizer}_quantizer", {"num_bits": (4, 3), "axis": None})
    for pattern in _EXCLUDED:
        _add(config["quant_cfg"], pattern, None)
    if rank is not None and recipe == "svdquant":
        config["algorithm"]["lowrank"] = rank
    return mtq.quantize(model, config, forward)


def export(model: Any, folder: str) -> None:
    """Write the quantized ``model`` as ModelOpt's Hugging Face export does."""
    from modelopt.torch.export import export_hf_checkpoint

    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=folder)


# Enough to see every layer work; a real calibration set is the user's own text.
SAMPLE = (
    "The ferry leaves at seven in the morning and takes forty minutes to reach the far shore of the lake.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    return ordered[middle]",
    "Explain in two sentences why the sky is blue, and then why sunsets are red.",
    "La receta lleva tres huevos, un vaso de leche y una pizca de sal; se deja reposar media hora.",
    "Sum the first hundred odd numbers. Each partial sum is a square, so the answer is 100 * 100 = 10000.",
    "Berlin, 1932. Ein Reporter steigt aus dem Zug und merkt, dass niemand ihn erwartet.",
)
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_LENGTH = 512  # tokens of a calibration text that are used


def read_calibration(file: Path) -> list[str | list[int]]:
    """A text a line; or JSON lines with ``text``, ``prompt`` or ``turns``, or lists of token ids.

    Raises:
        CheckpointError: the file cannot be read or a line has none of these.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as text ({error})") from None
    if not lines:
        raise CheckpointError(f"{file}: holds no calibration text")
    return [_calibration_line(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]


def _calibration_line(line: str, where: str) -> str | list[int]:
    if line.lstrip()[0] not in "{[":
        return line
    try:
        value = json.loads(line)
    except ValueError:
        return line  # text that happens to begin so
    if isinstance(value, dict):
        turns = value.get("turns")
        joined = "\n".join(map(str, turns)) if isinstance(turns, list) else ""
        value = value.get("text") or value.get("prompt") or joined
    whole = isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, int) for v in value))
    if not value or not whole:
        raise CheckpointError(
            f"{where}: expected text, a JSON object with text, prompt or turns, or a list of token ids"
        )
    return value


def _load(folder: Path, towers: bool = True) -> Any:
    """The model in the class its config names, in its own dtype, on the GPU if there is one.

    Without ``towers`` it is the language model of a multimodal one, in the text class.
    """
    import transformers

    checkpoint = Checkpoint(folder)
    if checkpoint.quantized or checkpoint.quantization:
        raise CheckpointError(f"{folder}: quantized already; name the bf16 checkpoint")
    name = (checkpoint.config.get("architectures") or [""])[0]
    if checkpoint.config.get("model_type") == "gemma4_assistant":
        raise CheckpointError(
            f"{folder}: an MTP assistant; `vllm-gemma4-spec quantize --recipe w4a16` writes it without ModelOpt"
        )
    kind = getattr(transformers, name, None) if name.startswith("Gemma4") else None
    if kind is None:
        raise CheckpointError(f"{folder}: architecture {name or 'missing'}; expected a Gemma 4 model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(folder, dtype="auto").eval().to(device)
    return model if towers or not hasattr(model.config, "text_config") else _text_only(model)


def _text_only(model: Any) -> Any:
    """``Gemma4ForCausalLM`` around the language model and head of a ``Gemma4ForConditionalGeneration``."""
    from transformers import Gemma4ForCausalLM

    config = model.config.text_config
    config.tie_word_embeddings, config.architectures = model.config.tie_word_embeddings, ["Gemma4ForCausalLM"]
    with torch.device("meta"):
        text = Gemma4ForCausalLM(config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.generation_config = model.generation_config
    return text.eval()


def _forward(folder: Path, texts: list[str | list[int]]) -> Callable[[Any], None]:
    ids = [text for text in texts if isinstance(text, list)]
    if len(ids) < len(texts):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder}: no tokenizer ({reason}); calibrate with lists of token ids") from None
        ids += [tokenizer(text)["input_ids"] for text in texts if isinstance(text, str)]

    def forward(model: Any) -> None:
        for tokens in ids:
            model(input_ids=torch.tensor([tokens[:_LENGTH]], device=model.device))

    return forward


def run(source: Path, out: Path, recipe: str, calibration: Path | None = None, towers: bool = True) -> None:
    """Quantize ``source`` into ``out``, which appears when it is complete and free of NaN scales.

    ``towers``: keep those of a multimodal model; without them the result answers text alone.

    Raises:
        CheckpointError: bad input, ModelOpt is not installed, no space, or the result is not clean.
    """
    from vllm_gemma4_spec.checkpoints.inspection import inspect

    if importlib.util.find_spec("modelopt") is None:
        raise CheckpointError(
            "nvidia-modelopt is not installed here; pip install nvidia-modelopt==0.42.0, "
            "or name the interpreter of an environment that has it with --python"
        )
    texts: list[str | list[int]] = [*SAMPLE] if calibration is None else read_calibration(calibration)
    forward = _forward(source, texts)
    model = _load(source, towers)
    with new_folder(out) as partial:
        with torch.no_grad(), modelopt_fixed():
            quantize(model, recipe, forward)
            export(model, str(partial))
        for file in source.iterdir():  # tokenizer, chat template, processors
            wanted = file.suffix in (".json", ".jinja", ".model") and not file.name.endswith(".index.json")
            dropped = not towers and file.name in _PROCESSORS
            if file.is_file() and wanted and not dropped and not (partial / file.name).exists():
                shutil.copy2(file, partial / file.name)
        report = inspect(Checkpoint(partial))
        if not report.clean or report.algorithm is None:
            raise CheckpointError(f"{out}: ModelOpt left {report.nan_blocks} NaN block scales; nothing was written")


if __name__ == "__main__":
    try:
        source, target, name, texts, *rest = sys.argv[1:]
        run(Path(source), Path(target), name, Path(texts) if texts else None, towers="--no-towers" not in rest)
    except CheckpointError as error:
        sys.exit(f"vllm-gemma4-spec: {error}")
