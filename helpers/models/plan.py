"""How a model is loaded on this machine, and fixes to what PEFT, TRL and bitsandbytes do with it afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import SettingsError, UserError, find_path, is_notebook, shorten
from helpers.models.adapters import check_weights, follows_longest_row
from helpers.settings.fields import PAIR_LOSSES

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

SELECTOR = "https://pytorch.org/get-started/locally/"
# Major version of CUDA: of the oldest driver, on Linux (NVIDIA's CUDA notes).
CUDA_DRIVERS = {13: 580, 12: 525, 11: 450}
MAX_CPU_BILLIONS = 3.0  # parameters of a model that is still trained on a CPU; above it one step takes minutes


def sharding_engine() -> str:
    """Return the engine that accelerate was launched with: "DEEPSPEED", "FSDP" or ""."""
    return next((name for name in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"), "")


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """How a model is loaded, and what it computes in."""

    device: str
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None
    attn_implementation: str
    bf16: bool
    fp16: bool

    @property
    def device_args(self) -> dict[str, Any]:
        """TrainingArguments for a CPU. DeepSpeed detects a CPU itself and needs the gloo backend."""
        if self.device != "cpu":
            return {}
        return {"ddp_backend": "gloo"} if sharding_engine() else {"use_cpu": True}

    @property
    def optimizer(self) -> str:
        """On a single GPU, 8-bit AdamW that pages its state to CPU memory."""
        return "paged_adamw_8bit" if self.device == "cuda" and not sharding_engine() else "adamw_torch"

    @property
    def device_map(self) -> dict[str, Any] | None:
        """The process's own device ("auto" would use several); None with DeepSpeed or FSDP, which place weights."""
        if sharding_engine():
            return None
        return {"": int(os.environ.get("LOCAL_RANK", "0")) if self.device == "cuda" else self.device}

    def as_dict(self) -> dict[str, str]:
        """Describe the plan for run.json and the table."""
        config = self.quantization
        return {
            "device": self.device,
            "weights": str(self.dtype).removeprefix("torch."),
            "computed in": "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32",
            "quantization": "none" if config is None else "4-bit NF4, double" if config.load_in_4bit else "8-bit",
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
    trl_args: Mapping[str, Any] | None = None,
    task: str = "CAUSAL_LM",
) -> LoadPlan:
    """Plan how `model_id` is loaded on this machine, for `tuning` (that of 02_dpo.py, or "none") and PEFT's `task`.

    Trained weights stay in float32, with bfloat16 autocast if the hardware supports it. Frozen weights are loaded in
    bfloat16 on a GPU, or in float16 on one that only emulates bfloat16. Of TRL's fields, `trl_args`, use_cpu, bf16 and
    fp16 matter. Raises UserError if the model needs a GPU that is missing or cannot be used.
    """
    import torch

    given = trl_args or {}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator and not given.get("use_cpu") else "cpu"
    _check_machine(model_id, device, is_forced=bool(given.get("use_cpu")), is_trained=tuning != "none")
    has_sdpa = getattr(_find_class(model_id, task), "_supports_sdpa", True)
    bf16 = device == "xpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    fp16 = device == "cuda" and not bf16
    compute = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    if quantization == "auto":
        quantization = "4bit" if tuning == "qlora" else "none"
    if attn_implementation == "auto":
        flash = device == "cuda" and bf16 and has_flash_attention()
        attn_implementation = "flash_attention_2" if flash else "sdpa" if has_sdpa else "eager"
    if given.get("bf16") or given.get("fp16"):  # autocast to what the user says
        bf16, fp16 = bool(given.get("bf16")), bool(given.get("fp16"))
    dtype = torch.float32 if tuning == "full" else compute
    config = quantization_config(quantization[:1], compute)
    return LoadPlan(device, dtype, config, attn_implementation, bf16, fp16)


