"""The settings that notebooks share: what every step has, and what the two that train have beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from helpers.core import SettingsError, is_notebook
from helpers.settings import trl_fields

SOURCE_ORDER = ("default", "recipe", ".env", "environment", "notebook", "flag")
# What helpers.training.diagnose reports, in its order; "nan" ends every run.
DIAGNOSTIC_NAMES = (
    "displacement", "runaway_margin", "saturated", "overfitting", "diverged", "entropy", "grad_norm_spikes",
    "lr_never_warm", "length_drift", "no_learning", "nan",
)  # fmt: skip
MINIMUMS: dict[str, float] = dict.fromkeys(
    ("train_rows", "eval_rows", "max_length", "max_prompt_length", "global_batch_size", "completion_steps", "rows",
     "show_rows", "max_calls", "max_tokens", "temperature", "top_k"), 0,
)  # fmt: skip
MINIMUMS |= dict.fromkeys(
    ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "completion_tokens", "batch_size",
     "max_new_tokens", "max_concurrency", "num_beams", "timeout"), 1,
)  # fmt: skip
# What may differ between two starts of one run: where it is kept, what is reported, and whether it goes on.
HASH_EXCLUDED = {"recipe", "output_dir", "run_name", "resume", "dry_run", "report_to", "wandb_project", "setup_module"}
HASH_EXCLUDED |= {"push_to_hub", "merge_adaptors", "hub_repo_id", "private", "logging_steps", "disable_tqdm"}
HASH_EXCLUDED |= {"show_rows", "chat", "batch_size", "max_concurrency", "max_calls", "max_tokens", "timeout"}
HASH_EXCLUDED |= {"retry_errors", "input_price", "output_price"}
HASH_EXCLUDED |= {"run", "adapter", "push", "license", "hub_revision", "hub_tag", "max_kl", "compare_merges"}
HASH_EXCLUDED |= {"dataset_num_proc", "streaming", "strict", "memory_gb", "local_rank"}
HASH_EXCLUDED |= {"stop_on_diagnostic", "completion_steps", "completion_tokens"}  # seeing changes nothing
HASH_EXCLUDED |= {"precompute_ref_log_probs"}  # says when the reference's are computed, not what they are
HASH_EXCLUDED_BY_STEP = {"judge": {"seed", "base_url", "max_new_tokens"}, "vibes": {"base_url"}}


@dataclasses.dataclass
class RunSettings:
    """What every notebook shares."""

    step: ClassVar[str] = ""

    recipe: str = ""  # YAML file of settings; recipes/ has some, and --recipe recipes/demo.yaml needs no GPU
    output_dir: Path = Path("outputs")  # where runs are kept, one folder each
    run_name: str = ""  # the run's folder; made from the settings when empty
    seed: int = 42  # seed of the data split, the adapter's weights, the order of rows and sampling
    resume: str = "auto"  # auto: go on where the same command stopped; never: replace its run; or a checkpoint's folder
    dry_run: bool = False  # say what would be done, and stop
    report_to: str = "none"  # tracker: none, wandb, tensorboard, trackio ...
    wandb_project: str = ""  # Weights & Biases project; naming one turns wandb on
    setup_module: str = ""  # module run first (python -m), to make what a recipe names

    sources: dict[str, str] = dataclasses.field(default_factory=dict, init=False, repr=False)
    trl: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def values(self) -> dict[str, Any]:
        """Every setting and its value, ready for JSON; TRL fields given by hand come last."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {name: str(v) if isinstance(v, Path) else v for name, v in (own | self.trl).items()}

    def hashed_settings(self) -> dict[str, Any]:
        """The settings that make a run what it is."""
        left_out = HASH_EXCLUDED | HASH_EXCLUDED_BY_STEP.get(self.step, set())
        return {name: v for name, v in self.values().items() if name not in left_out}

    def digest(self, *more: str) -> str:
        """Six hex digits of `identity()` and of `more` (what the run starts from)."""
        text = json.dumps([self.hashed_settings(), *more], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:6]

    def is_set(self, name: str) -> bool:
        """Whether `name` was set at all, rather than left at the cell's default."""
        return self.sources[name] != "default"

    def override(self, source: str, **values: Any) -> None:
        """Take over `values` that something else decides, and say what."""
        for name, value in values.items():
            setattr(self, name, value)
            self.sources[name] = source

    def check(self) -> None:
        """Refuse settings that cannot work. Raises SettingsError."""
        for name, least in MINIMUMS.items():
            if (value := getattr(self, name, least)) < least:
                raise SettingsError(f"--{name} {value} cannot be: {least} is the least")

    def rows_per_step(self) -> int:
        """Rows to one step, of all processes; 0 where nothing is trained."""
        return 0

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("setting", "value", "from", box=None, pad_edge=False)
        given = {name: value for name, value in self.values().items() if self.is_set(name)}
        for name, value in given.items():
            table.add_row(name, Text(str(value)), self.sources[name])  # brackets are no markup
        rest = Text(f"{len(self.values()) - len(given)} settings are at their defaults: see --help", style="dim")
        return Group(table, rest) if given else rest


