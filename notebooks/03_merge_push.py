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
# **In:** a finished run of `02_dpo.py`. **Out:** `outputs/merge-<model>-<hex>/`, a model that needs no adapter, and a
# repository on the Hub if you ask for it.
#
# ```
# python notebooks/03_merge_push.py                                       # the newest finished run
# python notebooks/03_merge_push.py --run outputs/dpo-... --push_to_hub --hub_repo_id me/model
# python notebooks/03_merge_push.py --adapter FOLDER                      # an adapter from elsewhere
# ```
#
# Merging adds the product of an adapter's two matrices to the weight it belongs to, $W + \frac{\alpha}{r}BA$. It is
# computed in float32, one tensor at a time, so one tensor has to fit into memory and no GPU is needed. The merged model
# is then compared with the trained policy on held-out prompts, and deleted if the two differ.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Merge an adapter into its base, verify the result, and publish it."""

    step: ClassVar[str] = "merge"
    exclusive: ClassVar = (("run", "adapter"),)

    run: str = "latest"  # finished run of 02_dpo.py: its folder, or latest
    adapter: str = ""  # folder or Hub id of an adapter, instead of a run
    base_model_id: str = ""  # base of the adapter, if not the one it names
    merge_base: Literal["auto", "original", "dequantized"] = "auto"  # auto: dequantized after training in 4 or 8 bits
    merge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the merged weights; auto: the base's
    trust_remote_code: bool = False  # run code that comes with the model
    max_shard_size: str = "2GB"  # size limit of a file of weights
    max_kl: float = 0.01  # largest KL to the trained policy, in nats; a merge above it is deleted
    compare_merges: bool = False  # for a quantized run: also merge in other ways, and print how far each is

    push_to_hub: bool = False  # publish
    hub_repo_id: str = ""  # repository: name/model
    hub_revision: str = ""  # branch to push to; main by default
    hub_tag: str = ""  # tag for the pushed commit
    push: Literal["merged", "adapter", "both"] = "merged"  # what to publish; both: the adapter as name/model-adapter
    private: bool = True  # only visible to you; --no_private for a public repository
    license: str = ""  # of the published model, for example apache-2.0; the base's by default


# %%
settings = load_settings(Settings, globals())

# %% [markdown]
# ## The adapter
#
# A run knows its base and how it was trained. An adapter from elsewhere names its base in its configuration.

# %%
from helpers.core import short_path, show
from helpers.hub import print_files, push_before_merge, push_model
from helpers.merging import compare_merges, find_adapter, merge_adapter, verify_merge
from helpers.runs import show_report, start_run

adapter_ref = find_adapter(settings)
push_before_merge(settings, adapter_ref.source)  # --dry_run prints what would be sent; --push adapter ends here

# %%
merge_run = start_run(settings, base_model=adapter_ref.base_model, parent=adapter_ref.run)

# %% [markdown]
# ## Merge
#
# A QLoRA adapter was trained on weights that were rounded to 4 bits, and has learned to correct for that.
# **dequantized** adds it to exactly these weights: the merged model is the trained policy, at full size.
# **original** adds it to the published weights. The result differs a little in every layer. Choose it if one copy of
# the published weights has to serve several adapters.

# %%
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
# Held-out prompts go through the trained policy, 4 bits included, and through the merged model. Expect a KL of about
# 1e-8 in float32, and up to about 1e-3 in bfloat16, where each weight is rounded once more. The KL of the base alone
# should be much larger: the adapter has an effect, and the merge kept it. A model that does not fit into memory is
# compared layer by layer.

# %%
verification = verify_merge(merged, adapter_ref)
show(verification)
merged.finalize(verification, max_kl=settings.max_kl)
print_files(merged.folder)

# %% [markdown]
# `--compare_merges` also merges a quantized run in the other ways. PEFT's own merge into 4-bit weights rounds most of
# the adapter away.

# %%
if settings.compare_merges:
    show(compare_merges(adapter_ref, merged))

# %% [markdown]
# ## Publish
#
# `--push_to_hub --hub_repo_id name/model` sends the files above and a model card that is written from the run, also
# after a merge that was finished before. The repository is private unless you use `--no_private`. Nothing is sent if a
# file contains a token. `--dry_run` prints the files and the card. The token comes from `HF_TOKEN`, `.env`, or
# `hf auth login`.

# %%
if settings.push_to_hub:
    push_model(merged.folder, settings)

# %% [markdown]
# ## Use it
#
# The folder is a model like any other, and needs nothing of this repository.

# %%
folder = short_path(merged.folder)
print(f"""transformers   AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
PEFT           AutoPeftModelForCausalLM.from_pretrained("{short_path(adapter_ref.source)}")   # not merged
serve          vllm serve {folder}
               transformers serve {folder}
GGUF           python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {folder}/model.gguf --outtype bf16
evaluate       lm_eval --model hf --model_args pretrained={folder},dtype=auto --tasks ifeval --apply_chat_template""")

# %% [markdown]
# ## Next
#
# The next notebook shows how the model's answers changed.

# %%
show_report(merge_run.folder)  # of the run that was merged, with the verification
print("Next:", merge_run.next_command(settings.recipe))
