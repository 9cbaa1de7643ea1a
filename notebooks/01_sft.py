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
# **In:** a base model and conversations. **Out:** a run folder, `outputs/sft-<model>-<hash>/`. It has an adapter, or
# with `--tuning full` a complete model.
#
# ```
# python notebooks/01_sft.py                                  # Mistral-7B with QLoRA, one 24 GB GPU
# python notebooks/01_sft.py --recipe recipes/demo.yaml       # a tiny model on a laptop, about a minute
# python notebooks/01_sft.py --help                           # every setting of this notebook
# ```
#
# A base model continues text. Here it learns to answer (supervised fine-tuning, SFT). It reads complete conversations,
# but only the assistant's turns count in the loss.

# %% [markdown]
# ## Settings
#
# Set a field with a flag (`--learning_rate 1e-4`), an environment variable (`SFT_LEARNING_RATE`), a line of `.env` or a
# key of a recipe. A recipe is a YAML file of settings. In a Jupyter kernel, insert a cell before the one that calls
# `load_settings` and assign the field: `learning_rate = 1e-4`.
#
# The same works for every field of TRL's `SFTConfig`. `TrainSettings` adds the settings that 01 and 02 share, such as
# `chat_template` and `global_batch_size`. `--help` lists the settings, `--help_trl` TRL's fields.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import TrainSettings, load_settings


@dataclass
class Settings(TrainSettings):  # inherits the settings that 01 and 02 share: see --help
    """Instruction-tune a model."""

    step: ClassVar[str] = "sft"  # start of the run's name, prefix of variables, section of a recipe

    model_id: str = "mistralai/Mistral-7B-v0.1"  # base model: Hub id or folder

    dataset_id: tuple[str, ...] = ("HuggingFaceH4/ultrachat_200k",)  # conversations: Hub ids, files or folders
    dataset_split: str = "train_sft"  # split for training, and for evaluation unless eval_split is set
    train_rows: int = 20_000  # maximum number of training conversations; 0: all
    eval_rows: int = 500  # at most this many, and a quarter of all; 0: the share eval_fraction, or all of eval_split
    eval_fraction: float = 0.05  # share of rows for evaluation; see docs/data.md
    data_format: str = "auto"  # auto: by the columns; or messages, sharegpt, completion, alpaca, or one of 02_dpo.py
    max_length: int = 2048  # maximum tokens of a conversation; longer ones: see overlong; 0: no limit

    tuning: Literal["full", "lora", "qlora", "dora"] = "qlora"  # full: all weights; qlora: adapter on a 4-bit base
    lora_r: int = 64  # rank of the adapter
    lora_alpha: int = 128  # the adapter's output is scaled by lora_alpha / lora_r

    num_train_epochs: float = 1.0  # passes over the training rows
    learning_rate: float = 1e-4  # peak learning rate; for full tuning use 1e-5 to 2e-5
    per_device_train_batch_size: int = 1  # conversations per device and batch
    per_device_eval_batch_size: int = 1  # conversations per device and batch in evaluation
    gradient_accumulation_steps: int = 16  # batches per optimizer step


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Starting point and run folder
#
# `resolve_start` finds the model to train. `start_run` names the run folder after the settings, so the same command
# finds its own run. It resumes an interrupted run. If the run is finished, a command ends here and
# prints the next one. In a kernel, the cells below skip the training and show its curves.
#
# `--dry_run` prints an estimate of memory, steps, tokens and time, and `start_run` then ends the notebook. Steps and
# tokens need the dataset on disk. Time needs an earlier finished run of at least 20 steps with the same model
# and tuning.

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
# The plan says how the model is loaded on this machine: device, number format (dtype), quantization and attention
# implementation. `run.set` adds it to the run's record, which training saves as `run.json`.

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
from helpers.training import prepare_trainer, supports_packing

# %% [markdown]
# ## Data
#
# Each row is kept or dropped, and the row report counts the reasons. Evaluation rows are held out: the model is not
# trained on them. Rows with the same first prompt are either all for training or all for evaluation.
#
# `new_tokens` are the tokens that the chat template needs and the tokenizer lacks. A recipe can combine several
# datasets and take a `fraction` of each.

