"""One decision on device, dtype, quantization and attention, printed; and what PEFT and TRL leave open."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import SettingsError, UserError, find_path, is_main_process, is_notebook
from helpers.models import chat as chat_formats
from helpers.runs.run import read_run
from helpers.settings.fields import RunSettings

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


DEMO = "--recipe recipes/demo.yaml"
LARGEST_ON_CPU = 3.0  # billions of parameters; above it one step takes minutes


def is_sharded() -> bool:
    """Whether accelerate was launched with DeepSpeed or FSDP."""
    return any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("DEEPSPEED", "FSDP"))


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """How a model is loaded and computed with here."""

    device: str
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None
    attn_implementation: str
    bf16: bool
    fp16: bool

    @property
    def device_args(self) -> dict[str, Any]:
        """What TrainingArguments is told of a CPU. DeepSpeed finds it by itself, and is told how to talk."""
        if self.device != "cpu":
            return {}
        return {"ddp_backend": "gloo"} if is_sharded() else {"use_cpu": True}

    @property
    def optimizer(self) -> str:
        """AdamW with 8-bit state that pages to the CPU's memory on a GPU, PyTorch's own elsewhere and when sharded."""
        return "paged_adamw_8bit" if self.device == "cuda" and not is_sharded() else "adamw_torch"

    @property
    def device_map(self) -> dict[str, Any] | None:
        """The whole model on this process's device: "auto" would spread it over GPUs, which training refuses.

        None where DeepSpeed or FSDP decides what goes where.
        """
        if is_sharded():
            return None
        return {"": int(os.environ.get("LOCAL_RANK", "0")) if self.device == "cuda" else self.device}

    def as_dict(self) -> dict[str, str]:
        """The decision in words, for run.json."""
        bits = "none"
        if self.quantization is not None:
            bits = "4-bit NF4, double" if self.quantization.load_in_4bit else "8-bit"
        return {
            "device": self.device,
            "weights": str(self.dtype).removeprefix("torch."),
            "computed in": "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32",
            "quantization": bits,
            "attention": self.attn_implementation,
        }

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*self.as_dict(), box=None, pad_edge=False)
        table.add_row(*self.as_dict().values())
        return table


def plan_model(
    model_id: str,
    tuning: str = "lora",
    quantization: str = "auto",
    attn_implementation: str = "auto",
    given: Mapping[str, Any] | None = None,
) -> LoadPlan:
    """Decide, from what this machine has, how `model_id` is loaded for `tuning` (that of 02_dpo.py, or "none").

    Weights that are themselves trained stay in float32, with bfloat16 autocast where the hardware has it; others are
    loaded in bfloat16 on a GPU. bfloat16 by emulation counts as none: float16 is used there, and flash-attention, which
    needs the same generation of GPU, is not; without that package its kernel comes from the Hub, where `kernels` is
    installed. `given` are TRL's fields that were given by hand: use_cpu is heeded. Raises UserError where a model of
    this size needs a GPU and there is none.
    """
    import torch
    from transformers import BitsAndBytesConfig

    use_cpu = (given or {}).get("use_cpu", False)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator and not use_cpu else "cpu"
    if device == "cuda":
        _refuse_several_gpus()
    _refuse_large_model_on_cpu(model_id, device)
    bf16 = device == "xpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    fp16 = device == "cuda" and not bf16
    compute = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    if quantization == "auto":
        quantization = "4bit" if tuning == "qlora" else "none"
    config = None
    if quantization == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=compute,  # what FSDP needs, and without a cost elsewhere
        )
    elif quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    if attn_implementation == "auto":
        flash = device == "cuda" and bf16 and any(map(importlib.util.find_spec, ("flash_attn", "kernels")))
        attn_implementation = "flash_attention_2" if flash else "sdpa"
    dtype = torch.float32 if tuning == "full" else compute
    return LoadPlan(device, dtype, config, attn_implementation, bf16, fp16)


def _refuse_large_model_on_cpu(model_id: str, device: str) -> None:
    """Before anything is downloaded: the size is read from the name, as in Mistral-7B or Mixtral-8x7B."""
    name = model_id.rpartition("/")[2].replace("_", "-")
    size = re.search(r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", name)
    billions = int(size[1] or 1) * float(size[2]) if size else 0.0
    if device == "cpu" and billions > LARGEST_ON_CPU and find_path(model_id) is None:
        raise UserError(
            f"{model_id} needs a GPU (24 GB for the defaults) and this machine has none. "
            f'On a laptop: {DEMO}, or in a notebook the line recipe = "recipes/demo.yaml".'
        )


def _refuse_several_gpus() -> None:
    """One process would see them all, and the Trainer would wrap the model in nn.DataParallel, which TRL refuses."""
    import torch

    if "WORLD_SIZE" not in os.environ and (n := torch.cuda.device_count()) > 1:
        words = "notebooks/..." if is_notebook() else shlex.join(sys.argv)
        raise UserError(
            f"{n} GPUs are visible to one process: set CUDA_VISIBLE_DEVICES=0 to use one of them, or use all with: "
            f"accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes {n} {words}"
        )


def adopt_adapter_settings(folder: Path, settings: RunSettings) -> dict[str, Any]:
    """adapter_config.json of an adapter that is trained further; its rank, scale and targets replace the settings'.

    Raises SettingsError where one given by hand differs (a recipe's are for the adapters that it makes itself), or
    where all weights were to be trained.
    """
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    if settings.values()["tuning"] == "full":
        raise SettingsError(f"--tuning full, but {folder.name} is an adapter: it can only be trained further as one")
    name = str(settings.values().get("chat_template"))
    new = chat_formats.TEMPLATE_TOKENS.get(name, ())
    known = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*token*.json"))
    if any(token not in known for token in new):
        raise SettingsError(
            f"--chat_template {name} needs {', '.join(new)}, which the adapter in {folder.name} was trained without: "
            "give it to 01_sft.py"
        )
    before = read_run(folder).get("settings", {})
    theirs = {"lora_r": config["r"], "lora_alpha": config["lora_alpha"]}
    theirs["lora_target_modules"] = before.get("lora_target_modules", config["target_modules"])
    theirs["use_rslora"] = config.get("use_rslora", False)
    theirs["lora_modules_to_save"] = tuple(config.get("modules_to_save") or ())
    tuning, dora = settings.values()["tuning"], config.get("use_dora", False)
    if (tuning == "dora") != dora and tuning != "qlora":  # on 4-bit weights either is qlora
        theirs["tuning"] = "dora" if dora else "lora"
    for name, value in theirs.items():
        by_hand = not settings.sources.get(name, "default").startswith(("default", "recipe"))
        # a DoRA adapter may be trained further by --tuning lora: what that says is that the base is not quantized
        if by_hand and (given := getattr(settings, name)) != value and not (name == "tuning" and dora):
            raise SettingsError(f"--{name} {given}, but the adapter in {folder.name} has {value}: leave it out")
    settings.override("parent", **theirs)
    return config


def check_modules_to_save(model: torch.nn.Module, names: tuple[str, ...]) -> list[str] | None:
    """LoraConfig's modules_to_save. Raises SettingsError for a name of no module, which PEFT takes without a word."""
    have = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in names:
        if name not in have:
            raise SettingsError(
                f"--lora_modules_to_save {name} is the name of no module; there are {', '.join(sorted(have))}"
            )
    return list(names) or None


def upcast_adapter(model: torch.nn.Module) -> None:
    """Undo TRL's cast of QLoRA adapters to bfloat16 (trl 1.16, dpo_trainer.py and sft_trainer.py, __init__).

    Where TRL keeps a frozen copy under "ref", the values are taken from there: the cast had rounded them.
    """
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight.requires_grad:
            exact = weights.get(re.sub(r"\.default(?=\.|$)", ".ref", name), weight)
            weight.data = exact.data.float().clone()


def disable_cpu_4bit_repacking(model: torch.nn.Module) -> None:
    """On a CPU, compute 4-bit layers in evaluation as in training.

    bitsandbytes 0.50 (nn/modules.py, Linear4bit.forward) repacks a layer for AVX512-BF16 at its first evaluation, and
    leaves it so: from then on its output is rounded to bfloat16, and no gradient passes through it in training.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False


def save_model(trainer: Any, folder: Path) -> None:
    """Save the tokenizer, and the model or the trained adapter: TRL's save_model adds the frozen "ref" copy to that.

    Every process of a launch takes part: under ZeRO-3 and FSDP each holds a piece of the weights.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        # rows of added tokens are in the adapter: the embeddings need not be saved whole for their sake
        whole = "auto" if model.peft_config["default"].trainable_token_indices is None else False
        if is_main_process():
            model.save_pretrained(
                str(folder), selected_adapters=["default"], state_dict=state, save_embedding_layers=whole
            )
    else:
        trainer.save_model(str(folder))
    if is_main_process():
        trainer.processing_class.save_pretrained(folder)


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokens beyond the model's vocabulary a row each in embeddings and LM head: the mean of all others.

    The same base and tokenizer always give the same rows, so an adapter that replaces them (`token_rows`) finds the
    base that it was trained on.
    """
    from peft.utils.other import TrainableTokensWrapper

    # trl 1.16 (trainer/utils.py, add_fused_lm_head) asks the LM head for its bias, which peft 0.21's wrapper has not
    bias = property(lambda wrapper: getattr(wrapper.original_module, "bias", None))
    TrainableTokensWrapper.bias = bias  # type: ignore[attr-defined]
    before = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if len(tokenizer) <= before:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            with _gathered(layer.weight) as weight:
                weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


@contextlib.contextmanager
def _gathered(weight: Any) -> Iterator[torch.Tensor]:
    """The data of a weight; under ZeRO-3, where each process holds a piece, put together and shared out again."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            yield weight.data
    else:
        yield weight.data


def trainable_token_indices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> dict[str, list[int]] | None:
    """`trainable_token_indices` for PEFT: the rows of `tokens` in the embeddings and, where it is not tied to them, in
    the LM head; None for no tokens."""
    if not tokens:
        return None
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]  # type: ignore[arg-type]
    layers = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    return {name: ids for name, module in model.named_modules() if any(module is layer for layer in layers)}