def plan_as_trained(
    model_id: str, recorded: Mapping[str, str], quantization: str = "auto", attn_implementation: str = "auto"
) -> LoadPlan:
    """Plan how `model_id` answers: as in its training, by the plan that its run `recorded` (`LoadPlan.as_dict`).

    What is not recorded, and what this machine lacks, is planned for this machine. `quantization` and
    `attn_implementation` other than "auto" replace the recorded ones.
    """
    import torch

    plan = plan_model(model_id, "none", "none", attn_implementation)
    known = plan.as_dict() | dict(recorded) | ({} if quantization == "auto" else {"quantization": quantization})
    weights, compute = getattr(torch, known["weights"]), getattr(torch, known["computed in"])
    if plan.fp16 and torch.bfloat16 in (weights, compute):
        weights = compute = plan.dtype
    is_here = known["device"] == plan.device and known["attention"] != "flash_attention_2"  # may not be installed
    if attn_implementation == "auto" and (is_here or known["attention"] in ("eager", "sdpa")):
        plan = dataclasses.replace(plan, attn_implementation=known["attention"])
    config, halves = quantization_config(known["quantization"][:1], compute), (torch.bfloat16, torch.float16)
    bf16, fp16 = (compute is half for half in halves)
    return dataclasses.replace(plan, dtype=weights, quantization=config, bf16=bf16, fp16=fp16)


def _find_class(model_id: str, task: str) -> Any:
    """The class with which transformers loads a model for `task`; None if it is not known. Raises UserError if it has
    none for models of this type."""
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(find_path(model_id) or model_id, local_files_only=True)
    except Exception:  # not cached, needs remote code, or is broken: `load_tokenizer` says so
        return None
    found = getattr(transformers, f"MODEL_FOR_{task}_MAPPING").get(type(config), None)
    if found is None and not hasattr(config, "auto_map"):
        kind = "text model" if task == "CAUSAL_LM" else "classifier"
        raise UserError(
            f"{model_id} is a model of type {config.model_type}, which transformers does not load as a {kind}. "
            f"Use a {kind} of the same family."
        )
    return found


