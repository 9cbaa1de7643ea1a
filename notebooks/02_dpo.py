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
# # 2. Align the model on preferences
#
# **In:** a model that answers, and preference pairs. **Out:** `outputs/dpo-<model>-<hash>/` with an adapter or a model.
#
# ```
# python notebooks/02_dpo.py                                  # Mistral-7B-Instruct-v0.2, QLoRA, one 24 GB GPU
# python notebooks/02_dpo.py --sft_run latest                 # start from the newest run of 01_sft.py
# python notebooks/02_dpo.py --recipe recipes/demo.yaml       # after 01 with this recipe: a tiny model on a laptop
# ```
#
# DPO (Rafailov et al., 2023, arXiv:2305.18290) trains the policy $\pi$ on prompts $x$ with a chosen answer $y_c$ and a
# rejected answer $y_r$. The reference $\pi_{ref}$ is a frozen copy of the initial policy, and $\sigma$ is the sigmoid.
# The loss of a pair is:
#
# $$-\log\sigma\Big(\beta\log\frac{\pi(y_c|x)}{\pi_{ref}(y_c|x)}-\beta\log\frac{\pi(y_r|x)}{\pi_{ref}(y_r|x)}\Big)$$

# %% [markdown]
# ## Settings
#
# Each field is a flag (`--lora_r 16`), an environment variable (`DPO_LORA_R`), a line of `.env` and a recipe key. So is
# every field of TRL's `DPOConfig`. In a Jupyter kernel, insert a cell before `load_settings` and assign the field:
# `lora_r = 16`. `TrainSettings` adds settings such as `chat_template`; see `--help`.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import TrainSettings, load_settings


@dataclass
class Settings(TrainSettings):  # inherits the settings that 01 and 02 share: see --help
    """Align a model on preference pairs."""

    step: ClassVar[str] = "dpo"  # start of the run's name, prefix of variables, section of a recipe
    exclusive: ClassVar = (("model_id", "sft_run"),)  # give only one of these

    model_id: str = "mistralai/Mistral-7B-Instruct-v0.2"  # model to align: Hub id or folder
    sft_run: str = ""  # start from a finished run of 01, or of 02, instead: its folder; latest: the newest run of 01
    dataset_id: tuple[str, ...] = ("argilla/ultrafeedback-binarized-preferences-cleaned",)  # Hub ids, files, folders
    dataset_split: str = "train"  # split for training, and for evaluation unless eval_split is set
    train_rows: int = 11_000  # maximum number of training pairs; 0: all
    eval_rows: int = 2_750  # at most this many, and a quarter of all; 0: the share eval_fraction, or all of eval_split
    eval_fraction: float = 0.2  # share of pairs for evaluation; see docs/data.md
    data_format: str = "auto"  # auto: by the columns; or messages, pairs, orca, ranked, hh, alpaca_farm, scored
    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = "best_vs_worst"  # for ranked or scored answers
    recommended: bool = False  # keep only rows that the dataset's card recommends (distilabel-intel-orca)
    min_margin: float = 0.0  # drop pairs whose ratings differ by less than this; equal ratings are always dropped
    max_prompt_length: int = 1024  # maximum tokens of a prompt; 0: no limit
    max_length: int = 1512  # maximum tokens of prompt and answer; longer rows: see overlong; 0: no limit
    dpo_beta: float = 0.1  # β: strength of the constraint towards the reference model
    loss_type: tuple[str, ...] = ("sigmoid",)  # losses of TRL, added up; "sigmoid sft" keeps chosen answers likely
    num_train_epochs: float = 1.0  # passes over the training pairs
    learning_rate: float = 5e-5  # peak learning rate; for full tuning use 5e-7 to 1e-6
    per_device_train_batch_size: int = 1  # pairs per device and batch
    gradient_accumulation_steps: int = 16  # batches per optimizer step
    tokens_per_microbatch: Literal["auto"] | int = "auto"  # maximum; auto: what fits on the GPU (CPU: 4,096); 0: off
    tuning: Literal["full", "lora", "qlora", "dora"] = "qlora"  # full: all weights; qlora: adapter on a 4-bit base
    lora_r: int = 256  # rank of the adapter
    lora_alpha: int = 128  # the adapter's output is scaled by lora_alpha / lora_r
    shared_prefix: Literal["auto", "on", "off"] = "auto"  # compute a pair's prompt once; auto: if equal to TRL
    merge_adaptors: bool = False  # merge the adapter after training, with 03_merge_push.py
    push_to_hub: bool = False  # publish privately after training: the adapter, or with merge_adaptors the merged model
    hub_repo_id: str = ""  # repository on the Hub: user/model; by default named after the run


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Starting point and run folder
#
# The policy starts from a published model or from a run of `01_sft.py`. `start_run` names the run folder after the
# settings, so the same command finds its own run. It resumes an interrupted run. If the run is finished,
# `when_finished` merges or publishes it if you ask for that, and a command ends here. In a kernel, the cells below skip
# the training. `--dry_run` prints an estimate of memory, steps, tokens and time, and `start_run` ends the notebook. The
# run's record, `run.json`, has the plan for loading the model.