# %%
tokenizer, new_tokens = load_tokenizer(start, settings)
train_set, eval_set, row_report = load_instructions(settings, tokenizer)
run.set(data=row_report.as_dict())
show(row_report)

# %% [markdown]
# The data report shows lengths, duplicates and other properties that the model will learn from the rows. Lines that
# start with `!` need attention. Below the report is one row as the model sees it. The highlighted tokens count in the
# loss; the model only reads the others.

# %%
data_report = DataReport.from_datasets(train_set, eval_set, row_report=row_report, max_length=settings.max_length)
show(data_report, data_report.figure)
show_example(tokenizer, train_set[0])

# %% [markdown]
# ## Training arguments
#
# These are all arguments of `SFTConfig` that the notebook sets. Fields of `SFTConfig` that you set yourself are in
# `settings.trl`. They come last in `config`, so they override the others. `plan.device_args` has what a CPU needs;
# `settings.early_stopping()` has what `--early_stopping_patience` needs.

# %%
optimization = dict(
    num_train_epochs=settings.num_train_epochs,
    learning_rate=settings.learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # below 1: a share of all steps
    per_device_train_batch_size=settings.per_device_train_batch_size,
    per_device_eval_batch_size=settings.per_device_eval_batch_size,
    gradient_accumulation_steps=settings.accumulation_steps(),
    max_length=settings.max_length or None,  # with --packing, the length of a sequence
    optim=plan.optimizer,
    bf16=plan.bf16,
    fp16=plan.fp16,
    seed=settings.seed,
)

# %%
evaluation = dict(
    eval_strategy="steps",
    eval_steps=0.2,  # below 1: a share of all steps
    save_steps=0.2,
    save_total_limit=2,
    logging_steps=10,
    logging_nan_inf_filter=False,  # show a NaN loss, which ends the run
    include_num_input_tokens_seen="non_padding",
    report_to=settings.report_to,
)

# %%
config = optimization | evaluation | plan.device_args | settings.early_stopping() | settings.trl
training_args = SFTConfig(output_dir=str(run.folder), run_name=run.name, **config)

# %% [markdown]
# ## Model
#
# With `qlora` the base model is loaded in 4 bits (NF4 with double quantization) and is frozen. Only the adapter is
# trained: small matrices next to the linear layers ([LoRA](https://arxiv.org/abs/2106.09685)).
#
# `lora_modules_to_save` names modules that are trained in full. PEFT ignores a name that the model lacks; here it is an
# error. `lora_module_args` passes them to PEFT, with `trainable_token_indices`: the embedding rows of `new_tokens`.

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
# The trainer is TRL's own. `--packing` puts several conversations into one sequence of `max_length` tokens. Packing is
# off for a model in which they would attend to each other. `prepare_trainer` adds logs, curves, diagnostics, answers to
# evaluation prompts, and checkpoints that are safe to resume from. It lets each evaluation row count once, unless rows
# are packed, and keeps the adapter in float32: TRL casts QLoRA adapters to bfloat16, which rounds small updates away.

# %%
if training_args.packing:
    training_args.packing = supports_packing(model, train_set)
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
# The loss falls quickly at first, while the model learns the form of an answer. Then it falls slowly. `run.training()`
# gives the checkpoint to resume from, if there is one, and records in `run.json` how the training ends.

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
# If the training loss and the evaluation loss both fall, the model learns something that generalizes. If the evaluation
# loss rises again, the model starts to memorize its training rows. Below the figure are detected problems with
# suggested fixes, then answers to evaluation prompts. `log_to_wandb` sends all of this to Weights & Biases, if you use
# `--report_to wandb`.

# %%
curves = Curves.read(run.folder)
show(curves.figure, curves, save_as=run.folder / "curves.png")
curves.log_to_wandb(run)
show(run.metrics_table())

# %% [markdown]
# ## Next
#
# The model now answers in the style of its data. The next notebook teaches it which answers are preferred. The last
# cell writes `report.html`, a page about this run, and prints the next command.

# %%
show_report(run.folder)
print("Next:", run.next_command(settings.recipe))
