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
# **In:** answers of two or more models, from `04_vibes.py` or from [FastChat](https://github.com/lm-sys/FastChat).
# **Out:** `outputs/judge-<judge>-<hash>/` with the win table (`results.json`, `results.png`) and every judgment. The
# judgments are saved as FastChat saves them (`model_judgment`).
#
# ```
# python notebooks/05_judge.py --judge_model gpt-4.1                         # a model at OpenAI ...
# python notebooks/05_judge.py --judge_model NAME --base_url http://127.0.0.1:8000/v1     # ... or compatible with it
# python notebooks/05_judge.py --judge_model gpt-4.1 --dry_run               # one complete prompt, and how many calls
# python notebooks/05_judge.py --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B        # a reward model
# python notebooks/05_judge.py --votes ~/Downloads/votes-*.json              # people's votes on the page of 04_vibes.py
# python notebooks/05_judge.py --bench --models latest --limit 100     # IFEval and GSM8K; needs lm-eval[hf,ifeval]
# python notebooks/05_judge.py --bench_dir mt_bench --judge_model gpt-4      # MT-Bench, with the answers in mt_bench/
# ```
#
# Without `--answers_dir` and `--bench_dir`, 05 judges the newest finished run of 04. A judge model sees every pair of
# answers in both orders. If the order changes its verdict, the pair is a tie. After an interruption, run the same
# command again: no call is repeated.

# %% [markdown]
# ## Settings
#
# Each field is a flag (`--max_calls 100`), an environment variable (`JUDGE_MAX_CALLS`), a line of `.env` and a recipe
# key. A field that begins with `judge_` has no second prefix: `JUDGE_MODEL`. In a Jupyter kernel, insert a cell before
# the one that calls `load_settings` and assign the field: `max_calls = 100`. `RunSettings` adds settings that all
# notebooks share, such as `output_dir`; see `--help`.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Judge models' answers: who wins, by how much, and how sure that is."""

    step: ClassVar[str] = "judge"  # start of the run's name, prefix of variables, section of a recipe
    exclusive: ClassVar = (("judge_model", "reward_model", "votes", "judge_module", "judgments", "bench"),)  # give one
    const: ClassVar = {"bench": ["ifeval", "gsm8k"]}  # value of --bench without names

    mode: Literal["pairwise", "single"] = "pairwise"  # pairwise: compare two answers; single: rate each from 1 to 10
    answers_dir: str = "latest"  # a finished run of 04_vibes.py (latest: the newest), or a folder of model_answer files
    bench_dir: str = ""  # FastChat folder with questions and judge prompts; its answers, if answers_dir is not set
    models: tuple[str, ...] = ()  # models to judge, by default all; in each pair, the earlier one is the baseline
    baseline: str = ""  # compare each model only with this one; by default all pairs are compared

    judge_model: str = ""  # model that judges
    base_url: str = ""  # OpenAI-compatible endpoint of the judge; by default OPENAI_BASE_URL, or OpenAI itself
    reward_model: str = ""  # instead of a judge model: a classifier with one logit; the higher score wins
    quantization: Literal["none", "8bit", "4bit"] = "none"  # quantization of the reward model
    votes: tuple[str, ...] = ()  # instead of a model: votes of people, exported from the page of 04_vibes.py
    judge_module: str = ""  # instead of a model: rules in a Python module, such as recipes.demo.questions
    judgments: str = ""  # instead of a model: a FastChat model_judgment file, whose verdicts are only counted
    bench: tuple[str, ...] = ()  # instead: tasks of lm-eval or their YAML files, which --models answer
    limit: int = 0  # number of questions of each task of bench, from the first; 0: all
    judge_prompts: str = ""  # file in the layout of FastChat's judge_prompts.jsonl; by default bench_dir's, or built-in

    temperature: float = 0.0  # temperature of the judge
    max_new_tokens: int = 2048  # maximum tokens per judgment
    max_concurrency: int = 8  # calls at the same time
    timeout: float = 120.0  # seconds without data after which a call fails; each call is tried up to six times
    max_calls: int = 0  # maximum number of calls each time you run the command, without retries; 0: no limit
    max_tokens: int = 0  # start no more calls after this many tokens, read and written; 0: no limit
    input_price: float = 0.0  # price per million tokens that the judge reads; 0: print no cost
    output_price: float = 0.0  # price per million tokens that the judge writes; 0: print no cost
    retry_errors: bool = False  # repeat calls whose reply had no verdict


# %%
# recipe = "recipes/demo.yaml"  # without a GPU or a server: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Answers and judge
#
# A pair of models is compared only on questions that both have answered. The judge is a model, a reward model, people
# (votes), rules, or a file of judgments. With `--bench`, the models answer tasks that have right answers. `--dry_run`
# prints a preview of the judge's work, and `start_run` then ends the notebook.

# %%
from helpers.core import show
from helpers.evaluation import find_answers, make_judge, summarize_judgments
from helpers.runs import show_report, start_run

# %%
answers = find_answers(settings)
show(answers)
judge = make_judge(settings, answers)
if settings.dry_run:
    show(judge.preview())
judge_run = start_run(settings, base_model=judge.name, origin=judge.fingerprint)  # named after the judge

# %% [markdown]
# ## Judge
#
# Replies of a judge model are saved word for word as they arrive. The last verdict in a reply counts. A reply without a
# clear verdict is an error, not a tie. Answers that are the same are ties, and the judge is not asked.

# %%
verdicts = judge.run(judge_run)

# %% [markdown]
# ## Results
#
# The first table is the win table, with FastChat's columns. Below it, each pair of models has its win rate with an
# interval and a significance test. Notes list reasons to distrust a result, such as position bias or length bias of the
# judge.

# %%
results = summarize_judgments(verdicts, answers, mode=settings.mode, seed=settings.seed)
verdicts.save(judge_run, results)
show(results)
show(results.figure(), save_as=judge_run.folder / "results.png")

# %% [markdown]
# ## Next
#
# The results are also in `run.json` and in `report.html` of each run that was judged. `03_merge_push.py` puts them on
# the model card if you publish the model. `raise_if_incomplete` ends with an error if calls are missing, or if no reply
# had a verdict. `06_pairs.py` makes preference pairs for another round.

# %%
runs = answers.find_runs(settings.output_dir, results.models)
answers.print_next(settings, judge_run, runs=runs)
show_report(*runs)
verdicts.raise_if_incomplete()