# %%
from helpers.core import show
from helpers.data import estimate_workload
from helpers.hub import check_push, merge_and_push
from helpers.models import estimate_memory, plan_model, resolve_start
from helpers.runs import start_run

start = resolve_start(settings)  # a Hub id, a folder, or an SFT run with its adapter
if settings.push_to_hub:
    check_push(settings)  # token and repository, before hours of training
if settings.dry_run:
    show(estimate_memory(settings, start), estimate_workload(settings, start))
run = start_run(settings, base_model=start.base_model, parent=start.parent, when_finished=merge_and_push)

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
from trl import DPOConfig

from helpers.data import DataReport, load_preferences, show_example
from helpers.models import load_adapter, load_tokenizer, lora_module_args, prepare_model, save_model
from helpers.runs import Curves, final_metrics, show_report
from helpers.training import MicroBatchDPOTrainer, microbatch_tokens, prepare_trainer

# %% [markdown]
# ## Data
#
# Each row becomes a pair or is dropped, and the row report counts the reasons. Pairs with identical answers teach
# nothing and are dropped. So are pairs longer than `max_prompt_length` or `max_length`; `--overlong truncate_prompt`
# shortens their prompts instead.
# Evaluation pairs are held out: the model is not trained on their prompts. `new_tokens` come from the chat template.

# %%
tokenizer, new_tokens = load_tokenizer(start, settings)
train_set, eval_set, row_report = load_preferences(settings, tokenizer)
run.set(data=row_report.as_dict())
show(row_report)

# %% [markdown]
# The data report shows what else the pairs teach: lengths, repeated prompts, answers with the same first words. Lines
# that start with `!` need attention. Below the report is one pair as the model sees it.

# %%
data_report = DataReport.from_datasets(train_set, eval_set, row_report=row_report, max_length=settings.max_length)
show(data_report, data_report.figure)
show_example(tokenizer, train_set[0])

# %% [markdown]
# ## Training arguments
#
# All arguments of `DPOConfig` that the notebook sets are here. Those that you set (`settings.trl`) come last and win.

# %%
optimization = dict(
    num_train_epochs=settings.num_train_epochs,
    learning_rate=settings.learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # below 1: a share of all steps
    max_grad_norm=0.3,
    per_device_train_batch_size=settings.per_device_train_batch_size,
    per_device_eval_batch_size=settings.per_device_train_batch_size,  # with micro-batches: all pairs of a step
    gradient_accumulation_steps=settings.accumulation_steps(),
    optim=plan.optimizer,
    bf16=plan.bf16,
    fp16=plan.fp16,
    seed=settings.seed,
)

# %%
evaluation = dict(
    eval_strategy="steps",
    eval_on_start=True,  # the curves start where policy and reference are equal
    eval_steps=0.2,  # below 1: a share of all steps
    save_steps=0.2,
    save_total_limit=2,
    logging_steps=10,
    logging_nan_inf_filter=False,  # show a NaN loss, which ends the run
    include_num_input_tokens_seen="non_padding",
    report_to=settings.report_to,
)

