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
# **In:** a finished run of `02_dpo.py`. **Out:** `outputs/merge-<model>-<hex>/`, one model that needs no adapter; on
# the Hub only when asked.
#
# ```
# python notebooks/03_merge_push.py                                       # the newest finished run
# python notebooks/03_merge_push.py --run outputs/dpo-... --push_to_hub --hub_repo_id me/model
# python notebooks/03_merge_push.py --adapter FOLDER                      # an adapter from elsewhere
# ```
#
# Merging adds each adapter's product to the weight it belongs to, $W + \frac{\alpha}{r}BA$, in float32 and one weight
# at a time: memory for one of them is enough, whatever the model's size, and no GPU is needed. Then the merged model is
# compared with the policy as it was trained, and is not kept where the two differ.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings.load import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Merge an adapter into its base, prove the merge, and publish the result."""

    step: ClassVar[str] = "merge"

    run: str = "latest"  # finished run of 02_dpo.py: its folder, or latest
    adapter: str = ""  # an adapter's folder or Hub id, in place of a run
    base_model_id: str = ""  # the adapter's base, where it is not the one it names
    merge_base: Literal["auto", "original", "dequantized"] = "auto"  # auto: dequantized for what was trained in 4 bits
    merge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the merged weights; auto: the base's
    trust_remote_code: bool = False  # run code that comes with the model
    max_shard_size: str = "2GB"  # largest file of weights
    max_kl: float = 0.01  # nats; a merge that moves the answers further than this is not kept
    compare_merges: bool = False  # for a quantized run: merge in the other ways too, and print how far each is

    push_to_hub: bool = False  # publish
    hub_repo_id: str = ""  # where to: name/model
    hub_revision: str = ""  # branch to push to; main where none is named
    hub_tag: str = ""  # name for what was pushed
    push: Literal["merged", "adapter", "both"] = "merged"  # published; the adapter of both goes to name/model-adapter
    private: bool = True  # visible to its owner only; --no_private for everybody
    license: str = ""  # of what is published, as "apache-2.0"; the base's where none is given


# %%
settings = load_settings(Settings, globals())

# %% [markdown]
# ## What is merged

# %%
from pathlib import Path

from helpers.core import CleanExit, UserError, short_path, show
from helpers.hub.push import file_line, files_to_push, prepare_push, preview_push, push_folder
from helpers.merging.weights import WeightFiles, adapter_as_run, local_folder, parse_size
from helpers.models.resolve import find_adapter
from helpers.runs.run import find_run, start_run
from helpers.settings.load import one_of

one_of(settings, "run", "adapter")
largest_file = parse_size(settings.max_shard_size)
source = None if settings.adapter else find_run(settings.output_dir, settings.run, "dpo")
to_push = source.folder if source else local_folder(settings.adapter)
publishing = dict(licence=settings.license, revision=settings.hub_revision, tag=settings.hub_tag)
if settings.push_to_hub and settings.dry_run:
    preview_push(to_push, settings.output_dir, settings.push, settings.hub_repo_id, settings.license)
elif settings.push_to_hub and settings.push == "adapter":
    push_folder(to_push, settings.hub_repo_id, settings.private, **publishing)  # an adapter, or a model tuned in full
    raise CleanExit("Nothing was merged for that.")
elif settings.push_to_hub and settings.push == "both":
    prepare_push(to_push, settings.hub_repo_id, settings.license)  # what cannot go stops here, before the merged model

# %%
policy_from = find_adapter(str(to_push), settings.base_model_id)
parent = source or adapter_as_run(to_push)
merge_run = start_run(settings, base_model=source.base_model if source else policy_from.base, parent=parent)
print(f"adapter {policy_from.adapter}\nbase    {policy_from.base}")

# %%
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.merging import verify as merge_proof
from helpers.merging.merge import QuantizedBase, StreamingMerger, UnsupportedAdapter
from helpers.merging.weights import finalize, merge_with_peft, save_config, staging_dir, write_merged
from helpers.models.chat import set_chat_template
from helpers.models.plan import disable_cpu_4bit_repacking, resize_embeddings
from helpers.runs.report import show_report

base_folder = local_folder(policy_from.base, policy_from.revision)
adapter_folder = Path(policy_from.adapter)
has_tokenizer = (adapter_folder / "tokenizer_config.json").is_file()
tokenizer = AutoTokenizer.from_pretrained(
    adapter_folder if has_tokenizer else base_folder, trust_remote_code=settings.trust_remote_code
)
set_chat_template(tokenizer, "auto")
trained = merge_proof.LoadPrecision.by(source, settings.merge_base)
into = settings.merge_base
if into == "auto":
    into = "dequantized" if trained.quantization else "original"
if into == "dequantized" and not trained.quantization:
    raise UserError("--merge_base dequantized, but this run was trained on the original weights")
print(f"merging into the {into} weights")

# %% [markdown]
# ## Merge
#
# A QLoRA adapter was trained against weights that had been rounded to 4 bits, and has learned to correct for that.
# **dequantized** adds it to those very weights: the merged model is the policy as it was trained, at full size.
# **original** adds it to the published weights, which is another model, a little off in every layer: choose it when the
# adapter is to go onto the published weights anyway, as where one base serves many adapters.

