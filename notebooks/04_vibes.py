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
# # 4. Read answers side by side
#
# **In:** a finished run of `02_dpo.py`, or any models. **Out:** `outputs/vibes-<model>-<hex>/answers.jsonl`, and the
# same prompts answered before and after, next to each other.
#
# ```
# python notebooks/04_vibes.py                                            # the newest finished run, before and after
# python notebooks/04_vibes.py --prompts "Why is the sky blue?" "Write a haiku."
# python notebooks/04_vibes.py --models outputs/dpo-... --do_sample --temperature 0.7 --top_p 0.9
# ```
#
# The weights are loaded once: the adapter is switched off for the answers before, and on for those after.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Answer the same prompts with several models and show them side by side."""

    step: ClassVar[str] = "vibes"
    resume: Literal["auto", "never"] = "never"  # answers are made anew each time

    models: tuple[str, ...] = ("latest",)  # runs, adapters or models; latest is the newest finished 02_dpo.py
    trust_remote_code: bool = False  # run code that comes with a model
    quantization: Literal["none", "4bit", "8bit"] = "none"  # of the weights, where memory is short

    prompts: tuple[str, ...] = ()  # prompts; a few of our own when neither these nor a file are given
    prompts_file: str = ""  # a text file with a prompt a line, or JSONL with a field prompt
    rules: str = ""  # module that judges by rules the answers to prompts_file
    show_rows: int = 8  # prompts in the table below

    max_new_tokens: int = 256  # tokens of an answer, at most
    batch_size: int = 8  # prompts at a time
    do_sample: bool = False  # sample, rather than take the most likely token
    temperature: float = 1.0  # below 1 more likely tokens, above 1 less likely ones; with do_sample
    top_p: float = 1.0  # sample from the most likely tokens that make up this share; with do_sample
    top_k: int = 50  # sample from this many most likely tokens; with do_sample
    num_beams: int = 1  # beams of a beam search
    repetition_penalty: float = 1.0  # above 1, tokens that were used are less likely


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: take away the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Models and prompts

# %%
from helpers.display import show
from helpers.generation import read_prompts
from helpers.models import plan_model
from helpers.runs import start_run
from helpers.settings import one_of
from helpers.sources import find_candidates

one_of(settings, "prompts", "prompts_file")
candidates = find_candidates(settings.models, settings.output_dir)
questions = read_prompts(settings.prompts, settings.prompts_file)
plan = plan_model(candidates[0].base, "none", settings.quantization)
vibes_run = start_run(settings, base_model=candidates[0].base)
show(plan, f"{len(questions)} prompts for {', '.join(c.name for c in candidates)}")

# %% [markdown]
# ## Answers
#
# Greedy unless `--do_sample` is given, so that a difference between two columns is a difference between two models.

# %%
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from helpers.chat import apply_chat_format
from helpers.embeddings import fit_embeddings
from helpers.generation import SideBySide, generate_answers, sampling_of
from helpers.models import compute_4bit_alike

sampling = sampling_of(settings)
conversations = [[{"role": "user", "content": question["prompt"]}] for question in questions]
answers, loaded, model = {}, None, None

# %%
for candidate in candidates:
    if (candidate.base, candidate.revision) != loaded:
        model = None  # makes room for the next
        model = AutoModelForCausalLM.from_pretrained(
            candidate.base,
            revision=candidate.revision or "main",
            dtype=plan.dtype,
            quantization_config=plan.quantization,
            attn_implementation=plan.attention,
            device_map=plan.device_map,
            trust_remote_code=settings.trust_remote_code,
        )
        compute_4bit_alike(model)
        loaded = (candidate.base, candidate.revision)
    tokenizer = AutoTokenizer.from_pretrained(candidate.tokenizer, trust_remote_code=settings.trust_remote_code)
    apply_chat_format(tokenizer, "auto")
    if candidate.adapter:
        fit_embeddings(model, tokenizer)  # rows for tokens that its chat format added
    speaker = PeftModel.from_pretrained(model, candidate.adapter) if candidate.adapter else model
    set_seed(settings.seed)
    answers[candidate.name] = generate_answers(
        speaker.eval(), tokenizer, conversations, settings.batch_size, **sampling
    )
    model = speaker.unload() if candidate.adapter else model  # takes the adapter off again

# %% [markdown]
# ## Side by side

# %%
table = SideBySide([question["prompt"] for question in questions], answers)
vibes_run.update(prompts=len(questions))
table.save(vibes_run.folder / "answers.jsonl")
show(table.sample(settings.show_rows))

# %% [markdown]
# ## By rule, where there are rules
#
# The demo's prompts have checkable answers. Its judge looks at correctness first; between two answers that are both
# right or both wrong, manner decides.

# %%
from helpers.judging import judge_by_rules

checkable = settings.rules and settings.prompts_file and len(candidates) > 1
verdicts = judge_by_rules(settings.rules, questions, answers) if checkable else None
vibes_run.finish(metrics=verdicts.as_dict() if verdicts else {})
if verdicts:
    show(verdicts)
print(f"Answers: {vibes_run.folder / 'answers.jsonl'}")