# %%
objective = dict(beta=settings.dpo_beta, loss_type=list(settings.loss_type), max_length=settings.max_length or None)
config = objective | optimization | evaluation | plan.device_args | settings.early_stopping() | settings.trl
training_args = DPOConfig(output_dir=str(run.folder), run_name=run.name, **config)

# %% [markdown]
# ## Model
#
# With `qlora` the base is loaded in 4 bits and is frozen; only the adapter is trained. Which model is the
# reference depends on what is trained:
# - With a new adapter, the reference is the model with the adapter disabled.
# - With the adapter of an SFT run, training continues at that adapter's rank. A frozen copy of it is the reference.
# - With `--tuning full`, the reference is a second model, unless you use `--precompute_ref_log_probs True`.

# %%
set_seed(settings.seed)
loading = dict(
    revision=start.revision or "main",
    trust_remote_code=settings.trust_remote_code,
    dtype=plan.dtype,
    quantization_config=plan.quantization,
    attn_implementation=plan.attn_implementation,
    device_map=plan.device_map,
)
model = AutoModelForCausalLM.from_pretrained(start.path, **loading)
prepare_model(model, tokenizer)  # adds embedding rows for new tokens

# %%
peft_config = reference = None
if start.adapter:
    model = load_adapter(model, start.adapter, is_trainable=True)
elif settings.tuning != "full":
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
elif not training_args.precompute_ref_log_probs:
    reference = AutoModelForCausalLM.from_pretrained(start.path, **loading)
    prepare_model(reference, tokenizer)

# %% [markdown]
# ## Trainer
#
# The trainer is TRL's `DPOTrainer` on tokenized pairs. It computes a prompt once per pair, and compares its first batch
# with TRL's own computation. It splits the pairs of an optimizer step into micro-batches of `tokens_per_microbatch`
# tokens at most. Gradients stay those of the batch size times the accumulation steps. `prepare_trainer` adds logs,
# curves, diagnostics, answers to evaluation prompts and safe checkpoints. It lets each evaluation pair count once, and
# keeps the adapter in float32: TRL casts QLoRA adapters to bfloat16, which rounds small updates away.

# %%
trainer = MicroBatchDPOTrainer(
    model=model,
    ref_model=reference,
    args=training_args,
    train_dataset=train_set,
    eval_dataset=eval_set,
    processing_class=tokenizer,
    peft_config=peft_config,
    shared_prefix=settings.shared_prefix,
    tokens_per_microbatch=microbatch_tokens(settings, model),
)
prepare_trainer(trainer, run, settings=settings, eval_set=eval_set)

# %% [markdown]
# ## Train
#
# A reward is β times the log-ratio of policy and reference. The margin is the reward of the chosen answer minus that of
# the rejected one. As it grows, the loss falls: from log 2 = 0.693 for `sigmoid`, but not for the demo's `sigmoid sft`.

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
# The margin should rise on evaluation pairs too, and chosen answers should stay as likely as they were. Below the
# figure are detected problems with suggested fixes, then answers to evaluation prompts.

# %%
curves = Curves.read(run.folder)
show(curves.figure, curves, save_as=run.folder / "curves.png")
curves.log_to_wandb(run)  # with --report_to wandb
show(run.metrics_table())

# %% [markdown]
# ## Merge and publish (optional)
#
# `--merge_adaptors` and `--push_to_hub --hub_repo_id name/model` run `03_merge_push.py` as a new process.

# %%
if settings.merge_adaptors or settings.push_to_hub:
    trainer = model = reference = None  # free their memory for the merge
    merge_and_push(run, settings)

# %% [markdown]
# ## Next
#
# An adapter works only with its base model. The next notebook merges the two. A fully tuned model skips that notebook.

# %%
show_report(run.folder)
print("Next:", run.next_command(settings.recipe))
