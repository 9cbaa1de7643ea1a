"""The settings that notebooks share: RunSettings for every step, TrainSettings for the two that train."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from helpers.core import SettingsError, fingerprint, is_notebook, shorten
from helpers.settings.sources import NAMES, SHARES, compared_values, losses_that_read

# Losses of TRL that are means over pairs. "sft" is a mean over tokens; aot and aot_unpaired sort the batch.
PAIR_LOSSES = {"sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
               "apo_down", "discopop", "sigmoid_norm"}  # fmt: skip
SOURCE_ORDER = ("default", "recipe", ".env", "environment", "notebook", "flag")
# What helpers.training.diagnose reports, in its order; "nan" ends every run.
DIAGNOSTIC_NAMES = ("displacement", "runaway_margin", "saturated", "overfitting", "diverged", "entropy",
                    "grad_norm_spikes", "lr_never_warm", "length_drift", "no_learning", "nan")  # fmt: skip

# Arguments of transformers' apply_chat_template that are no variables of the template; tools are a column of the rows.
RENDERING_ARGUMENTS = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip


@dataclasses.dataclass
class RunSettings:
    """What every notebook shares."""

    step: ClassVar[str] = ""
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()  # groups of settings of which only one can be used
    const: ClassVar[dict[str, list[str]]] = {}  # the values of flags that are given without one
    program: ClassVar[str] = ""  # what follows `python` on the command line; by default the file that runs

    recipe: str = ""  # YAML file of settings; recipes/demo.yaml runs without a GPU
    output_dir: Path = Path("outputs")  # folder of all runs
    run_name: str = ""  # name of this run's folder; by default derived from the settings
    seed: int = 42  # seed of the data split, the adapter's initialization, shuffling and sampling
    resume: Literal["auto", "never", "always"] = "auto"  # never: start over; always: resume even without run.json
    dry_run: bool = False  # print what would be done, then stop
    setup_module: str = ""  # Python module to run first, to create what a recipe needs

    sources: dict[str, str] = dataclasses.field(default_factory=dict, init=False, repr=False)
    trl: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def values(self) -> dict[str, Any]:
        """Every setting and its value, ready for JSON; fields of TRL's config that were set come last."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {name: str(v) if isinstance(v, Path) else v for name, v in (own | self.trl).items()}

    def hashed_settings(self) -> dict[str, Any]:
        """The settings that decide what a run computes."""
        names = NAMES["not_hashed"]
        excluded = f"{names['all']} {names.get(self.step, '')}".split()
        older = ("chat_template_kwargs", "eos_token")  # older runs do not have them
        excluded += [name for name in older if not getattr(self, name, "")]
        hashed = {name: value for name, value in self.values().items() if name not in excluded}
        if "optim" in hashed:  # where its states are makes no difference
            hashed["optim"] = str(hashed["optim"]).removeprefix("paged_")
        return hashed

    def digest(self, *more: str) -> str:
        """Six hex digits of a hash over `hashed_settings()` and `more` (what the run starts from)."""
        return fingerprint(self.hashed_settings(), *more)[:6]

    def is_set(self, name: str) -> bool:
        """Whether any layer sets `name`; False if it has the default of the cell."""
        return self.sources[name] != "default"

    def layer(self, name: str) -> int:
        """The rank of the layer that sets `name`: its index in SOURCE_ORDER, the highest for what is overridden."""
        source = self.sources.get(name, "default").split()[0]
        return SOURCE_ORDER.index(source) if source in SOURCE_ORDER else len(SOURCE_ORDER)

    def override(self, source: str, **values: Any) -> None:
        """Replace `values`, and record `source` as where they come from."""
        for name, value in values.items():
            setattr(self, name, value)
            self.sources[name] = source

    def check(self) -> None:
        """Raise SettingsError for values that cannot work."""
        values, name = self.values(), self.run_name
        is_folder_name = not name.startswith(".") and "/" not in name and name.isprintable()
        refuse_if(
            len(name.encode()) > 200 or not is_folder_name,
            f"--run_name {shorten(name, 60)!r} cannot name a folder. Use at most 200 printable characters, no / "
            "and no dot in front.",
        )
        for interval, names in NAMES["ranges"].items():
            for name in filter(values.__contains__, names.split()):
                check_range(name, values[name], interval)
        if values.get("chat_template_kwargs"):  # one spelling, for the name of the run
            self.chat_template_kwargs = json.dumps(template_variables(self), sort_keys=True)

    def rows_per_step(self) -> int:
        """Rows per optimizer step over all processes; 0 for a notebook that does not train."""
        return 0

    def __rich__(self) -> Any:
        """The settings that differ from the recipe and the defaults, and the name of the recipe."""
        from rich.table import Table
        from rich.text import Text

        values = self.values()
        count = {source: sum(self.sources.get(name) == source for name in values) for source in SOURCE_ORDER[:2]}
        table = Table.grid(padding=(0, 2))
        if self.recipe:
            table.add_row("recipe", Text(self.recipe), f"{count['recipe']} settings")
        for name, value in values.items():
            if name != "recipe" and self.layer(name) > 1:
                words = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
                table.add_row(name, Text(words), self.sources[name])  # Text: brackets are not markup
        table.add_row("defaults", Text("see --help", style="dim"), f"{count['default']} settings")
        return table


