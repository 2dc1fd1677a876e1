"""Exports tiny Gemma 4 models with llm-compressor; run by the interpreter of an environment that has it.

python tests/checkpoints/export_with_llmcompressor.py OUT NAME ...        NAME: <kind>[-mm]-<scheme>
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.checkpoints import tiny


def export(name: str, out: Path) -> None:
    import transformers
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models

    kind, _, scheme = name.partition("-")
    multimodal, scheme = scheme.startswith("mm-"), scheme.removeprefix("mm-")
    source = out / f"{name}-source"  # it reads the model's own folder while it saves
    tiny.build(kind, multimodal).save_pretrained(source)
    family = transformers.Gemma4ForConditionalGeneration if multimodal else transformers.Gemma4ForCausalLM
    model = family.from_pretrained(source, dtype="auto")
    words = {f"w{i}": i for i in range(tiny.VOCAB)}
    processor = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", unk_token="w3"
    )
    ids = tiny.calibration()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    calibrated = {"dataset": data, "max_seq_length": ids.shape[1], "num_calibration_samples": len(ids)}
    kept = ["lm_head", "re:.*vision_tower.*", "re:.*embed_vision.*", "re:.*router.*"]
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=kept)
    oneshot(model=model, processor=processor, recipe=recipe, **(calibrated if scheme == "NVFP4" else {}))
    model.save_pretrained(out / name, save_compressed=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        export(name, Path(sys.argv[1]))
