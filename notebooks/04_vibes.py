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
# **In:** a finished run of `02_dpo.py`, or any models. **Out:** `outputs/vibes-<model>-<hash>/` with `answers.html`, a
# page to read and vote on. The answers are also saved as [FastChat](https://github.com/lm-sys/FastChat) saves them
# (`question.jsonl`, `model_answer/*.jsonl`).
#
# ```
# python notebooks/04_vibes.py                                            # the newest run of 02, before and after
# python notebooks/04_vibes.py --prompts "Why is the sky blue?" "Write a haiku."
# python notebooks/04_vibes.py --models outputs/dpo-... outputs/dpo-... --prompts_file questions.jsonl
# python notebooks/04_vibes.py --models my-model --base_url http://127.0.0.1:8000/v1     # vLLM, transformers serve ...
# python notebooks/04_vibes.py --chat                                     # chat with the last model, in a terminal
# ```
#
# The name comes from "vibe check": reading some answers gives a first impression, before anything is measured. After an
# interruption, run the same command again. It generates only the missing answers.

# %% [markdown]
# ## Settings
#
# Each field is a flag (`--batch_size 4`), an environment variable (`VIBES_BATCH_SIZE`), a line of `.env` and a recipe
# key. In a Jupyter kernel, insert a cell before the one that calls `load_settings` and assign the field:
# `batch_size = 4`. `RunSettings` adds settings that all notebooks share, such as `output_dir`; see `--help`.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Answer the same prompts with several models and show the answers side by side."""

    step: ClassVar[str] = "vibes"  # start of the run's name, prefix of variables, section of a recipe
    exclusive: ClassVar = (("prompts", "prompts_file", "dataset_id"),)  # give only one of these

    models: tuple[str, ...] = ("latest",)  # runs, adapters, models or NAME@URL; latest: the newest finished run of 02
    base_url: str = ""  # OpenAI-compatible endpoint of all models
    trust_remote_code: bool = False  # run code that comes with a model
    quantization: Literal["auto", "none", "4bit", "8bit"] = "auto"  # of the models; auto: as in their training
    attn_implementation: str = "auto"  # auto: as in their training; or sdpa, eager, flash_attention_2, a Hub kernel
    chat_template: str = "auto"  # auto: each model's own, and for a base that of its policy; or a name or file as in 02
    chat_template_kwargs: str = ""  # variables of the chat template as JSON; by default those of each model's training
    chat: bool = False  # chat with the last model instead

    prompts: tuple[str, ...] = ()  # prompts to answer; without prompts, file and dataset, 24 built-in ones
    prompts_file: str = ""  # text with one prompt per line, or JSONL with prompt, turns (FastChat) or messages
    dataset_id: str = ""  # dataset with a column prompt, turns or messages: Hub id, file or folder
    dataset_split: str = ""  # split of that dataset; by default train, or its only split
    rows: int = 0  # number of prompts to use, from the first; 0: all
    show_rows: int = 8  # number of prompts in the printed table

    max_new_tokens: int = 256  # maximum tokens per answer
    batch_size: int = 8  # prompts per batch
    do_sample: bool = False  # sample instead of greedy decoding; setting temperature, top_p or top_k turns it on
    temperature: float = 1.0  # of sampling: values below 1 favour likely tokens
    top_p: float = 1.0  # of sampling: draw from the most likely tokens with this total probability
    top_k: int = 50  # of sampling: draw from this many most likely tokens
    num_beams: int = 1  # beams of a beam search; 1: no beam search
    repetition_penalty: float = 1.0  # values above 1 make tokens less likely that already occur in the text
    generation_kwargs: tuple[str, ...] = ()  # other arguments of model.generate, for example min_p=0.1
    temperature_by_category: bool = False  # use FastChat's temperature for each category of MT-Bench


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Models and prompts
#
# Each run is preceded by the model that it started from, so you see the answers before and after training. A run is
# loaded as in its training: after QLoRA, in 4 bits. A merged model is loaded as it is stored. A base is loaded and
# prompted like the policy that was trained from it: the same precision, the same chat template. The table shows all of
# this.
#
# `--chat` starts a conversation instead. It is not saved, and ends the notebook here.

# %%
from helpers.core import short_path, show
from helpers.evaluation import AnswerStore, Generators, read_questions
from helpers.models import resolve_models
from helpers.runs import resumable, shell_quote, start_run

# %%
model_refs = resolve_models(settings.models, settings.output_dir, base_url=settings.base_url)
names = [model.name for model in model_refs]
show("Models: " + ", ".join(f"{model.name} ({short_path(model.adapter or model.base)})" for model in model_refs))
questions = read_questions(settings)
generators = Generators(model_refs, settings)
show(generators)
if settings.chat and not settings.dry_run:
    generators.chat()

# %% [markdown]
# ## The run
#
# The run is named after the settings, the questions and the models' weights and chat templates, so the same command
# finds the same run. With `--dry_run`, `start_run` ends the notebook here.

# %%
show(f"{len(questions)} prompts for {', '.join(names)}")
vibes_run = start_run(settings, base_model=model_refs[0].base, origin=generators.fingerprint(questions))
vibes_run.set(models=names, prompts=len(questions), loading=generators.loading, weights=generators.weights)

# %% [markdown]
# ## Answers
#
# One base model is in memory at a time; adapters on it are switched. By default decoding is greedy (the
# most likely token each time), so answers differ only if the models do. Prompts of similar length share a batch. A
# question with several turns is answered turn by turn. `resumable` records in `run.json` whether the work was
# interrupted.

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
# The table shows `show_rows` prompts, spread evenly. `answers.html` has all answers and hides the models' names until
# you vote. Read and vote there, and export the votes: `05_judge.py --votes` counts them. Below the table and in
# `run.json` are counts of answers that are empty, truncated, or refused by a server. If no answer has any text,
# `finish` ends with an error.

# %%
show(answers.side_by_side(names, rows=settings.show_rows))
page_id = answers.write_vote_page(names, title=vibes_run.name, settings=generators.described)
answers.finish(vibes_run, names, page=page_id)

# %% [markdown]
# ## Next
#
# Judge the answers: by a model, by rules, or by people's votes. The last cell prints the commands.

# %%
judge = f"python notebooks/05_judge.py --answers_dir {shell_quote(vibes_run.folder)}"
has_recipe_prompts = settings.sources["prompts_file"] == "recipe"  # such a recipe names a judge, too
print(f"Page: {short_path(vibes_run.folder / 'answers.html')}")
print(f"Next: {judge} {f'--recipe {shell_quote(settings.recipe)}' if has_recipe_prompts else '--judge_model NAME'}")
print(f"or, with votes exported from the page: {judge} --votes ~/Downloads/votes-{page_id}*.json")