@dataclasses.dataclass
class TrainSettings(RunSettings):
    """What 01 and 02 share. A Settings cell that repeats one of these changes its default."""

    report_to: str = "none"  # tracker: none, wandb, tensorboard, trackio ...
    wandb_project: str = ""  # Weights & Biases project; setting it turns wandb on
    trust_remote_code: bool = False  # run code that comes with the model
    revision: str = ""  # branch, tag or commit of the model on the Hub
    dataset_config: str = ""  # configuration of the dataset, if it has several
    dataset_revision: str = ""  # branch, tag or commit of the dataset on the Hub
    eval_split: str = ""  # split with the evaluation rows; by default they are taken from dataset_split
    dataset_num_proc: int = 0  # processes that prepare the data; 0: chosen automatically
    system_prompt: str = ""  # added to conversations that have no system message
    global_batch_size: int = 0  # rows per step over all processes; sets gradient_accumulation_steps
    early_stopping_patience: int = 0  # stop after this many evaluations without a lower eval_loss; 0: never
    stop_on_diagnostic: tuple[str, ...] = ()  # problems that end a run, with a checkpoint: displacement, entropy ...
    completion_steps: float = 0.2  # steps between answers to evaluation prompts; below 1: a share of all; 0: none
    completion_tokens: int = 512  # maximum tokens of an answer to an evaluation prompt
    overlong: Literal["drop", "truncate_prompt", "truncate_completion", "error"] = "drop"  # rows above max_length
    strict: bool = False  # stop if any row would be dropped
    chat_template: str = "auto"  # auto: the tokenizer's, or else mistral; chatml, tulu, alpaca, vicuna, hh; a file
    chat_template_kwargs: str = ""  # variables of the chat template, as JSON: {"enable_thinking": false}
    eos_token: str = ""  # token that ends an answer, if the chat template ends turns with another than the tokenizer's
    quantization: Literal["auto", "none", "4bit", "8bit"] = "auto"  # bits of the frozen base; auto: 4bit for qlora
    attn_implementation: str = "auto"  # auto: flash_attention_2 if installed, else sdpa; or eager, or a Hub kernel
    lora_target_modules: str | list[str] = "all-linear"  # layers with an adapter: a regular expression, or names
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"  # dtype of the adapter's weights
    use_rslora: bool = False  # scale the adapter by alpha / sqrt(r) instead of alpha / r, for high ranks
    lora_modules_to_save: tuple[str, ...] = ()  # modules to train in full with the adapter, such as embed_tokens
    memory_gb: float = 24.0  # GPU memory in GB with which --dry_run compares its estimate

    def early_stopping(self) -> dict[str, Any]:
        """The fields of the trainer's config that --early_stopping_patience needs."""
        if not self.early_stopping_patience:
            return {}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        best["restore_callback_states_from_checkpoint"] = True  # so that a resumed run keeps its count
        steps = self.trl.get("eval_steps", self.trl.get("save_steps"))  # each evaluation needs its checkpoint
        return best | ({} if steps is None else {"eval_steps": steps, "save_steps": steps})

    def accumulation_steps(self) -> int:
        """Batches per step: as set, or as --global_batch_size needs for this number of processes. Raises SettingsError
        if one layer sets both, or if the batch size does not divide."""
        own: Any = self  # the fields of the notebooks' cells
        rank, other = self.layer("global_batch_size"), self.layer("gradient_accumulation_steps")
        if not self.global_batch_size or other > rank:
            return int(own.gradient_accumulation_steps)
        refuse_if(other == rank, "--global_batch_size sets --gradient_accumulation_steps. Give one of them.")
        per_device, processes = int(own.per_device_train_batch_size), int(os.environ.get("WORLD_SIZE", "1"))
        refuse_if(
            self.global_batch_size % (per_device * processes),
            f"--global_batch_size {self.global_batch_size} is not a multiple of --per_device_train_batch_size "
            f"{per_device} x {processes} processes. Change one of them.",
        )
        return self.global_batch_size // (per_device * processes)

    def rows_per_step(self) -> int:
        """Rows per optimizer step over all processes."""
        own: Any = self
        return int(own.per_device_train_batch_size) * self.accumulation_steps() * int(os.environ.get("WORLD_SIZE", "1"))

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together, before anything is downloaded."""
        super().check()
        self.stop_on_diagnostic = tuple(name for word in self.stop_on_diagnostic for name in word.split(",") if name)
        if self.global_batch_size:
            self.accumulation_steps()
        trl, tuning, targets = self.trl, getattr(self, "tuning", ""), self.lora_target_modules
        has_adapter, packing = tuning != "full", trl.get("packing", False)
        bad_names = " ".join(name for name in self.stop_on_diagnostic if name not in DIAGNOSTIC_NAMES)
        spawns = multiprocessing.get_start_method() != "fork" and not is_notebook()
        refuse_if(
            not has_adapter and self.quantization not in ("auto", "none"),
            f"--tuning full cannot train {self.quantization} weights. Use --tuning qlora or --quantization none.",
        )
        refuse_if(
            tuning == "qlora" and self.quantization == "none",
            "--tuning qlora needs quantized weights. Use --tuning lora, or remove --quantization none.",
        )
        refuse_if(
            bad_names, f"--stop_on_diagnostic {bad_names} is not a diagnostic. Use {', '.join(DIAGNOSTIC_NAMES)}."
        )
        packages, optimizer = NAMES["packages"], f"--optim {trl.get('optim')}"
        needed = [(f"--{name}", package) for name, package in packages["settings"].items() if trl.get(name)]
        needed += [(optimizer, package) for part, package in packages["optimizers"].items() if part in optimizer]
        for flag, package in needed:
            refuse_if(
                importlib.util.find_spec(package) is None,
                f"{flag} needs the package {package}, which is not installed. Install it, or remove the setting.",
            )
        groups = {"all": True, "dpo": self.step == "dpo", "adapter": self.step == "dpo" and has_adapter}
        for group in filter(groups.get, groups):
            for name, reason in NAMES["refused"][group].items():
                refuse_if(trl.get(name), f"--{name} {reason}")
        if hasattr(self, "loss_type"):
            self._check_loss()
        refuse_if(
            trl.get("completion_only_loss") is False or trl.get("assistant_only_loss") is False,
            "The loss counts answers only, never prompts. Remove --completion_only_loss and --assistant_only_loss.",
        )
        refuse_if(
            trl.get("dataloader_prefetch_factor") and not trl.get("dataloader_num_workers"),
            "--dataloader_prefetch_factor needs --dataloader_num_workers above 0.",
        )
        refuse_if(
            has_adapter and not targets, "--lora_target_modules is empty. Name at least one module, or use all-linear."
        )
        refuse_if(
            has_adapter and _matches(targets, "lm_head", "embed_out"),
            f"--lora_target_modules {targets!r} includes the LM head, but TRL's loss ignores an adapter on it. "
            "Exclude it, or train it in full with `--lora_modules_to_save lm_head`.",
        )
        refuse_if(
            packing and trl.get("packing_strategy") == "wrapped",
            "--packing_strategy wrapped lets conversations in one row attend to each other. Remove it.",
        )
        refuse_if(
            packing and not getattr(self, "max_length", 1),
            "--packing fills rows of --max_length tokens. Set --max_length above 0.",
        )
        refuse_if(
            spawns and trl.get("dataloader_num_workers", 0) > 0,
            "--dataloader_num_workers above 0 starts the notebook again in each worker on this system. Use 0.",
        )

    def _check_loss(self) -> None:
        """Raise SettingsError for losses that TRL does not have, and for settings that they ignore (TRL 1.16)."""
        losses, known = list(getattr(self, "loss_type", ())), sorted(compared_values("loss_type"))
        bad = " ".join(name for name in losses if name not in known)
        refuse_if(not losses, "--loss_type needs at least one loss.")
        refuse_if(bad, f"--loss_type {bad} is none of TRL's losses: {', '.join(known)}.")
        for name in ("label_smoothing", "discopop_tau"):
            readers = sorted(losses_that_read(name))
            refuse_if(
                self.trl.get(name) and not {*losses} & {*readers},
                f"--{name} has no effect with --loss_type {' '.join(losses)}. Remove it, or use {' or '.join(readers)}",
            )
        weights, divergence = self.trl.get("loss_weights"), self.trl.get("f_divergence_type") or "reverse_kl"
        refuse_if(
            weights is not None and len(weights) != len(losses),
            f"--loss_weights has {len(weights or ())} values for {len(losses)} losses. Give one per --loss_type.",
        )
        refuse_if(
            "exo_pair" in losses and not self.trl.get("label_smoothing"),
            "--loss_type exo_pair needs --label_smoothing above 0; its paper recommends 0.001.",
        )
        refuse_if(
            self.trl.get("use_weighting") and len(losses) > 1,
            f"--use_weighting works with one loss in TRL 1.16, not with --loss_type {' '.join(losses)}. Remove it.",
        )
        strategy = self.trl.get("train_sampling_strategy")
        refuse_if(
            strategy in ("group_by_length", "batch_rebalance"),
            f"--train_sampling_strategy {strategy} needs rows with one length, and a pair has two. Remove it.",
        )
        divergences = sorted(compared_values("self.f_divergence_type"))
        refuse_if(
            divergences and divergence not in divergences,
            f"--f_divergence_type {divergence} is unknown. Use {', '.join(divergences)}.",
        )
        refuse_if(
            self.trl.get("f_alpha_divergence_coef") is not None and divergence != "alpha_divergence",
            "--f_alpha_divergence_coef has no effect without --f_divergence_type alpha_divergence.",
        )


def refuse_if(condition: Any, message: str) -> None:
    """Raise SettingsError with `message` if `condition` holds."""
    if condition:
        raise SettingsError(message)


def template_variables(settings: Any) -> dict[str, Any]:
    """The variables of the chat template that `--chat_template_kwargs` sets. Raises SettingsError."""
    text = getattr(settings, "chat_template_kwargs", "")
    try:
        variables = json.loads(text or "{}")
    except json.JSONDecodeError:
        variables = None
    refuse_if(
        not isinstance(variables, dict),
        f"--chat_template_kwargs {shorten(text, 60)!r} is not a JSON object. "
        'Give variables of the chat template, such as {"enable_thinking": false}.',
    )
    refuse_if(
        taken := sorted({*variables} & RENDERING_ARGUMENTS),
        f"--chat_template_kwargs {', '.join(taken)} is not a variable of a chat template. Remove it.",
    )
    return dict(variables)


def check_range(name: str, value: Any, interval: str) -> None:
    """Raise SettingsError if a number, or one of a list, is outside `interval`, such as "[0, 1)". NaN always is."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    for number in value if isinstance(value, list | tuple) else [value]:
        if number in (None, "auto") or (name == "max_steps" and number == -1):  # -1: as many as the epochs have
            continue
        limit = ""
        if not (number >= low if interval[0] == "[" else number > low):
            limit = f"{'at least' if interval[0] == '[' else 'more than'} {low:.10g}"
        elif not (number <= high if interval[-1] == "]" else number < high):
            limit = f"{'at most' if interval[-1] == ']' else 'less than'} {high:.10g}"
        refuse_if(limit, f"--{name} {number} is out of range. Use {limit}.")
        refuse_if(
            name in SHARES and number > 1 and number != int(number),
            f"--{name} {number} is neither a share below 1 nor an integer.",
        )


def _matches(targets: str | list[str], *names: str) -> bool:
    """Whether an adapter's targets include one of `names`. Raises SettingsError for a bad regular expression."""
    if isinstance(targets, list):
        return bool({*targets} & {*names})
    try:
        return any(re.fullmatch(targets, name) for name in names)
    except re.error as error:
        raise SettingsError(f"--lora_target_modules {targets!r} is not a regular expression: {error}") from None
