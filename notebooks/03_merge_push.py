# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Merge the adapter, and publish
#
# **In:** a finished run of `02_dpo.py`. **Out:** `outputs/merge-<model>-<hex>/`, one model that needs no adapter; on
# the Hub only when asked.
#
# ```
# python notebooks/03_merge_push.py                                       # the newest finished run
# python notebooks/03_merge_push.py --run outputs/dpo-... --push_to_hub --hub_repo_id me/model
# python notebooks/03_merge_push.py --adapter FOLDER                      # an adapter from elsewhere
# ```
#
# Merging adds each adapter's product to the weight it belongs to, $W + \frac{\alpha}{r}BA$. Everything happens on the
# CPU, so it works next to a training and on a machine without a GPU.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Merge an adapter into its base and publish the result."""

    step: ClassVar[str] = "merge"

    run: str = "latest"  # finished run of 02_dpo.py: its folder, or latest
    adapter: str = ""  # an adapter's folder or Hub id, in place of a run
    base_model_id: str = ""  # the adapter's base, where it is not the one it names
    trust_remote_code: bool = False  # run code that comes with the model
    max_shard_size: str = "2GB"  # largest file of weights
    max_kl: float = 0.01  # nats; a merge that moves the answers further than this is not kept

    push_to_hub: bool = False  # publish
    hub_repo_id: str = ""  # where to: name/model
    what: Literal["merged", "adapter"] = "merged"  # what is published
    private: bool = True  # visible to its owner only; --no_private for everybody


# %%
settings = load_settings(Settings, globals())

# %% [markdown]
# ## What is merged

# %%
from pathlib import Path

from helpers.display import show
from helpers.errors import Stop, UserError
from helpers.hub import files_to_push, push_folder
from helpers.runs import find_run, start_run
from helpers.settings import one_of
from helpers.sources import find_adapter

one_of(settings, "run", "adapter")
source = None if settings.adapter else find_run(settings.output_dir, settings.run, "dpo")
to_push = Path(settings.adapter) if settings.adapter else source.folder
if settings.push_to_hub and settings.what == "adapter" and not settings.dry_run:
    push_folder(to_push, settings.hub_repo_id, settings.private)  # as it is: an adapter, or a model tuned in full
    raise Stop("Nothing was merged for that.")
policy_from = find_adapter(str(to_push), settings.base_model_id)
merge_run = start_run(settings, base_model=source.base_model if source else policy_from.base, parent=source)
print(f"adapter {policy_from.adapter}\nbase    {policy_from.base}")

# %%
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chat import apply_chat_format
from helpers.embeddings import fit_embeddings
from helpers.merging import compare_logits, comparison_table, last_logits

tokenizer = AutoTokenizer.from_pretrained(policy_from.tokenizer, trust_remote_code=settings.trust_remote_code)
apply_chat_format(tokenizer, "auto")
base = AutoModelForCausalLM.from_pretrained(
    policy_from.base,
    revision=policy_from.revision or "main",
    dtype="auto",
    device_map="cpu",
    trust_remote_code=settings.trust_remote_code,
)
fit_embeddings(base, tokenizer)  # rows for tokens that the chat format added
policy = PeftModel.from_pretrained(base, policy_from.adapter, torch_device="cpu")

# %% [markdown]
# ## Merge and check
#
# The same conversations go through the adapter on its base and then through the merged weights. In float32 they agree
# to about 1e-5; in bfloat16 the sum is rounded once more, and a KL of up to about 1e-3 is what one sees.

# %%
questions = ["What is the capital of France?", "Write a short poem about the sea.", "What is 12 + 30?"]
questions += ["Explain to a child why the sky is blue.", "Translate 'good morning' into Spanish."]
conversations = [[{"role": "user", "content": question}] for question in questions]

# %%
if not merge_run.finished:
    policy.eval()
    with_adapter = last_logits(policy, tokenizer, conversations)
    with policy.disable_adapter():
        without = last_logits(policy, tokenizer, conversations)
    merged = policy.merge_and_unload()
    proof = compare_logits(with_adapter, last_logits(merged, tokenizer, conversations))
    show(
        comparison_table(
            {"merged, against the adapter": proof, "base, against it": compare_logits(with_adapter, without)}
        )
    )

# %% [markdown]
# The first row should be near zero and the second far from it: the adapter does something, and the merge kept it.

# %%
if not merge_run.finished:
    if proof["kl"] > settings.max_kl:
        raise UserError(
            f"the merged model's KL is {proof['kl']:.2e}, above --max_kl {settings.max_kl}: nothing is kept"
        )
    merge_run.update()  # first: where this run replaces another, that one's weights go
    merged.save_pretrained(merge_run.folder, max_shard_size=settings.max_shard_size)
    tokenizer.save_pretrained(merge_run.folder)
    merge_run.finish(metrics=proof)
for file in files_to_push(merge_run.folder):
    print(f"{file.stat().st_size / 1e6:10,.2f} MB  {file.name}")

# %% [markdown]
# ## Publish, if asked
#
# `--push_to_hub --hub_repo_id name/model` sends the files above and nothing else, also after a merge that had finished
# before. The repository is private unless `--no_private` is given. The token is read from `HF_TOKEN`, from `.env`, or
# from `hf auth login`.

# %%
if settings.push_to_hub:
    push_folder(merge_run.folder, settings.hub_repo_id, settings.private)

# %% [markdown]
# ## Next
#
# The folder loads with `AutoModelForCausalLM.from_pretrained` and is served by `vllm serve` or `transformers serve`.
# The next notebook shows how its answers changed.

# %%
print("Next:", merge_run.next_command(settings.recipe) if source else "python notebooks/04_vibes.py")
