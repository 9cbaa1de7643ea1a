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
# A base model continues text. Here it learns to answer. It reads complete conversations, and only the assistant's
# turns count in the loss.

# %% [markdown]
# ## Settings
#
# Each field is a flag (`--learning_rate 1e-4`), a variable (`SFT_LEARNING_RATE`), a line of `.env` and a recipe key.
# So is every field of TRL's `SFTConfig`.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import TrainSettings, load_settings


@dataclass
class Settings(TrainSettings):  # inherits the settings that 01 and 02 share: see --help
    """Instruction-tune a model."""

    step: ClassVar[str] = "sft"

    model_id: str = "mistralai/Mistral-7B-v0.1"  # base model: Hub id or folder

    dataset_id: tuple[str, ...] = ("HuggingFaceH4/ultrachat_200k",)  # conversations: Hub ids, files, folders
    dataset_split: str = "train_sft"  # split to read; evaluation rows are taken from it
    train_rows: int = 20_000  # training conversations; 0: all
    eval_rows: int = 500  # evaluation conversations; 0: eval_fraction of all
    eval_fraction: float = 0.05  # share of rows for evaluation if eval_rows is 0
    data_format: str = "auto"  # auto, messages, completion, alpaca, or a format of 02_dpo.py
    max_length: int = 2048  # maximum tokens of a conversation; 0: no limit

    tuning: Literal["full", "lora", "qlora", "dora"] = "qlora"  # full: all weights; qlora: adapter on a 4-bit base
    lora_r: int = 64  # rank of the adapter
    lora_alpha: int = 128  # scale of the adapter: alpha / r

    num_train_epochs: float = 1.0  # passes over the training rows
    learning_rate: float = 1e-4  # peak learning rate; for full tuning 1e-5 to 2e-5
    per_device_train_batch_size: int = 1  # conversations per device and batch
    per_device_eval_batch_size: int = 1  # the same for evaluation
    gradient_accumulation_steps: int = 16  # batches per optimizer step


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Starting point and run folder
#
# The run's name follows from the settings, so the same command finds its own run: an interrupted run resumes, a
# finished run is not trained again. `--dry_run` stops here, with an estimate of memory, steps and tokens.

# %%
from helpers.core import show
from helpers.data import estimate_workload
from helpers.models import estimate_memory, plan_model, resolve_start
from helpers.runs import start_run

start = resolve_start(settings)
if settings.dry_run:
    show(estimate_memory(settings, start), estimate_workload(settings, start))
run = start_run(settings, base_model=start.base_model)

# %% [markdown]
# One decision on device, dtype, quantization and attention, from what this machine has.

# %%
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

from helpers.data import DataReport, load_instructions, show_example
from helpers.models import load_tokenizer, lora_module_args, prepare_model, save_model
from helpers.runs import Curves, final_metrics, show_report
from helpers.training import prepare_trainer

# %% [markdown]
# ## Data
#
# Every row is kept or dropped with a reason, and the counts add up. Rows with the same first prompt are on one side of
# the split. A recipe can mix several datasets, with a `fraction` of each.

# %%
tokenizer, new_tokens = load_tokenizer(start, settings)
train_set, eval_set, row_report = load_instructions(settings, tokenizer)
run.set(data=row_report.as_dict())
show(row_report)

# %% [markdown]
# The data report shows lengths, duplicates and what they will teach. Below it is one row as the model sees it: the
# tokens it learns are highlighted, the others are only read.

# %%
data_report = DataReport.of(train_set, eval_set, row_report=row_report, max_length=settings.max_length)
show(data_report, data_report.figure)
show_example(tokenizer, train_set[0])

# %% [markdown]
# ## Training arguments
#
# `SFTConfig` in full view. Any of its fields that you set as a flag, a variable or a recipe key comes last and wins.

# %%
optimization = dict(
    num_train_epochs=settings.num_train_epochs,
    learning_rate=settings.learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # below 1: a share of all steps
    per_device_train_batch_size=settings.per_device_train_batch_size,
    per_device_eval_batch_size=settings.per_device_eval_batch_size,
    gradient_accumulation_steps=settings.accumulation_steps(),
    max_length=settings.max_length or None,  # the length of packed rows
    optim=plan.optimizer,
    bf16=plan.bf16,
    fp16=plan.fp16,
    seed=settings.seed,
)

# %%
evaluation = dict(
    eval_strategy="steps",
    eval_steps=0.2,
    save_steps=0.2,
    save_total_limit=2,
    logging_steps=10,
    logging_nan_inf_filter=False,  # a NaN loss is shown and ends the run
    include_num_input_tokens_seen="non_padding",
    report_to=settings.report_to,
)

# %%
config = optimization | evaluation | plan.device_args | settings.early_stopping() | settings.trl
training_args = SFTConfig(output_dir=str(run.folder), run_name=run.name, **config)

# %% [markdown]
# ## Model
#
# With `qlora` the base is loaded in 4 bits (NF4 with double quantization) and frozen; only the adapter learns.

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
prepare_model(model, tokenizer)  # adds embedding rows for new tokens

# %%
peft_config = None
if settings.tuning != "full":
    peft_config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        use_dora=settings.tuning == "dora",
        target_modules=settings.lora_target_modules,
        task_type="CAUSAL_LM",
        revision=start.revision,  # of the base
        **lora_module_args(model, tokenizer, new_tokens=new_tokens, modules_to_save=settings.lora_modules_to_save),
    )

# %% [markdown]
# ## Trainer
#
# The trainer is TRL's own. `--packing` fills rows of `max_length` tokens with several conversations, which do not see
# each other. `prepare_trainer` adds logs, curves, diagnostics, sampled answers and safe checkpoints. It also
# undoes TRL's cast of QLoRA adapters to bfloat16, which rounds small updates away.

# %%
trainer = SFTTrainer(
    model=model,
    args=training_args,
    train_dataset=train_set.select_columns(["input_ids", "labels"]),
    eval_dataset=eval_set.select_columns(["input_ids", "labels"]),
    processing_class=tokenizer,
    peft_config=peft_config,
)
prepare_trainer(trainer, run, settings=settings, eval_set=eval_set)

# %% [markdown]
# ## Train
#
# The loss falls quickly at first, while the model learns the form of an answer, then slowly.

# %%
if not run.finished:
    with run.training() as checkpoint:
        data_report.save(run.folder)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = final_metrics(trainer, result)
        save_model(trainer, run.folder)
    run.finish(metrics=metrics)

# %% [markdown]
# ## Curves
#
# While training and held-out loss both fall, the model learns something that generalizes. A held-out loss that rises
# again means that it starts to memorize its rows. Detected problems and suggested fixes are listed below the figure,
# then answers to held-out prompts.

# %%
curves = Curves.read(run.folder)
show(curves.figure, curves, save_as=run.folder / "curves.png")
curves.log_to_wandb(run)
show(run.metrics_table())

# %% [markdown]
# ## Next
#
# The model now answers, in the style of its data. The next notebook teaches it which answers are preferred.

# %%
show_report(run.folder)
print("Next:", run.next_command(settings.recipe))
