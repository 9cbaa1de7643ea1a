"""One decision on device, dtype, quantization and attention, printed; and what PEFT and TRL leave open."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import SettingsError, UserError
from helpers.paths import find_path
from helpers.runs import find_run, read_run
from helpers.settings import RunSettings

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

DEMO = "--recipe recipes/demo.yaml"
LARGEST_ON_CPU = 3.0  # billions of parameters; above it one step takes minutes


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is loaded and computed with here."""

    device: str
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None
    attention: str
    bf16: bool
    fp16: bool

    @property
    def use_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def optimizer(self) -> str:
        """AdamW with 8-bit state that pages to the CPU's memory on a GPU, PyTorch's own elsewhere."""
        return "paged_adamw_8bit" if self.device == "cuda" else "adamw_torch"

    @property
    def device_map(self) -> dict[str, Any]:
        """The whole model on this process's device: "auto" would spread it over GPUs, which training refuses."""
        return {"": int(os.environ.get("LOCAL_RANK", "0")) if self.device == "cuda" else self.device}

    def __rich__(self) -> Any:
        from rich.table import Table

        bits = "none"
        if self.quantization is not None:
            bits = "4-bit NF4, double" if self.quantization.load_in_4bit else "8-bit"
        table = Table("device", "weights", "computed in", "quantization", "attention", box=None, pad_edge=False)
        computed = "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"
        table.add_row(self.device, str(self.dtype).removeprefix("torch."), computed, bits, self.attention)
        return table


def plan_model(model_id: str, tuning: str = "lora", quantization: str = "auto", attention: str = "auto") -> Plan:
    """Decide, from what this machine has, how `model_id` is loaded for `tuning` ("full", "lora", "qlora" or "none").

    Weights that are themselves trained stay in float32, with bfloat16 autocast where the hardware has it; others are
    loaded in bfloat16 on a GPU. bfloat16 by emulation counts as none: float16 is used there. Raises UserError where a
    model of this size needs a GPU and there is none, and SettingsError where the settings contradict each other.
    """
    import torch
    from transformers import BitsAndBytesConfig

    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]
    _refuse_large_model_on_cpu(model_id, device)
    bf16 = device == "xpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    fp16 = device == "cuda" and not bf16
    compute = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    if quantization == "auto":
        quantization = "4bit" if tuning == "qlora" else "none"
    if tuning == "full" and quantization != "none":
        raise SettingsError(
            f"--tuning full cannot train {quantization} weights: use --tuning qlora, or --quantization none"
        )
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
    if attention == "auto":
        flash = device == "cuda" and (bf16 or fp16) and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if flash else "sdpa"
    dtype = torch.float32 if tuning == "full" else compute
    return Plan(device, dtype, config, attention, bf16, fp16)


def _refuse_large_model_on_cpu(model_id: str, device: str) -> None:
    """Before anything is downloaded: the size is read from the name, as in Mistral-7B."""
    size = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", model_id.rpartition("/")[2].replace("_", "-"))
    if device == "cpu" and size and float(size[1]) > LARGEST_ON_CPU and find_path(model_id) is None:
        raise UserError(
            f"{model_id} needs a GPU (24 GB for the defaults) and this machine has none. "
            f'On a laptop: {DEMO}, or in a notebook the line recipe = "recipes/demo.yaml".'
        )


def adapter_settings(folder: Path, settings: RunSettings) -> dict[str, Any]:
    """adapter_config.json of an adapter that is trained further: its rank, scale and targets stay.

    Raises SettingsError where one given by hand differs; a recipe's are for the adapters that it makes itself.
    """
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    for name, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_targets", "target_modules")):
        mine = getattr(settings, name)
        by_hand = not settings.sources[name].startswith(("default", "recipe"))
        if by_hand and mine != config[key] and not (name == "lora_targets" and mine == "all-linear"):
            raise SettingsError(f"--{name} {mine}, but the adapter in {folder.name} has {config[key]}: leave it out")
    return config


def train_adapter_in_float32(model: torch.nn.Module) -> None:
    """Undo TRL's cast of QLoRA adapters to bfloat16 (trl 1.16, dpo_trainer.py and sft_trainer.py, __init__).

    Where TRL keeps a frozen copy under "ref", the values are taken from there: the cast had rounded them.
    """
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight.requires_grad:
            exact = weights.get(name.replace(".default.", ".ref."), weight)
            weight.data = exact.data.float().clone()


def local_or_hub(model_id: str, file: str = "config.json") -> str:
    """The path of a local folder as one can open it from here, or the Hub id as it is.

    Raises UserError where neither has `file`, before anything large is fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = find_path(model_id)
    if path and (path / file).is_file():
        return str(path)
    try:
        if path:
            raise FileNotFoundError(f"the folder has no {file}")
        hf_hub_download(model_id, file)
    except HFValidationError:
        raise UserError(f"{model_id!r} is neither a folder here nor a Hub id") from None
    except (OSError, HfHubHTTPError) as error:
        raise UserError(f"{model_id!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return model_id


def compute_4bit_alike(model: torch.nn.Module) -> None:
    """On a CPU, compute 4-bit layers in evaluation as in training.

    bitsandbytes 0.50 (nn/modules.py, Linear4bit.forward) repacks a layer for AVX512-BF16 at its first evaluation, and
    leaves it so: from then on its output is rounded to bfloat16, and no gradient passes through it in training.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False


def save_policy(trainer: Any, folder: Path) -> None:
    """Save the model, or the trained adapter alone: TRL's save_model adds the frozen "ref" copy to it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        model.save_pretrained(str(folder), selected_adapters=["default"])
    else:
        trainer.save_model(str(folder))


def find_adapter(name: str, base_model_id: str = "") -> tuple[str, str]:
    """Paths or Hub ids of an adapter and of its base. Raises UserError where `name` is no adapter."""
    from peft import PeftConfig

    try:
        adapter = local_or_hub(name, "adapter_config.json")
    except UserError as error:
        raise UserError(f"there is no adapter to merge: {error}") from None
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    return adapter, local_or_hub(base_model_id or str(base))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model that answers: a whole one, or an adapter on its base."""

    name: str
    base: str
    adapter: str | None = None


def find_candidates(names: tuple[str, ...], output_dir: Path) -> list[Candidate]:
    """What each of `names` (a run, an adapter, a model, "latest") means, what it started from standing before it."""
    found = []
    for name in names:
        if name == "latest":
            name = str(find_run(output_dir, "latest", "dpo").folder)
        folder = find_path(name) or find_path(str(output_dir / name))
        if folder is None or not (folder / "adapter_config.json").is_file():
            found.append(Candidate(Path(name).name, str(folder or name)))
            continue
        base = local_or_hub(str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]))
        parent = read_run(folder).get("parent") or ""
        if (folder.parent / parent / "adapter_config.json").is_file():
            found.append(Candidate(parent, base, str(folder.parent / parent)))
        else:
            found.append(Candidate(Path(base).name, base))
        found.append(Candidate(folder.name, base, str(folder)))
    return list(dict.fromkeys(found))