def quantization_config(bits: str, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantization for 4 `bits`, LLM.int8 for 8, otherwise None. `compute` is the dtype of products."""
    from transformers import BitsAndBytesConfig

    if bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits != "4":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,  # FSDP needs it; it has no cost elsewhere
    )


def has_flash_attention() -> bool:
    """Whether the package flash-attn is one that transformers takes, and can be imported."""
    from transformers.utils import is_flash_attn_2_available  # type: ignore[attr-defined]

    if not is_flash_attn_2_available():
        return False
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError) as error:  # compiled for another PyTorch
        print(f"note: flash-attn cannot be imported ({shorten(str(error))}). PyTorch's attention is used instead.")
        return False
    return True


def _check_machine(model_id: str, device: str, is_forced: bool, is_trained: bool) -> None:
    """Refuse a model too large for a CPU, by the size in its name (Mixtral-8x7B), and several GPUs in one process: the
    Trainer would use nn.DataParallel, which TRL does not support. Where Triton cannot compile, TRL uses PyTorch."""
    import torch

    name = model_id.rpartition("/")[2].replace("_", "-")
    size = re.search(r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", name) if device == "cpu" else None
    if size and int(size[1] or 1) * float(size[2]) > MAX_CPU_BILLIONS and find_path(model_id) is None:
        why = "--use_cpu is set. Remove it." if is_forced else describe_missing_gpu()
        raise UserError(f"{model_id} needs a GPU (24 GB for the defaults), and {why}")
    if device == "cuda" and is_trained and "WORLD_SIZE" not in os.environ and (n := torch.cuda.device_count()) > 1:
        command = "notebooks/..." if is_notebook() else shlex.join(sys.argv)
        raise UserError(
            f"{n} GPUs are visible to one process. Set CUDA_VISIBLE_DEVICES=0 to use one of them, or use all with "
            f"`accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes {n} {command}`."
        )
    if device == "cuda" and is_trained and (missing := missing_compiler()):
        from trl.kernels import chunked_logprob

        print(f"note: Triton cannot compile here without {missing}. TRL computes log-probabilities with PyTorch.")
        chunked_logprob._TRITON_AVAILABLE = False


def describe_missing_gpu() -> str:
    """Why PyTorch has no GPU here, and what to do: a build without CUDA, an old driver, a hidden GPU, or none."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        gpu, driver = (word.strip() for word in found[0].rsplit(",", 1))
    except (OSError, subprocess.SubprocessError, LookupError, ValueError):
        return (
            "this machine has none. Use `--recipe recipes/demo.yaml` on a laptop; in a notebook, the line "
            '`recipe = "recipes/demo.yaml"`.'
        )
    build, cuda = f"PyTorch {torch.__version__}", torch.version.cuda
    if not cuda:
        return f"{build} is a build without CUDA, so it cannot use the {gpu}. Install the build for CUDA: {SELECTOR}"
    needed = next((driver for version, driver in CUDA_DRIVERS.items() if int(cuda.split(".")[0]) >= version), 0)
    if int(driver.split(".")[0]) < needed:
        return (
            f"the driver of the {gpu} is {driver}, while {build} with CUDA {cuda} needs {needed} or newer. Update the "
            f"driver, or install a build for an older CUDA: {SELECTOR}"
        )
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides the {gpu}. Remove that variable, or set it to 0."
    return f"PyTorch cannot use the {gpu}. Look at what `python -c 'import torch; torch.cuda.init()'` says."


def missing_compiler() -> str:
    """What Triton needs to compile its launcher (triton 3, runtime/build.py) and this machine lacks; "" if nothing."""
    if sys.platform == "win32":  # PyTorch for Windows comes without Triton
        return ""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), "")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "a C compiler" if not compiler else "" if header.is_file() else f"Python's headers ({header})"


def prepare_model(model: PreTrainedModel, tokenizer: Tokenizer, adapter: str | Path | None = None) -> None:
    """Make evaluation on a CPU compute as training does, give the embeddings the rows of the tokenizer or of `adapter`,
    and let the model be saved with its generation settings: transformers 5.23 (generation/configuration_utils.py)
    refuses those of many base models, such as a temperature without do_sample, once TRL has set their padding token."""
    from peft.utils import load_peft_weights
    from transformers import GenerationConfig

    class UncheckedGenerationConfig(GenerationConfig):
        def validate(self, *args: Any, **kwargs: Any) -> None:
            pass

    check_weights(model)
    disable_cpu_4bit_repacking(model)
    resize_embeddings(model, tokenizer, load_peft_weights(str(adapter), device="cpu") if adapter else {})
    if type(getattr(model, "generation_config", None)) is GenerationConfig:
        model.generation_config.__class__ = UncheckedGenerationConfig


def disable_cpu_4bit_repacking(model: torch.nn.Module) -> None:
    """On a CPU, make 4-bit layers compute in evaluation as in training. bitsandbytes 0.50 (nn/modules.py, Linear4bit)
    repacks a layer for AVX512-BF16 at its first evaluation: it then rounds its output and lets no gradient through."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False


def embedding_layers(model: PreTrainedModel) -> list[str]:
    """Names of the input embeddings and of the LM head."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def embedding_rows(model: PreTrainedModel, adapter: Mapping[str, torch.Tensor]) -> int:
    """The rows that the embeddings had in the training of an adapter, if its weights tell; otherwise 0."""
    layers = "|".join(map(re.escape, embedding_layers(model)))
    # all rows, in a layer that PEFT 0.21 wraps or not; or a LoRA matrix, whose rows or columns are tokens
    kinds = r"(?:[\w.]*base_layer\.)?(weight|lora_B\.weight|lora_embedding_A)"
    found = ((re.search(rf"\.(?:{layers})\.{kinds}", name), weight) for name, weight in adapter.items())
    return max((int(w.shape[match[1] == "lora_embedding_A"]) for match, w in found if match), default=0)


