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
# # 5. Judge the answers
#
# **In:** answers of two or more models, from `04_vibes.py` or in FastChat's layout. **Out:** `outputs/judge-.../` with
# the win table (`results.json`, `results.png`) and every judgment, in FastChat's `model_judgment` layout.
#
# ```
# python notebooks/05_judge.py --judge_model gpt-4.1                         # a model at OpenAI ...
# python notebooks/05_judge.py --judge_model NAME --base_url http://127.0.0.1:8000/v1     # ... or compatible with it
# python notebooks/05_judge.py --judge_model gpt-4.1 --dry_run               # one complete prompt, and how many calls
# python notebooks/05_judge.py --votes ~/Downloads/votes-*.json              # people, on the page of 04_vibes.py
# python notebooks/05_judge.py --bench_dir mt_bench --judge_model gpt-4      # MT-Bench, from FastChat's own files
# ```
#
# A model judges every pair of answers in both orders. If the order changes its verdict, the pair is a tie. After an
# interruption, run the same command again: no call is made twice, not even if another run made it.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Judge models' answers: who wins, by how much, and how sure that is."""

    step: ClassVar[str] = "judge"
    exclusive: ClassVar = (("judge_model", "votes", "judge_module"),)

    mode: Literal["pairwise", "single"] = "pairwise"  # compare two answers, or rate each from 1 to 10
    answers_dir: str = "latest"  # a run of 04_vibes.py (latest: the newest finished), or a folder of model_answer files
    bench_dir: str = ""  # a FastChat folder: question.jsonl, reference_answer, judge_prompts.jsonl, model_answer
    models: tuple[str, ...] = ()  # models to judge, the one that others are compared with first; all by default
    baseline: str = ""  # compare each model with this one only, instead of all pairs

    judge_model: str = ""  # the model that judges
    base_url: str = ""  # its OpenAI-compatible endpoint; by default OPENAI_BASE_URL, or OpenAI's own
    votes: tuple[str, ...] = ()  # or people: votes exported from the page of 04_vibes.py
    judge_module: str = ""  # or rules: a module such as recipes.demo.questions
    judge_prompts: str = ""  # prompts in the layout of FastChat's judge_prompts.jsonl; built-in ones by default

    temperature: float = 0.0  # of the judge
    max_new_tokens: int = 2048  # maximum tokens per judgment
    max_concurrency: int = 8  # calls at a time
    timeout: float = 120.0  # seconds of silence after which a call fails; a failed call is tried six times in total
    max_calls: int = 0  # stop after so many calls, retries not counted; 0: no limit
    max_tokens: int = 0  # start no call after so many tokens, read and written; 0: no limit
    input_price: float = 0.0  # per million tokens that the judge reads, for the cost line
    output_price: float = 0.0  # per million tokens that it writes
    retry_errors: bool = False  # ask again where a reply had no verdict


# %%
# recipe = "recipes/demo.yaml"  # without a GPU or a server: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Answers and judge
#
# Only questions that both models of a pair have answered are compared. The judge is a model, people (votes) or rules.

# %%
from helpers.core import short_path, show
from helpers.evaluation import find_answers, make_judge, summarize_judgments
from helpers.runs import show_report, start_run

# %%
answers = find_answers(settings)
show(answers)
judge = make_judge(settings, answers)
if settings.dry_run:
    show(judge.preview())
judge_run = start_run(settings, base_model=judge.name, origin=judge.fingerprint)

# %% [markdown]
# ## Judge
#
# A model's replies are stored word for word as they arrive. The last verdict in a reply counts; a reply without one is
# an error, not a tie.

# %%
verdicts = judge.run(judge_run)

# %% [markdown]
# ## Results
#
# First the win table, with FastChat's columns. Then, for each pair, the win rate with its interval and a significance
# test, and notes on what speaks against the numbers: a judge that prefers the first answer, or the longer one.

# %%
results = summarize_judgments(verdicts, answers, mode=settings.mode, seed=settings.seed)
show(results)
show(results.figure(), save_as=judge_run.folder / "results.png")
verdicts.save(judge_run, results)

# %% [markdown]
# ## Next
#
# The results are in `run.json` too, in the report of each run that was judged, and on the model's card when
# `03_merge_push.py` publishes it.

# %%
if (answers.folder / "answers.html").is_file():
    print(f"Page: {short_path(answers.folder / 'answers.html')}")
print(f"Results: {short_path(judge_run.folder / 'results.png')}")
show_report(*(settings.output_dir / name for name in answers.answers))
verdicts.raise_if_incomplete()
