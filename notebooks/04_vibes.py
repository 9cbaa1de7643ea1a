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
# # 4. Read answers side by side
#
# **In:** a finished run of `02_dpo.py`, or any models. **Out:** `outputs/vibes-<model>-<hex>/` with `answers.html`, a
# page to read and vote on, and each model's answers in FastChat's layout (`question.jsonl`, `model_answer/*.jsonl`).
#
# ```
# python notebooks/04_vibes.py                                            # the newest finished run, before and after
# python notebooks/04_vibes.py --prompts "Why is the sky blue?" "Write a haiku."
# python notebooks/04_vibes.py --models outputs/dpo-... outputs/dpo-... --prompts_file questions.jsonl
# python notebooks/04_vibes.py --models my-model --base_url http://127.0.0.1:8000/v1     # vLLM, transformers serve ...
# python notebooks/04_vibes.py --chat                                     # talk with it, in a terminal
# ```
#
# The weights are loaded once: adapters of one base are switched on and off. Stopped, the same command goes on with the
# answers that are missing.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings.load import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Answer the same prompts with several models and show them side by side."""

    step: ClassVar[str] = "vibes"

    models: tuple[str, ...] = ("latest",)  # runs, adapters, models, NAME@URL; latest is the newest finished 02_dpo.py
    base_url: str = ""  # the models are names behind this OpenAI-compatible endpoint
    trust_remote_code: bool = False  # run code that comes with a model
    quantization: Literal["none", "4bit", "8bit"] = "none"  # of the weights, where memory is short
    chat: bool = False  # talk with the last of the models instead

    prompts: tuple[str, ...] = ()  # prompts; some of our own when neither these, a file nor a dataset are given
    prompts_file: str = ""  # a text file with a prompt a line, or JSONL with prompt, turns (FastChat's) or messages
    dataset_id: str = ""  # a dataset with such a column, on the Hub or in files
    dataset_split: str = ""  # its split; train, or the only one there is
    rows: int = 0  # take so many of the prompts, from the start; 0 takes all
    show_rows: int = 8  # prompts in the table below

    max_new_tokens: int = 256  # tokens of an answer, at most
    batch_size: int = 8  # prompts at a time
    do_sample: bool = False  # sample, rather than take the most likely token
    temperature: float = 1.0  # below 1 more likely tokens, above 1 less likely ones; with do_sample
    top_p: float = 1.0  # sample from the most likely tokens that make up this share; with do_sample
    top_k: int = 50  # sample from this many most likely tokens; with do_sample
    num_beams: int = 1  # beams of a beam search
    repetition_penalty: float = 1.0  # above 1, tokens that were used are less likely
    generation_kwargs: tuple[str, ...] = ()  # any other argument of model.generate, as min_p=0.1
    temperature_by_category: bool = False  # sample at FastChat's temperatures for MT-Bench, by category


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: take away the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Models and prompts

# %%
from helpers.core import fingerprint, short_path, show
from helpers.evaluation.answers import AnswerStore, SideBySide, resumable
from helpers.evaluation.generators import Endpoint, HFGenerator, OpenAIGenerator, chat_loop, generation_kwargs
from helpers.evaluation.questions import read_questions
from helpers.models.plan import plan_model
from helpers.models.resolve import resolve_models
from helpers.runs.run import start_run
from helpers.settings.load import one_of

one_of(settings, "prompts", "prompts_file", "dataset_id")
candidates = resolve_models(settings.models, settings.output_dir, settings.base_url)
candidates = candidates[-1:] if settings.chat else candidates
endpoints = {c.name: Endpoint(c.base, c.base_url) for c in candidates if c.base_url}
local = [c for c in candidates if c.name not in endpoints]
questions = read_questions(
    settings.prompts, settings.prompts_file, settings.dataset_id, settings.dataset_split, settings.rows
)
sampling = generation_kwargs(settings)
if local:
    plan = plan_model(local[0].base, "none", settings.quantization)
    show(plan)

