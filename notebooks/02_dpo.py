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
# # 2. Align it on preferences
#
# **In:** a model that answers, and pairs of a better and a worse answer. **Out:** an adapter, in `outputs/dpo-.../`.
#
# ```
# python notebooks/02_dpo.py                                  # Mistral-7B-Instruct, QLoRA, a 24 GB GPU
# python notebooks/02_dpo.py --sft_run latest                 # on from the newest run of 01_sft.py
# python notebooks/02_dpo.py --recipe recipes/demo.yaml       # a tiny model on a laptop, half a minute
# python notebooks/02_dpo.py --help                           # every setting
# ```
#
# DPO (Rafailov et al., 2023, arXiv:2305.18290) needs neither a reward model nor sampling. With a frozen copy of the
# model as the reference, it raises the likelihood of the chosen answer against the rejected one:
#
# $$-\log\sigma\Big(\beta\log\frac{\pi(y_c|x)}{\pi_{ref}(y_c|x)}-\beta\log\frac{\pi(y_r|x)}{\pi_{ref}(y_r|x)}\Big)$$

# %% [markdown]
# ## Settings
#
# Each is a flag (`--dpo_beta 0.3`), a variable (`DPO_BETA`), a line of `.env`, a recipe key; so is all of `DPOConfig`.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings.load import TrainSettings, load_settings, one_of


@dataclass
class Settings(TrainSettings):  # which has some more: --help lists them
    """Align a model on preference pairs."""

    step: ClassVar[str] = "dpo"

    model_id: str = "mistralai/Mistral-7B-Instruct-v0.2"  # model to align: a Hub id or a folder
    sft_run: str = ""  # start from a finished run of 01_sft.py instead: its folder, or latest
    dataset_id: tuple[str, ...] = ("argilla/ultrafeedback-binarized-preferences-cleaned",)  # Hub ids, files, folders
    dataset_split: str = "train"  # the split that is read; evaluation pairs are taken from it
    train_rows: int = 11_000  # pairs to train on; 0 takes all
    eval_rows: int = 2_750  # pairs held out; 0 takes eval_fraction of them
    eval_fraction: float = 0.2  # share held out where eval_rows is 0
    data_format: str = "auto"  # by the columns; or messages, triplet, orca, ranked, transcript, alpaca_farm, scored
    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = (
        "best_vs_worst"  # of several ranked answers: the best against which others
    )
    recommended: bool = False  # keep only the rows that the dataset's card recommends (distilabel-intel-orca)
    min_margin: float = 0.0  # pairs rated closer than this are dropped; ties always are
    max_prompt_length: int = 1024  # tokens of a prompt; 0 for no limit
    max_length: int = 1512  # tokens of a prompt and its answer, likewise
    dpo_beta: float = 0.1  # how strongly the reference holds the policy back; higher is less divergence
    loss_type: tuple[str, ...] = ("sigmoid",)  # TRL's losses by name, summed; "sigmoid sft" keeps chosen answers likely
    num_train_epochs: float = 1.0  # passes over the pairs
    learning_rate: float = 5e-5  # the highest; 5e-7 to 1e-6 suits tuning in full
    per_device_train_batch_size: int = 1  # pairs at a time
    gradient_accumulation_steps: int = 16  # batches to one step
    tuning: Literal["full", "lora", "qlora", "dora"] = "qlora"  # all weights, or an adapter; qlora's base is in 4 bits
    lora_r: int = 256  # rank of the adapter
    lora_alpha: int = 128  # its scale: alpha / r multiplies what it adds
    shared_prefix: Literal["auto", "on", "off"] = "auto"  # compute each prompt once for both answers: same gradients
    merge_adaptors: bool = False  # merge the adapter into its base afterwards, as 03_merge_push.py does
    push_to_hub: bool = False  # publish afterwards, privately, as 03_merge_push.py does
    hub_repo_id: str = ""  # where to: name/model


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: take away the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Where it starts, the machine, and the run
#
# From a published model, or a run of `01_sft.py`. The same command finds its run again, and goes on where it stopped.

# %%
from helpers.core import show
from helpers.data.workload import estimate_work
from helpers.hub import check_push, merge_and_push
from helpers.models import estimate_memory, load_tokenizer, plan_model, resolve_start
from helpers.runs.run import start_run

one_of(settings, "model_id", "sft_run")
start = resolve_start(settings)
if settings.push_to_hub:
    check_push(settings)  # before hours of training
if settings.dry_run:  # how much memory, how many steps; then start_run stops
    show(estimate_memory(settings, start), *estimate_work(settings, start.parent))
run = start_run(settings, base_model=start.base_model, parent=start.parent, when_finished=merge_and_push)
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
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOConfig

from helpers.data.conversations import LengthLimits
from helpers.data.formats import PairingConfig
from helpers.data.loading import parse_dataset_specs
from helpers.data.prepare import load_preferences
from helpers.data.report import DataReport
from helpers.data.row_report import Split
from helpers.hub import merge_and_push
from helpers.models import lora_modules_to_save, prepare_model, save_model, trainable_token_indices, upcast_adapter
from helpers.models.chat import render
from helpers.runs.curves import Curves, final_metrics, log_to_wandb
from helpers.runs.report import show_report
from helpers.training import SharedPrefixDPOTrainer, add_callbacks

