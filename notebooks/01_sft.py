# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Instruction-tune a base model
#
# **In:** a base model and conversations. **Out:** `outputs/sft-<model>-<hex>/`, a model (or its adapter) that answers.
#
# ```
# python notebooks/01_sft.py                                  # Mistral-7B with QLoRA, one 24 GB GPU
# python notebooks/01_sft.py --recipe recipes/demo.yaml       # a tiny model on a laptop, a minute
# python notebooks/01_sft.py --help                           # every setting
# ```
#
# A base model continues text. Here it learns to answer: it reads whole conversations, and the loss falls on the
# assistant's turns alone.

# %% [markdown]
# ## Settings
#
# Each field is a flag (`--learning_rate 1e-4`), a variable (`SFT_LEARNING_RATE`), a line of `.env` and a recipe's key.
# Any other field of TRL's `SFTConfig` works the same way without standing here.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings.load import TrainSettings, load_settings


@dataclass
class Settings(TrainSettings):  # which has some more: --help lists them
    """Instruction-tune a model."""

    step: ClassVar[str] = "sft"

    model_id: str = "mistralai/Mistral-7B-v0.1"  # base model: a Hub id or a folder

    dataset_id: tuple[str, ...] = ("HuggingFaceH4/ultrachat_200k",)  # conversations: Hub ids, files, folders
    dataset_split: str = "train_sft"  # the split that is read; evaluation rows are taken from it
    train_rows: int = 20_000  # conversations to train on; 0 takes all
    eval_rows: int = 500  # conversations held out; 0 takes eval_fraction of them
    eval_fraction: float = 0.05  # share held out where eval_rows is 0
    data_format: str = "auto"  # by the columns; or messages, completion, alpaca, or any of 02_dpo.py's
    max_length: int = 2048  # tokens of a conversation; 0 for no limit

    tuning: Literal["full", "lora", "qlora", "dora"] = "qlora"  # all weights, or an adapter; qlora's base is in 4 bits
    lora_r: int = 64  # rank of the adapter
    lora_alpha: int = 128  # its scale: alpha / r multiplies what it adds

    num_train_epochs: float = 1.0  # passes over the rows
    learning_rate: float = 1e-4  # the highest; 1e-5 to 2e-5 suits tuning in full
    per_device_train_batch_size: int = 1  # conversations at a time
    per_device_eval_batch_size: int = 1  # likewise, in evaluation
    gradient_accumulation_steps: int = 16  # batches to one step


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: take away the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## The machine and the run
#
# One decision on device, dtype, quantization and attention. Then the run's folder: its name follows from the settings,
# so the same command finds its own run again, and goes on where it stopped.

# %%
from helpers.core import show
from helpers.data.workload import estimate_work
from helpers.models import estimate_memory, load_tokenizer, plan_model, resolve_start
from helpers.runs.run import start_run

start = resolve_start(settings)
if settings.dry_run:  # how much memory, how many steps; then start_run stops
    show(estimate_memory(settings, start), *estimate_work(settings))
run = start_run(settings, base_model=start.base_model)
plan = plan_model(
    start.base_model,
    tuning=settings.tuning,
    quantization=settings.quantization,
    attn_implementation=settings.attn_implementation,
    trl_args=settings.trl,
)
run.set(plan=plan.as_dict())
show(plan)

# %%
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from helpers.data.conversations import LengthLimits
from helpers.data.loading import parse_dataset_specs
from helpers.data.prepare import load_instructions
from helpers.data.report import DataReport
from helpers.data.row_report import Split
from helpers.models import lora_modules_to_save, prepare_model, save_model, trainable_token_indices, upcast_adapter
from helpers.models.chat import show_labels
from helpers.runs.curves import Curves, final_metrics, log_to_wandb
from helpers.runs.report import show_report
from helpers.training import add_callbacks

# %% [markdown]
# ## Data
#
# Every row is kept or dropped with a reason, and the table adds up. Rows with the same first prompt stay on one side of
# the split. A recipe may mix sets, with a `fraction` of each.

# %%
tokenizer, new_tokens = load_tokenizer(start, settings)

# %%
train_set, eval_set, account = load_instructions(
    parse_dataset_specs(settings),
    tokenizer,
    LengthLimits(total=settings.max_length, overlong=settings.overlong),
    Split(settings.train_rows, settings.eval_rows, settings.eval_fraction, settings.seed),
    settings.strict,
    settings.dataset_num_proc,
    settings.system_prompt,
)
run.set(data=account.as_dict() | {"train": len(train_set), "eval": len(eval_set)})
show(account, f"train {len(train_set):,}, held out {len(eval_set):,}")

