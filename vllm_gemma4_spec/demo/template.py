"""The demo's chat template, and prompts written with it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from vllm_gemma4_spec.demo.data import Dialogue


@lru_cache(maxsize=1)
def chat_template() -> str:
    """Our own Jinja template for Gemma 4's wire format; the tests compare it with the published one."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def prompt_text(dialogue: Dialogue) -> str:
    """The prompt that a chat server makes of the dialogue, up to where the model is to answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        conversations=[dialogue.messages],
        tools=dialogue.tools or None,
        chat_template=chat_template(),
        bos_token="<bos>",
        add_generation_prompt=True,
        enable_thinking=dialogue.thinking,
    )
    return str(text)
