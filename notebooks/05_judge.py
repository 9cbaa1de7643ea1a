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
# # 5. Judge it
#
# **In:** answers of two or more models, from `04_vibes.py` or in FastChat's layout. **Out:** `outputs/judge-.../` with
# the win table (`verdicts.json`, `verdicts.png`) and every judgment, in FastChat's `model_judgment` layout.
#
# ```
# python notebooks/05_judge.py --judge_model gpt-4.1                         # any model, at OpenAI ...
# python notebooks/05_judge.py --judge_model NAME --base_url http://127.0.0.1:8000/v1     # ... or compatible with it
# python notebooks/05_judge.py --judge_model gpt-4.1 --dry_run               # one whole prompt, and how many calls
# python notebooks/05_judge.py --votes ~/Downloads/votes-*.json              # people, by the page of 04_vibes.py
# python notebooks/05_judge.py --bench_dir mt_bench --judge_model gpt-4      # MT-Bench, from FastChat's own files
# ```
#
# A judge sees every pair of answers in both orders; where it changes its mind with the order, that is a tie. Stopped,
# the same command asks only what is missing; what another run has asked the same judge is not asked again.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings.load import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Judge models' answers: who wins, by how much, and how sure that is."""

    step: ClassVar[str] = "judge"

    mode: Literal["pairwise", "single"] = "pairwise"  # which of two is better, or each alone from 1 to 10
    answers_dir: str = "latest"  # a run of 04_vibes.py (latest: the newest finished), or a folder of model_answer files
    bench_dir: str = ""  # a folder of FastChat's: question.jsonl, reference_answer, judge_prompts.jsonl, model_answer
    models: tuple[str, ...] = ()  # which of them, the one that others are compared with first; all when none are named
    baseline: str = ""  # compare each model with this one only, rather than all with all

    judge_model: str = ""  # the model that judges
    base_url: str = ""  # its OpenAI-compatible endpoint; OpenAI's own, or OPENAI_BASE_URL, where none is given
    votes: tuple[str, ...] = ()  # votes of people instead, exported from the page of 04_vibes.py
    judge_module: str = ""  # module that judges by rules instead, as recipes.demo.questions
    judgments: str = ""  # a file of FastChat's model_judgment instead: only count it
    judge_prompts: str = ""  # prompts in the layout of FastChat's judge_prompts.jsonl; ours where none are given

    temperature: float = 0.0  # of the judge
    max_new_tokens: int = 2048  # tokens of one judgment, at most
    max_concurrency: int = 8  # calls at a time
    timeout: float = 120.0  # seconds that the server may be silent; a call that fails is repeated, six times in all
    max_calls: int = 0  # stop after so many calls, each with its repetitions; 0 for no limit
    max_tokens: int = 0  # begin no call after so many tokens, read and written; 0 for no limit
    input_price: float = 0.0  # of a million tokens that the judge reads, for the cost line
    output_price: float = 0.0  # of a million that it writes
    retry_errors: bool = False  # ask again where no verdict could be read


# %%
# recipe = "recipes/demo.yaml"  # without a GPU or a server: take away the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Answers, and who judges them
#
# A comparison needs both models' answers to a question; what only one of them has answered is left out, and said.

# %%
from helpers.core import fingerprint, short_path, show
from helpers.evaluation.answer_sets import find_answers, model_pairs
from helpers.evaluation.answers import resumable
from helpers.evaluation.generators import Endpoint
from helpers.evaluation.judges import Budget, Judge, JudgePrompts, make_matches, uncached
from helpers.evaluation.judgments import (
    judge_by_rules,
    judge_name,
    raise_if_incomplete,
    read_judgments,
    read_votes,
    save_judgments,
    score_by_rules,
    without_timestamps,
)
from helpers.evaluation.results import METHOD, PairwiseResults, RatingResults
from helpers.runs.report import show_report
from helpers.runs.run import start_run
from helpers.settings.load import one_of

# %%
one_of(settings, "judge_model", "votes", "judge_module", "judgments")
who = judge_name(settings)
found = find_answers(settings)
groups = model_pairs(found.said, settings.mode, settings.baseline)
prompts = JudgePrompts(found.prompts_file)
games = make_matches(found.questions, found.said, groups, settings.mode, prompts) if settings.judge_model else []
show(found)

# %%
made, left = [], []
if settings.judge_module:
    made = judge_by_rules(settings.judge_module, found.questions, found.said, groups)
elif settings.votes:
    made = read_votes(settings.votes, found.questions, found.said, found.page)
elif settings.judgments:
    made = read_judgments(settings.judgments, settings.mode, settings.models)
ledgers = sorted(settings.output_dir.glob("[!.]*/calls.jsonl")) if settings.resume != "never" else []
if settings.dry_run and games:
    asked = [game.messages(prompts, found.said) for game in games]
    to_ask = uncached(asked, settings.judge_model, settings.temperature, ledgers)
    show(prompts.preview(asked, to_ask))
judged = fingerprint(found.questions, found.said, prompts.rows, *without_timestamps(made))  # more votes are another run
judge_run = start_run(settings, base_model=who, origin=judged)
endpoint = Endpoint(settings.judge_model, settings.base_url, settings.timeout) if settings.judge_model else None
if not judge_run.finished:
    judge_run.save(answers_dir=short_path(found.folder))

# %% [markdown]
# ## Judge
#
# What the judge said is kept as it comes, word for word. Its verdict is the last one that it states; where none can be
# read the row is an error, and no tie.

# %%
if endpoint:
    judge = Judge(
        endpoint,
        prompts,
        found.said,
        judge_run.folder / "calls.jsonl",
        temperature=settings.temperature,
        max_tokens=settings.max_new_tokens,
    )
    budget = Budget(settings.max_calls, settings.max_tokens)
    judge.take_over(games, ledgers)
    with resumable(judge_run):
        judge.ask(judge.missing(games, settings.retry_errors), settings.max_concurrency, budget)
    show(budget.cost(settings.input_price, settings.output_price))
    made, left = judge.rows(games), judge.missing(games)

# %% [markdown]
# ## The table
#
# Wins, losses, ties and rates as FastChat's `show_result` counts them. Beside them how sure that is, and what speaks
# against believing it: a judge that follows the order, or the length.

# %%
Table = RatingResults if settings.mode == "single" else PairwiseResults
table = Table.of(who, made, found.questions, found.said, settings.seed)
if settings.judge_module:
    table.scores = score_by_rules(settings.judge_module, found.questions, found.said)
show(table, METHOD if settings.mode == "pairwise" else "")
show(table.figure(), save_as=judge_run.folder / "verdicts.png")
save_judgments(judge_run, settings, made, table, complete=not left)

# %% [markdown]
# ## Done
#
# The numbers stand in `run.json` too, and on the model's card when `03_merge_push.py` publishes it.

# %%
if (found.folder / "answers.html").is_file():
    print(f"Page of the answers: {short_path(found.folder / 'answers.html')}")
print(f"Table: {short_path(judge_run.folder / 'verdicts.png')}")
show_report(*(settings.output_dir / name for name in found.said))  # of each run that was judged
raise_if_incomplete(made, len(left), len(games))