# %% [markdown]
# How long the conversations are, what stands there twice, and what that will teach.

# %%
report = DataReport.of(train_set, eval_set, account, settings.max_length)
show(report, report.figure)

# %% [markdown]
# One row as the model sees it. What it learns is bold; the rest it only reads.

# %%
show(show_labels(tokenizer, train_set[0]))

# %% [markdown]
# ## How it is trained
#
# `SFTConfig` in full view; any field of it that is a flag comes last and wins.

# %%
config = dict(
    output_dir=str(run.folder),
    run_name=run.name,
    num_train_epochs=settings.num_train_epochs,
    learning_rate=settings.learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # below 1: a share of all steps
    per_device_train_batch_size=settings.per_device_train_batch_size,
    per_device_eval_batch_size=settings.per_device_eval_batch_size,
    gradient_accumulation_steps=settings.accumulation_steps(),
    max_length=settings.max_length or None,  # what packing fills; no row is longer
    optim=plan.optimizer,
    bf16=plan.bf16,
    fp16=plan.fp16,
    **plan.device_args,
    eval_strategy="steps",
    eval_steps=0.2,
    save_steps=0.2,
    save_total_limit=2,
    logging_steps=10,
    include_num_input_tokens_seen="non_padding",
    logging_nan_inf_filter=False,  # a loss that is not a number is shown, and ends the run
    report_to=settings.report_to,
    seed=settings.seed,
)
training_args = SFTConfig(**config | settings.early_stopping() | settings.trl)

# %% [markdown]
# ## Model
#
# With `qlora` the weights are loaded in 4 bits (NF4, its constants quantized again) and stay frozen; only the adapter
# learns.

# %%
set_seed(settings.seed)
model = AutoModelForCausalLM.from_pretrained(
    start.path,
    revision=start.revision or "main",
    trust_remote_code=settings.trust_remote_code,
    dtype=plan.dtype,
    quantization_config=plan.quantization,
    attn_implementation=plan.attn_implementation,
    device_map=plan.device_map,
)
prepare_model(model, tokenizer)  # adds rows for the chat template's new tokens
adapter = None
if settings.tuning != "full":
    adapter = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        use_dora=settings.tuning == "dora",
        target_modules=settings.lora_target_modules,
        modules_to_save=lora_modules_to_save(model, settings.lora_modules_to_save),
        task_type="CAUSAL_LM",
        trainable_token_indices=trainable_token_indices(model, tokenizer, new_tokens),
        revision=start.revision,  # of the base, for whoever loads the adapter
    )

# %% [markdown]
# ## Trainer
#
# TRL's own, which packs conversations into full rows with `--packing`, apart from each other.

# %%
trainer = SFTTrainer(
    model=model,
    args=training_args,
    train_dataset=train_set.select_columns(["input_ids", "labels"]),
    eval_dataset=eval_set.select_columns(["input_ids", "labels"]),
    processing_class=tokenizer,
    peft_config=adapter,
)
add_callbacks(trainer, run, settings, eval_set)  # logs, curves, findings, samples, marked checkpoints, signals
if adapter is not None and settings.adapter_dtype == "fp32":
    upcast_adapter(trainer.model)  # TRL casts QLoRA adapters to bf16, which rounds small updates away

# %% [markdown]
# ## Train
#
# The loss falls quickly at first, while the form of an answer is learned, then slowly. A run that has finished is not
# trained again, and one that was stopped goes on from its newest checkpoint.

# %%
if not run.finished:
    with run.training() as checkpoint:
        report.save(run.folder)
        trained = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = final_metrics(trainer, trained)
        save_model(trainer, run.folder)
    run.finish(metrics=metrics)

# %% [markdown]
# ## Curves
#
# The line is training, the dots are the held-out rows: while both fall, the model learns something that holds beyond
# its rows. Dots that rise again say that it has begun to learn them by heart. What is wrong stands under the figure,
# and then answers to a few held-out prompts, before and after.

# %%
curves = Curves.read(run.folder)
show(curves.figure, curves, save_as=run.folder / "curves.png")
log_to_wandb(run)  # its settings, rows, curves and samples, where it is tracked there
show(run.metrics_table())

# %% [markdown]
# ## Next
#
# The model answers now, in whatever manner its data had. The next notebook teaches it which answers are preferred.

# %%
show_report(run.folder)  # all of this on one page
print("Next:", run.next_command(settings.recipe))
