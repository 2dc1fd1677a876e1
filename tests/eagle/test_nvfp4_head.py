"""An EAGLE3 head in ModelOpt's NVFP4, with a vocabulary and an output head of its own that stay unquantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForCausalLM

from tests.eagle.reference_head import AUX_LAYERS, ReferenceHead, save_head
from tests.eagle.test_heads import FULL, LENGTHS, SLIDING, TOKENS, K, plain
from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.recorder import Recorder
from vllm_gemma4_spec.checkpoints import nvfp4

DRAFT_VOCABULARY = 256


def own_vocabulary(folder: Path) -> Path:
    """Every second token of the target's, as heads trained on frequent tokens have them."""
    g = torch.Generator().manual_seed(11)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(DRAFT_VOCABULARY, 64, generator=g) / 8
    tensors["d2t"] = torch.arange(DRAFT_VOCABULARY)  # token i is the target's 2 i
    tensors["t2d"] = torch.arange(512) % 2 == 0
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"draft_vocab_size": DRAFT_VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantized(folder: Path, out: Path, algorithm: str) -> Path:
    """``folder``'s layers in NVFP4; ``folder`` itself gets the weights that this rounds them to."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    packed, rounded = dict(tensors), dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        member = name.rpartition(".self_attn.")[0] or name
        group = [n for n in tensors if n.startswith(member) and n[-13:-12] + "_proj" in ("q_proj", "k_proj", "v_proj")]
        scale_2 = max(float(tensors[n].abs().max()) for n in (group if name in group else [name])) / 2688
        factor = torch.tensor(scale_2)
        scale = nvfp4.block_scale(weight, factor)
        base = name.removesuffix("weight")
        packed |= {name: nvfp4.encode(weight, scale, factor), f"{base}weight_scale": scale}
        packed[f"{base}weight_scale_2"] = factor
        if algorithm == "NVFP4":
            packed[f"{base}input_scale"] = torch.tensor(0.01)
        rounded[name] = nvfp4.dequantize(packed[name], scale, factor)
    save_file(packed, out / "model.safetensors")
    save_file(rounded, folder / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    section = {"quant_algo": algorithm, "quant_method": "modelopt", "ignore": ["lm_head"]}
    section["producer"] = {"name": "modelopt", "version": "0.47.0"}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return out


@pytest.mark.parametrize("algorithm", ["NVFP4", pytest.param("W4A16_NVFP4", marks=pytest.mark.slow)])
def test_it_drafts_as_its_reference(tiny: dict[str, Path], tmp_path: Path, algorithm: str) -> None:
    folder = own_vocabulary(save_head(tmp_path / "head", "eagle3", [SLIDING, FULL], [32, 32], "LlamaForCausalLMEagle3"))
    head = quantized(folder, tmp_path / "nvfp4", algorithm)
    want = plain(tiny["target"])
    with engine(tiny["target"], head, K, speculative={"method": "eagle3"}) as llm:
        recorder, before = Recorder(llm), acceptance(llm)
        assert generate(llm, random_prompts(LENGTHS), TOKENS) == want
        assert (acceptance(llm) - before).proposed > 0
    target = Gemma4ForCausalLM.from_pretrained(tiny["target"], dtype=torch.float32).eval()
    reference = ReferenceHead(folder, target.get_input_embeddings().weight.detach())
    assert recorder.given
    for given in recorder.given:
        with torch.no_grad():
            seen = target.model(torch.tensor([given.context[:-1]]), output_hidden_states=True)
            hidden = torch.cat([seen.hidden_states[i][0] for i in AUX_LAYERS], -1)
        assert given.draft == reference.draft(given.context, hidden, K)
        assert all(token % 2 == 0 for token in given.draft)