# %% [markdown]
# ## The run
#
# Its name follows from the settings, the questions and the models' weights, so that the same command finds its answers
# again. A conversation needs no run: it is not kept.

# %%
if settings.dry_run or not settings.chat:
    show(f"{len(questions)} prompts for {', '.join(c.name for c in candidates)}")
    asked = fingerprint(questions, [c.fingerprint for c in candidates])
    vibes_run = start_run(settings, base_model=candidates[0].base, origin=asked)
    if not vibes_run.finished:
        vibes_run.save(models=[c.name for c in candidates], prompts=len(questions))
    answers = AnswerStore(vibes_run.folder, questions)

# %% [markdown]
# ## Answers
#
# Greedy unless `--do_sample` is given, so that a difference between two columns is a difference between two models.
# Prompts of similar length share a batch, padded on the left; a conversation is played turn by turn.

# %%
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.models.chat import set_chat_template
from helpers.models.plan import disable_cpu_4bit_repacking, resize_embeddings
from helpers.models.resolve import resolve_model

how = (settings.batch_size, settings.seed, settings.temperature_by_category)
loaded = model = None
if local:
    loading = dict(
        dtype=plan.dtype,
        quantization_config=plan.quantization,
        attn_implementation=plan.attn_implementation,
        device_map=plan.device_map,
        trust_remote_code=settings.trust_remote_code,
    )

# %%
for candidate in candidates:
    if not settings.chat and not answers.missing(candidate.name):
        continue
    if candidate.base_url:
        speaker = OpenAIGenerator(endpoints[candidate.name])
    else:
        if (candidate.base, candidate.revision) != loaded:
            model = None  # makes room for the next
            path = resolve_model(candidate.base, candidate.revision)
            model = AutoModelForCausalLM.from_pretrained(path, revision=candidate.revision or "main", **loading)
            disable_cpu_4bit_repacking(model)
        tokenizer = AutoTokenizer.from_pretrained(candidate.tokenizer, trust_remote_code=settings.trust_remote_code)
        set_chat_template(tokenizer, "auto")
        if candidate.adapter:
            resize_embeddings(model, tokenizer)  # rows for tokens that its chat format added
        policy = PeftModel.from_pretrained(model, candidate.adapter) if candidate.adapter else model
        speaker = HFGenerator(policy.eval(), tokenizer)
    if settings.chat:
        break  # there is but one: the next cell talks with it
    with resumable(vibes_run):
        answers.play(candidate.name, speaker, *how, **sampling)
    if not candidate.base_url:
        model = policy.unload() if candidate.adapter else policy  # takes the adapter off again
        loaded = None if candidate.changes_base else (candidate.base, candidate.revision)

# %%
if settings.chat:
    chat_loop(speaker, settings.seed, **sampling)

# %% [markdown]
# ## Side by side
#
# A few of the answers here, and all of them on a page: one votes there without knowing whose answer is whose, and
# `05_judge.py --votes` counts the votes.

# %%
from helpers.evaluation.vote_page import write_page

if not settings.chat:
    names = [c.name for c in candidates]
    show(SideBySide.of(answers, names, settings.show_rows))
    page = vibes_run.folder / "answers.html"
    said = {name: answers.turns(name) for name in names}
    page_id = write_page(page, questions, said, vibes_run.name, sampling, settings.seed)
    vibes_run.finish(page=page_id, metrics={"characters": answers.mean_length(names)})

# %% [markdown]
# ## Next
#
# A judge says which is better, how sure that is, and how far it can be trusted: a model, or whoever votes on the page.

# %%
if not settings.chat:
    print(f"Page: {short_path(page)}")
    by = f"--recipe {settings.recipe}" if settings.sources["prompts_file"] == "recipe" else "--judge_model NAME"
    judge = f"python notebooks/05_judge.py --answers_dir {short_path(vibes_run.folder)}"
    print(f"Next: {judge} {by}")
    print(f"or, with votes that the page exported: {judge} --votes ~/Downloads/votes-{page_id}*.json")
