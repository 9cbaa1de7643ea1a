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
# # 4. Compare answers side by side
#
# **In:** a finished run of `02_dpo.py`, or any models. **Out:** `outputs/vibes-<model>-<hex>/` with `answers.html`, a
# page to read and vote on, and each model's answers in FastChat's layout (`question.jsonl`, `model_answer/*.jsonl`).
#
# ```
# python notebooks/04_vibes.py                                            # the newest finished run, before and after
# python notebooks/04_vibes.py --prompts "Why is the sky blue?" "Write a haiku."
# python notebooks/04_vibes.py --models outputs/dpo-... outputs/dpo-... --prompts_file questions.jsonl
# python notebooks/04_vibes.py --models my-model --base_url http://127.0.0.1:8000/v1     # vLLM, transformers serve ...
# python notebooks/04_vibes.py --chat                                     # chat with the last model, in a terminal
# ```
#
# After an interruption, run the same command again: it generates only the missing answers.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Answer the same prompts with several models and show the answers side by side."""

    step: ClassVar[str] = "vibes"
    exclusive: ClassVar = (("prompts", "prompts_file", "dataset_id"),)

    models: tuple[str, ...] = ("latest",)  # runs, adapters, models, NAME@URL; latest: the newest finished 02_dpo.py
    base_url: str = ""  # OpenAI-compatible endpoint of all models
    trust_remote_code: bool = False  # run code that comes with a model
    quantization: Literal["none", "4bit", "8bit"] = "none"  # of the weights, to save memory
    chat: bool = False  # chat with the last model instead

    prompts: tuple[str, ...] = ()  # prompts; without prompts, file or dataset, 24 built-in ones
    prompts_file: str = ""  # a text file with a prompt per line, or JSONL with prompt, turns (FastChat) or messages
    dataset_id: str = ""  # a dataset with such a column, on the Hub or in files
    dataset_split: str = ""  # its split; train by default, or the only one
    rows: int = 0  # use only the first so many prompts; 0: all
    show_rows: int = 8  # prompts in the table below

    max_new_tokens: int = 256  # maximum tokens per answer
    batch_size: int = 8  # prompts per batch
    do_sample: bool = False  # sample instead of taking the most likely token
    temperature: float = 1.0  # below 1 favours likely tokens; with do_sample
    top_p: float = 1.0  # sample from the most likely tokens with this total probability; with do_sample
    top_k: int = 50  # sample from this many most likely tokens; with do_sample
    num_beams: int = 1  # beams of a beam search
    repetition_penalty: float = 1.0  # above 1 makes tokens that were used less likely
    generation_kwargs: tuple[str, ...] = ()  # other arguments of model.generate, for example min_p=0.1
    temperature_by_category: bool = False  # sample at FastChat's temperatures for MT-Bench, by category


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Models and prompts
#
# A run comes with the model that it started from, so that "before" and "after" answer the same prompts. A chat is not
# saved, and ends the notebook here.

# %%
from helpers.core import short_path, show
from helpers.evaluation import AnswerStore, Generators, read_questions, resumable
from helpers.models import resolve_models
from helpers.runs import start_run

# %%
model_refs = resolve_models(settings.models, settings.output_dir, base_url=settings.base_url)
names = [model.name for model in model_refs]
questions = read_questions(settings)
generators = Generators(model_refs, settings)
show(generators)
if settings.chat and not settings.dry_run:
    generators.chat()

# %% [markdown]
# ## The run
#
# Its name is derived from the settings, the questions and the models' weights: the same command finds the same run.

# %%
show(f"{len(questions)} prompts for {', '.join(names)}")
vibes_run = start_run(settings, base_model=model_refs[0].base, origin=generators.fingerprint(questions))
vibes_run.set(models=names, prompts=len(questions))

# %% [markdown]
# ## Answers
#
# One base model is in memory at a time; adapters on the same base are switched on and off. Answers are greedy unless
# sampling is asked for, so a difference between two columns is a difference between two models. Prompts of similar
# length share a batch; a conversation is answered turn by turn.

# %%
answers = AnswerStore(
    vibes_run.folder,
    questions,
    batch_size=settings.batch_size,
    seed=settings.seed,
    by_category=settings.temperature_by_category,
)
with resumable(vibes_run):
    for name, generator in generators.load(answers):
        answers.generate_missing(name, generator, **generators.sampling)

# %% [markdown]
# ## Side by side
#
# Here are some of the answers. `answers.html` has all of them: read and vote there without knowing whose answer is
# whose. `05_judge.py --votes` counts the votes.

# %%
show(answers.side_by_side(names, rows=settings.show_rows))
page_id = answers.write_vote_page(names, title=vibes_run.name, settings=generators.sampling)
vibes_run.finish(page=page_id)

# %% [markdown]
# ## Next
#
# Judge the answers: by a model, by rules, or by the votes of people.

# %%
judge = f"python notebooks/05_judge.py --answers_dir {short_path(vibes_run.folder)}"
is_recipe = settings.sources["prompts_file"] == "recipe"
print(f"Page: {short_path(vibes_run.folder / 'answers.html')}")
print(f"Next: {judge} {f'--recipe {settings.recipe}' if is_recipe else '--judge_model NAME'}")
print(f"or, with votes exported from the page: {judge} --votes ~/Downloads/votes-{page_id}*.json")
