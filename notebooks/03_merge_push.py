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
# # 3. Merge the adapter, and publish
#
# **In:** a finished run of `02_dpo.py`. **Out:** `outputs/merge-<model>-<hash>/`, a model that needs no adapter. If you
# ask for it, also a repository on the Hub.
#
# ```
# python notebooks/03_merge_push.py                                       # the newest finished run of 02_dpo.py
# python notebooks/03_merge_push.py --run outputs/dpo-... --push_to_hub --hub_repo_id me/model
# python notebooks/03_merge_push.py --adapter FOLDER                      # another adapter, or a run of 01_sft.py
# python notebooks/03_merge_push.py --help                                # every setting of this notebook
# ```
#
# An adapter has two small matrices $A$ and $B$ for a weight $W$. Merging computes $W + \frac{\alpha}{r}BA$ in float32,
# one tensor at a time. It needs no GPU, and memory only for the largest tensor. The merged model is then compared with
# the trained policy on evaluation prompts. If the two differ, the merge is deleted.

# %% [markdown]
# ## Settings
#
# Each field is a flag (`--max_kl 0.1`), an environment variable (`MERGE_MAX_KL`), a line of `.env` and a recipe key. In
# a Jupyter kernel, insert a cell before the one that calls `load_settings` and assign the field: `max_kl = 0.1`.
# `RunSettings` adds settings that all notebooks share, such as `output_dir`; see `--help`.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Merge an adapter into its base, verify the result, and publish it."""

    step: ClassVar[str] = "merge"  # start of the run's name, prefix of variables, section of a recipe
    exclusive: ClassVar = (("run", "adapter"),)  # give only one of these

    run: str = "latest"  # finished run of 02_dpo.py: its folder, or latest
    adapter: str = ""  # folder or Hub id of an adapter, instead of a run
    base_model_id: str = ""  # base model of the adapter; by default the one in its configuration
    merge_base: Literal["auto", "original", "dequantized"] = "auto"  # auto: as in training; original if that is unknown
    merge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the result; auto: the base's
    trust_remote_code: bool = False  # run code that comes with the model
    attn_implementation: str = "auto"  # of the models that are compared; auto: sdpa, or eager for a model without it
    max_shard_size: str = "2GB"  # maximum size of a file of weights
    max_kl: float = 0.01  # maximum KL divergence from the trained policy, in nats; above it, the merge is deleted

    push_to_hub: bool = False  # publish to the Hub
    hub_repo_id: str = ""  # repository on the Hub: user/model; by default named after the run
    hub_revision: str = ""  # branch to push to; by default main
    hub_tag: str = ""  # tag for the pushed commit
    push: Literal["merged", "adapter", "both"] = "merged"  # what to publish; both: the adapter as name/model-adapter
    private: bool = True  # make a new repository private; --no_private: public
    license: str = ""  # license of the published model, for example apache-2.0; by default that of the base
    license_name: str = ""  # with --license other: name of the license
    license_link: str = ""  # with --license other: its address, or a file of the repository


# %%
settings = load_settings(Settings, globals())

# %% [markdown]
# ## The adapter
#
# A run records its base model and how it was trained. An adapter from elsewhere names its base in its configuration.
#
# Before the merge, `push_before_merge` checks that a later push can work. With `--push_to_hub --dry_run` it prints the
# files and the model card. `--push_to_hub --push adapter` publishes the adapter, which needs no merge: the cells below
# are then skipped (`is_done`). `start_run` ends the notebook with `--dry_run`. A command also ends there if the run is
# already merged and there is nothing to publish.

# %%
from helpers.core import short_path, show
from helpers.hub import push_before_merge, push_model
from helpers.merging import find_adapter, merge_adapter, verify_merge
from helpers.runs import shell_quote, show_report, start_run

adapter_ref = find_adapter(settings)
show(f"Adapter: {short_path(adapter_ref.source)}")
is_done = push_before_merge(settings, adapter_ref.source)  # True once --push adapter is published: no merge

# %%
if not is_done:
    show(f"Base model: {short_path(adapter_ref.base_model)}")
    merge_run = start_run(settings, base_model=adapter_ref.base_model, parent=adapter_ref.run)

# %% [markdown]
# ## Merge
#
# A QLoRA adapter was trained on weights that were rounded to 4 bits, and it has learned to correct for that rounding.
#
# - `--merge_base dequantized` merges it into these rounded weights, stored at full size. The result equals the trained
#   policy, and this is the default for a quantized run.
# - `--merge_base original` merges it into the published weights. The result differs in every layer. After QLoRA, its KL
#   is usually above `--max_kl`: it was 0.05 in the demo. To keep such a merge, raise `--max_kl`. Use it only if the
#   result has to start from the published weights.

# %%
if not is_done:
    merged = merge_adapter(
        adapter_ref,
        base=settings.merge_base,
        dtype=settings.merge_dtype,
        max_shard_size=settings.max_shard_size,
        output=merge_run,
    )

# %% [markdown]
# ## Verify
#
# The same evaluation prompts go through two models: the trained policy, quantized as in training, and the merged model.
# Both compute in float32 if there is memory for it. The KL divergence between their next-token distributions should be
# below 1e-8 for weights in float32. In bfloat16 it is larger, because each merged weight is rounded. The row "computed
# in bfloat16" shows what bfloat16 adds when the merged model also computes in it. A model that does not fit into memory
# is compared layer by layer.
#
# `merged.finalize` keeps the merge, or deletes it: if its KL is above `max_kl`, or not below the KL of the base alone.
# If the adapter changes the model less than rounding does, the result is inconclusive: use `--merge_dtype float32`.

# %%
if not is_done:
    verification = verify_merge(merged, adapter_ref, max_kl=settings.max_kl)
    show(verification)
    merged.finalize(verification)

# %% [markdown]
# ## Publish
#
# `--push_to_hub --hub_repo_id name/model` sends the merged folder and a model card that is written from the run. It
# also works for a run that was merged before. A new repository is private unless you use `--no_private`. Nothing is
# sent if a file contains an access token. The token for the Hub comes from `HF_TOKEN`, `.env`, or `hf auth login`.
# In an existing repository, the files of the model that was there are replaced. Your other files stay.

# %%
if settings.push_to_hub and not is_done:
    push_model(merged.folder, settings)

# %% [markdown]
# ## Use it
#
# The folder is an ordinary transformers model. It does not need this project.

# %%
if not is_done:
    folder, target = short_path(merged.folder), shell_quote(merged.folder)
    print(f"""transformers   AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")
PEFT           AutoPeftModelForCausalLM.from_pretrained({short_path(adapter_ref.source)!r})   # not merged
serve          {merged.serve_commands()}
GGUF           python llama.cpp/convert_hf_to_gguf.py {target} --outfile {target}/model.gguf --outtype bf16
evaluate       lm_eval --model hf --model_args pretrained={target},dtype=auto --tasks ifeval --apply_chat_template""")

# %% [markdown]
# ## Next
#
# The next notebook shows how the model's answers changed. For an adapter from elsewhere, it compares the base model
# with the merged model.

# %%
if not is_done:
    show_report(merge_run.folder)  # updates report.html of the training run, with the verification
    print("Next:", merge_run.next_command(settings.recipe))