@dataclasses.dataclass
class TrainSettings(RunSettings):
    """What 01 and 02 share beside that. A Settings cell that names one of these gives it another default."""

    trust_remote_code: bool = False  # run code that comes with the model
    revision: str = ""  # the model's branch, tag or commit on the Hub
    dataset_config: str = ""  # the dataset's configuration, where it has several
    dataset_revision: str = ""  # the dataset's branch, tag or commit on the Hub
    eval_split: str = ""  # split that evaluation rows are taken from, where the dataset has one; else dataset_split
    dataset_num_proc: int = 0  # processes that prepare the data; 0 takes as many as help
    streaming: bool = False  # refused: rows that are not all read cannot be accounted for
    system_prompt: str = ""  # put before every conversation that has no system message of its own
    global_batch_size: int = 0  # rows to one step, of all processes; sets gradient_accumulation_steps
    early_stopping_patience: int = 0  # stop after so many evaluations without a lower eval_loss; keep the best
    stop_on_diagnostic: tuple[
        str, ...
    ] = ()  # findings that end a run early, with a checkpoint: displacement, margin ...
    completion_steps: float = 0.2  # answer a few held-out prompts every so many steps; below 1 a share of all; 0 never
    completion_tokens: int = 512  # tokens of such an answer, at most
    overlong: Literal["drop", "truncate_prompt", "truncate_completion", "error"] = (
        "drop"  # what becomes of rows beyond max_length
    )
    strict: bool = False  # stop when any row has to be dropped
    chat_template: str = (
        "auto"  # the tokenizer's own, else mistral; or mistral, chatml, tulu, alpaca, vicuna, hh, a file
    )
    quantization: Literal["auto", "none", "4bit", "8bit"] = "auto"  # of the frozen base; auto: 4bit for qlora
    attn_implementation: str = (
        "auto"  # flash_attention_2 where it or kernels is installed, else sdpa; or a Hub kernel's name
    )
    lora_target_modules: str = "all-linear"  # layers that get an adapter: all-linear, or a regular expression
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"  # what the adapter's weights are kept in
    use_rslora: bool = False  # scale the adapter by alpha / sqrt(r) instead of alpha / r, for high ranks
    lora_modules_to_save: tuple[str, ...] = ()  # modules trained whole beside the adapter, such as embed_tokens
    memory_gb: float = 24.0  # memory of the GPU that --dry_run looks whether it fits into

    def early_stopping(self) -> dict[str, Any]:
        """What the trainer's config needs for --early_stopping_patience."""
        if not self.early_stopping_patience:
            return {}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
        best["restore_callback_states_from_checkpoint"] = True  # its count, when a run goes on
        steps = self.trl.get("eval_steps", self.trl.get("save_steps"))  # what is best has to be saved when it is found
        return best | ({} if steps is None else {"eval_steps": steps, "save_steps": steps})

    def accumulation_steps(self) -> int:
        """Batches to one step: as given, or what makes --global_batch_size of these processes. Raises SettingsError."""
        own: Any = self  # the notebooks' own fields
        per_device, processes = own.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
        rank = {
            name: SOURCE_ORDER.index(self.sources.get(name, "default").split()[0])
            for name in ("global_batch_size", "gradient_accumulation_steps")
        }
        if not self.global_batch_size or rank["gradient_accumulation_steps"] > rank["global_batch_size"]:
            return int(own.gradient_accumulation_steps)
        if rank["gradient_accumulation_steps"] == rank["global_batch_size"]:
            raise SettingsError("--global_batch_size sets --gradient_accumulation_steps: give one of them")
        if self.global_batch_size % (per_device * processes):
            raise SettingsError(
                f"--global_batch_size {self.global_batch_size} is not a multiple of --per_device_train_batch_size "
                f"{per_device} x {processes} processes"
            )
        return self.global_batch_size // int(per_device * processes)

    def rows_per_step(self) -> int:
        """Rows to one step, of all processes."""
        own: Any = self
        return int(own.per_device_train_batch_size) * self.accumulation_steps() * int(os.environ.get("WORLD_SIZE", "1"))

    def check(self) -> None:
        """Refuse, before anything is fetched, what cannot work. Raises SettingsError."""
        super().check()
        self.stop_on_diagnostic = tuple(name for word in self.stop_on_diagnostic for name in word.split(",") if name)
        if self.global_batch_size:
            self.accumulation_steps()  # says where it does not divide
        tuning, adapter = getattr(self, "tuning", ""), getattr(self, "tuning", "") != "full"
        unknown = sorted(set(getattr(self, "loss_type", ())) - trl_fields.loss_names()) if self.step == "dpo" else []
        strange = [name for name in self.stop_on_diagnostic if name not in DIAGNOSTIC_NAMES]
        respawned = multiprocessing.get_start_method() != "fork" and not is_notebook()
        wrong = [
            (
                self.streaming,
                "--streaming True: rows that are read as training goes cannot be counted, checked or split beforehand; "
                "leave it out (--train_rows trains on fewer)",
            ),
            (
                not adapter and self.quantization not in ("auto", "none"),
                f"--tuning full cannot train {self.quantization} weights: use --tuning qlora, or --quantization none",
            ),
            (
                tuning == "qlora" and self.quantization == "none",
                "--tuning qlora has quantized weights: use --tuning lora, or leave out --quantization none",
            ),
            (
                bool(strange),
                f"--stop_on_diagnostic {' '.join(strange)} is none of the findings: {', '.join(DIAGNOSTIC_NAMES)}",
            ),
            (
                bool(unknown),
                f"--loss_type {' '.join(unknown)} is none of TRL's losses: {', '.join(sorted(trl_fields.loss_names()))}",
            ),
            (
                adapter and self.trl.get("sync_ref_model", False),
                "--sync_ref_model: the reference of an adapter is the base without it, and cannot follow it: "
                "use --tuning full, or leave it out",
            ),
            (
                adapter and _matches(self.lora_target_modules, "lm_head", "embed_out"),
                f"--lora_target_modules {self.lora_target_modules!r} takes in the LM head, whose weight TRL's loss reads without an "
                "adapter: leave it out (--lora_modules_to_save lm_head trains it whole)",
            ),
            (
                self.trl.get("packing", False) and self.trl.get("packing_strategy") == "wrapped",
                "--packing_strategy wrapped lets conversations in one row see each other: leave it out",
            ),
            (
                self.trl.get("packing", False) and not getattr(self, "max_length", 1),
                "--packing fills rows of --max_length tokens: give one above 0",
            ),
            (
                respawned and self.trl.get("dataloader_num_workers", 0) > 0,
                "--dataloader_num_workers: this system starts a worker by running the notebook again: leave it at 0",
            ),
        ]
        for is_so, message in wrong:
            if is_so:
                raise SettingsError(message)


def _matches(targets: str, *names: str) -> bool:
    """Whether a regular expression of layers takes in one of these. Raises SettingsError where it is none."""
    try:
        return any(re.fullmatch(targets, name) for name in names)
    except re.error as error:
        raise SettingsError(f"--lora_target_modules {targets!r} is not a regular expression: {error}") from None