# %% [markdown]
# ## Data
#
# Every row becomes a pair or is dropped with a reason, and the table adds up: pairs whose answers are the same teach
# nothing, and pairs that are too long would lose the end of their answers (`--overlong truncate_prompt` shortens their
# prompts instead). A prompt is on one side of the split only. A report says what the pairs will teach beside that.

# %%
tokenizer, new_tokens = load_tokenizer(start, settings)

# %%
train_set, eval_set, account = load_preferences(
    parse_dataset_specs(settings),
    tokenizer,
    LengthLimits(settings.max_prompt_length, settings.max_length, settings.overlong),
    PairingConfig(settings.pairing, settings.recommended, settings.min_margin, settings.system_prompt, settings.seed),
    Split(settings.train_rows, settings.eval_rows, settings.eval_fraction, settings.seed),
    settings.strict,
    settings.dataset_num_proc,
)
run.set(data=account.as_dict() | {"train": len(train_set), "eval": len(eval_set)})
show(account, f"train {len(train_set):,}, held out {len(eval_set):,}")

# %%
report = DataReport.of(train_set, eval_set, account, settings.max_length)
show(report, report.figure)
print(render(tokenizer, (pair := train_set[0])["prompt"], prompt=True))  # one pair as the model sees it
print("  chosen:  ", tokenizer.decode(pair["chosen_ids"]), "\n  rejected:", tokenizer.decode(pair["rejected_ids"]))

# %% [markdown]
# ## How it is trained
#
# `DPOConfig` in full view; any field of it that is a flag comes last and wins.

# %%
config = dict(
    output_dir=str(run.folder),
    run_name=run.name,
    beta=settings.dpo_beta,
    loss_type=list(settings.loss_type),
    max_length=settings.max_length or None,
    num_train_epochs=settings.num_train_epochs,
    learning_rate=settings.learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # below 1: a share of all steps
    max_grad_norm=0.3,
    per_device_train_batch_size=settings.per_device_train_batch_size,
    per_device_eval_batch_size=settings.per_device_train_batch_size,
    gradient_accumulation_steps=settings.accumulation_steps(),
    optim=plan.optimizer,
    bf16=plan.bf16,
    fp16=plan.fp16,
    **plan.device_args,
    eval_strategy="steps",
    eval_on_start=True,  # the curves begin where policy and reference are one
    eval_steps=0.2,
    save_steps=0.2,
    save_total_limit=2,
    logging_steps=10,
    include_num_input_tokens_seen="non_padding",
    logging_nan_inf_filter=False,  # a loss that is not a number is shown, and ends the run
    report_to=settings.report_to,
    seed=settings.seed,
)
training_args = DPOConfig(**config | settings.early_stopping() | settings.trl)

# %% [markdown]
# ## Model
#
# The reference is the base with its adapter off, a frozen copy of an adapter of `01_sft.py`, or (full) a second model.

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
prepare_model(model, tokenizer)  # adds rows for the chat template's new tokens
adapter = reference = None
if start.adapter:
    model = PeftModel.from_pretrained(model, start.adapter, is_trainable=True)
elif settings.tuning != "full":
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
if settings.tuning == "full" and not training_args.precompute_ref_log_probs:
    reference = AutoModelForCausalLM.from_pretrained(start.path, **loading)
    prepare_model(reference, tokenizer)

# %%
trainer = SharedPrefixDPOTrainer(  # TRL's DPOTrainer, on tokens, and with each prompt computed once
    model=model,
    ref_model=reference,
    args=training_args,
    train_dataset=train_set,
    eval_dataset=eval_set,
    processing_class=tokenizer,
    peft_config=adapter,
    shared_prefix=settings.shared_prefix,
)
add_callbacks(trainer, run, settings, eval_set)  # logs, curves, findings, samples, marked checkpoints, signals
if settings.tuning != "full" and settings.adapter_dtype == "fp32":
    upcast_adapter(trainer.model)  # TRL casts QLoRA adapters to bf16, which rounds most of DPO's updates away

# %% [markdown]
# ## Train
#
# The sigmoid loss starts at log 2 = 0.693, where policy and reference are one, and falls as the margin between chosen
# and rejected rewards grows. A run that has finished is not trained again, and one that was stopped goes on.

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
# The margin should rise, on the held-out dots as on the line, and the chosen answers stay as likely as they were. What
# went wrong stands under the figure with what to try (`--stop_on_diagnostic displacement` ends such a run), then what was sampled.

# %%
show((curves := Curves.read(run.folder)).figure, curves, save_as=run.folder / "curves.png")
log_to_wandb(run)  # its settings, rows, curves and samples, where it is tracked there
show(run.metrics_table())

# %% [markdown]
# ## Merge and publish, if asked
#
# `--merge_adaptors` and `--push_to_hub --hub_repo_id name/model` do here what the next notebook does, privately.

# %%
if settings.merge_adaptors or settings.push_to_hub:
    trainer = model = reference = None  # makes room: the merge is a process of its own
    merge_and_push(run, settings)

# %% [markdown]
# ## Next
#
# The adapter needs its base. The next notebook merges the two, and shows that nothing changed on the way.

# %%
show_report(run.folder)  # all of this on one page
print("Next:", run.next_command(settings.recipe))