# %%
kwargs = dict(trust_remote_code=settings.trust_remote_code)
stored = torch.float32 if trained.dtype == "auto" else trained.dtype
out_dtype = None if settings.merge_dtype == "auto" else getattr(torch, settings.merge_dtype)
changes = {"original": None, "dequantized": lambda model: QuantizedBase(model, trained.quantization, stored)}
draft = staging_dir(merge_run)
merging = None
if not merge_run.finished:
    try:
        merging = StreamingMerger(base_folder, adapter_folder, len(tokenizer), changes[into], **kwargs)
        write_merged(draft, merging, {"merge_base": into}, largest_file, out_dtype)
        save_config(draft, merging, tokenizer, base_folder, out_dtype)
    except UnsupportedAdapter as reason:
        if into == "dequantized":
            raise UserError(f"{reason} cannot be merged into dequantized weights: --merge_base original can") from None
        print(f"This is {reason}: PEFT merges it, in the memory of the whole model.")
        merge_with_peft(draft, base_folder, adapter_folder, tokenizer, out_dtype, largest_file, **kwargs)
        tokenizer.save_pretrained(draft)

# %% [markdown]
# ## Prove it
#
# Held-out prompts go through the policy as it was trained, 4 bits included, and through what was written. In float32 a
# KL of 1e-8 is what one sees; in bfloat16 each weight is rounded once more, which gives up to about 1e-3. A model that
# fits into no memory here is looked at layer by layer.

# %%
written = WeightFiles(merge_run.folder if merge_run.finished else draft)
device = merge_proof.device_for(written, trained.dtype, out_dtype)
conversations = merge_proof.held_out_prompts(source)


def load_policy():
    """The adapter on its base, as it was trained."""
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=trained.dtype, quantization_config=trained.quantization, device_map={"": device}, **kwargs
    )
    disable_cpu_4bit_repacking(base)
    resize_embeddings(base, tokenizer)  # rows for tokens that the chat format added
    return PeftModel.from_pretrained(base, adapter_folder).eval()


# %%
proof = merge_run.record.get("metrics", {})
if not merge_run.finished and device:
    policy = load_policy()
    with_adapter = merge_proof.last_logits(policy, tokenizer, conversations)
    with policy.disable_adapter():
        without = merge_proof.last_logits(policy, tokenizer, conversations)
    policy = None
    merge_proof.free_memory()
    merged = AutoModelForCausalLM.from_pretrained(draft, dtype="auto", device_map={"": device}, **kwargs).eval()
    proof = merge_proof.compare_logits(with_adapter, merge_proof.last_logits(merged, tokenizer, conversations))
    merged = None
    found = {f"merged into {into}": proof, "base alone": merge_proof.compare_logits(with_adapter, without)}
    show(merge_proof.comparison_table(found))
elif not merge_run.finished:
    as_trained = changes["dequantized" if trained.quantization else "original"]
    whole = StreamingMerger(base_folder, adapter_folder, len(tokenizer), as_trained, **kwargs)
    proof = merge_proof.compare_layers(whole, draft)
    print(f"Too large to load here: {proof['layers']} layers differ by {proof['relative']:.1e} at most.")

# %% [markdown]
# The first row should be near zero and the second far from it: the adapter does something, and the merge kept it.

# %%
if not merge_run.finished:
    merge_proof.check_kl(proof, settings.max_kl, draft)
    finalize(merge_run, draft, metrics=proof, merge_base=into)
for file in files_to_push(merge_run.folder):
    print(file_line(file.name, file.stat().st_size))

# %% [markdown]
# ## The other ways, if asked
#
# `--compare_merges` merges a quantized run in the other ways as well, and into 4 bits as PEFT does by itself, which
# rounds the adapter away with the weights.

# %%
if settings.compare_merges and trained.quantization and device and merging:
    parts = base_folder, adapter_folder, len(tokenizer)
    ways = {name: StreamingMerger(*parts, change, **kwargs) for name, change in changes.items()}
    rows = merge_proof.compare_merges(load_policy, ways, tokenizer, conversations, draft)
    show(merge_proof.comparison_table(rows))

# %% [markdown]
# ## Publish, if asked
#
# `--push_to_hub --hub_repo_id name/model` sends the files above, a model card written from the run, and nothing else,
# also after a merge that had finished before. The repository is private unless `--no_private` is given, whatever the
# account's default. Where a token stands in a file, nothing is sent. `--dry_run` prints the files and the card. The
# token is read from `HF_TOKEN`, from `.env`, or from `hf auth login`.

# %%
if settings.push_to_hub:
    push_folder(merge_run.folder, settings.hub_repo_id, settings.private, **publishing)
if settings.push_to_hub and settings.push == "both":
    beside = f"{settings.hub_repo_id or merge_run.name}-adapter"
    push_folder(to_push, beside, settings.private, **publishing)

# %% [markdown]
# ## Other ways out
#
# The folder is a model like any other. Nothing of this repository is needed to use it.

# %%
place = short_path(merge_run.folder)
print(f"""transformers   AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")
PEFT           AutoPeftModelForCausalLM.from_pretrained("{short_path(to_push)}")   # base and adapter, not merged
served         vllm serve {place}
               transformers serve {place}
GGUF           python llama.cpp/convert_hf_to_gguf.py {place} --outfile {place}/model.gguf --outtype bf16
evaluated      lm_eval --model hf --model_args pretrained={place},dtype=auto --tasks ifeval --apply_chat_template""")

# %% [markdown]
# ## Next
#
# The next notebook shows how its answers changed.

# %%
show_report(merge_run.folder)  # of the run that was merged, with the proof
print("Next:", merge_run.next_command(settings.recipe) if source else "python notebooks/04_vibes.py")