def resize_embeddings(
    model: PreTrainedModel, tokenizer: Tokenizer, adapter: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Give tokens beyond the model's vocabulary a row each in the embeddings and the LM head: the mean of the others,
    which depends on base and tokenizer alone. Embeddings in the weights of an `adapter` decide the number of rows."""
    from peft.utils.other import TrainableTokensWrapper

    # trl 1.16 (trainer/utils.py, add_fused_lm_head) reads the LM head's bias, which peft 0.21's wrapper does not have
    bias = property(lambda wrapper: getattr(wrapper.original_module, "bias", None))
    TrainableTokensWrapper.bias = bias  # type: ignore[attr-defined]
    before = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    rows = embedding_rows(model, adapter or {}) or max(before, len(tokenizer))
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        gathered: Any = contextlib.nullcontext()
        if hasattr(layer.weight, "ds_id"):  # under ZeRO-3 each process holds a part
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([layer.weight], modifier_rank=0)
        with gathered:
            weight: Any = layer.weight.data
            weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def lora_module_args(
    model: PreTrainedModel, tokenizer: Tokenizer, new_tokens: list[str], modules_to_save: tuple[str, ...]
) -> dict[str, Any]:
    """LoraConfig's modules_to_save, and its trainable_token_indices: the rows of `new_tokens` in the embeddings and an
    untied LM head. Raises SettingsError for an unknown name in `modules_to_save`, which PEFT ignores."""
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if unknown := [name for name in modules_to_save if name not in known]:
        names = ", ".join(sorted(known))
        raise SettingsError(f"`--lora_modules_to_save {unknown[0]}` is not a module of the model. Use one of {names}.")
    ids = tokenizer.convert_tokens_to_ids(new_tokens)
    layers = embedding_layers(model)
    rows = dict.fromkeys(layers[:1] if model.config.tie_word_embeddings else layers, ids)
    return {"modules_to_save": list(modules_to_save) or None, "trainable_token_indices": rows if new_tokens else None}


def zero_stage(values: Mapping[str, Any], engine: str) -> int:
    """ZeRO's stage, from --deepspeed FILE, or else from accelerate's configuration."""
    if engine != "DEEPSPEED":
        return 3 if engine else 0
    file = values.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not file:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SettingsError(f"`--deepspeed {file}` cannot be read: {error}") from None
    return int(content.get("zero_optimization", {}).get("stage", 0))


def no_microbatch_reason(config: Any, given: Mapping[str, Any], has_virtual_tokens: bool = False) -> str:
    """Why a batch cannot be computed in parts with the same gradient, or "". `given` are fields of DPOConfig."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    router = getattr(text, "router_aux_loss_coef", 0.0) if given.get("router_aux_loss_coef") is None else 1.0
    losses, optimizer = given.get("loss_type") or (), getattr(given.get("optim"), "value", given.get("optim", ""))
    uncut = [name for name in losses if name not in PAIR_LOSSES | {"sft"}]
    is_sharded = given.get("deepspeed") or given.get("fsdp") or sharding_engine()
    reasons = {
        "DeepSpeed and FSDP need as many passes in every process": is_sharded,
        "sequences are split over devices": given.get("parallelism_config") is not None,
        f"the loss {', '.join(uncut)} compares all pairs of a batch": uncut,
        "the loss sft cannot be weighted": "sft" in losses and given.get("use_weighting"),
        "the model has an auxiliary loss over all tokens of a batch": hasattr(text, "output_router_logits") and router,
        f"{optimizer} updates weights in the backward pass": re.search("lomo|layerwise", optimizer),
        "rotary embeddings follow the longest row of a batch": follows_longest_row(text),
        "the adapter puts virtual tokens before the prompt": has_virtual_tokens,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")
