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
# # 6. Make pairs for another round
#
# **In:** prompts and a model that samples several answers to each, or answers that are already judged. **Out:**
# `outputs/pairs-<model>-<hash>/preferences.jsonl`, preference pairs for the next run of `02_dpo.py`.
#
# ```
# python notebooks/06_pairs.py --prompts_file prompts.jsonl --judge_module my_rules       # rules score the answers,
# python notebooks/06_pairs.py --prompts_file prompts.jsonl --reward_model NAME           # or a reward model,
# python notebooks/06_pairs.py --prompts_file prompts.jsonl --judge_model gpt-4.1         # or a judge
# python notebooks/06_pairs.py --from_judgments outputs/judge-...                         # verdicts of 05_judge.py
# python notebooks/06_pairs.py --from_votes ~/Downloads/votes-*.json                      # votes on a page
# python notebooks/02_dpo.py --sft_run outputs/dpo-... --dataset_id latest-pairs          # then: the next round
# ```
#
# The best and the worst of a model's own answers become a pair. `my_rules` is a Python module with
# `score(answer, question)`. After an interruption, run the same command again: no answer is sampled again, and none is
# scored twice. docs/another-round.md says when a round helps and when not.

# %% [markdown]
# ## Settings
#
# Each field is a flag (`--num_samples 8`), an environment variable (`PAIRS_NUM_SAMPLES`), a line of `.env` and a recipe
# key. In a Jupyter kernel, insert a cell before the one that calls `load_settings` and assign the field:
# `num_samples = 8`. `RunSettings` adds settings that all notebooks share, such as `output_dir`; see `--help`.

# %% tags=["parameters"]
from dataclasses import dataclass
from typing import ClassVar, Literal

from helpers.settings import RunSettings, load_settings


@dataclass
class Settings(RunSettings):
    """Sample answers to prompts, score them, and make preference pairs of the better and the worse ones."""

    step: ClassVar[str] = "pairs"  # start of the run's name, prefix of variables, section of a recipe
    exclusive: ClassVar = (  # give only one
        ("models", "chosen_from"),
        ("prompts", "prompts_file", "dataset_id", "answers_dir"),
        ("from_judgments", "from_votes"),
    )

    models: tuple[str, ...] = ("latest",)  # who answers, as in 04; latest: newest run of 02; latest-sft: of 01
    chosen_from: str = ""  # instead of models: the model of all chosen answers ...
    rejected_from: str = ""  # ... and the model of all rejected answers, which 02 then trains
    base_url: str = ""  # OpenAI-compatible endpoint of the models
    trust_remote_code: bool = False  # run code that comes with a model
    quantization: Literal["auto", "none", "4bit", "8bit"] = "auto"  # of the models; auto: as in their training
    chat_template: str = "auto"  # auto: each model's own; or a name or file as in 02
    chat_template_kwargs: str = ""  # variables of the chat template as JSON; by default those of each model's training
    prompts: tuple[str, ...] = ()  # prompts to answer
    prompts_file: str = ""  # text with one prompt per line, or JSONL with prompt, turns (FastChat) or messages
    dataset_id: str = ""  # dataset with a column prompt, turns or messages: Hub id, file or folder
    dataset_split: str = ""  # split of that dataset; by default train, or its only split
    rows: int = 0  # number of prompts to use, from the first; 0: all
    exclude: tuple[str, ...] = ()  # files of prompts to leave out, besides those that runs of 04 have answered
    answers_dir: str = ""  # instead of prompts: a folder of model_answer files, with one or several choices
    from_judgments: str = ""  # instead of a scorer: a run of 05_judge.py, or a FastChat model_judgment file
    from_votes: tuple[str, ...] = ()  # instead of a scorer: votes, exported from a page of 04 or of --vote_page
    num_samples: int = 4  # answers per prompt and model
    max_new_tokens: int = 256  # maximum tokens per answer
    temperature: float = 0.8  # values below 1 favour likely tokens
    top_p: float = 0.95  # draw from the most likely tokens with this total probability
    batch_size: int = 8  # prompts per batch
    judge_module: str = ""  # scorer: score() of a Python module, such as recipes.demo.questions
    reward_model: str = ""  # scorer: a classifier with one logit
    reward_quantization: Literal["none", "4bit", "8bit"] = "none"  # of the reward model
    judge_model: str = ""  # scorer: a model that judges, as in 05
    mode: Literal["single", "pairwise"] = "single"  # of the judge; single: rate from 1 to 10; pairwise: compare all
    judge_base_url: str = ""  # OpenAI-compatible endpoint of the judge; by default OPENAI_BASE_URL, or OpenAI itself
    judge_prompts: str = ""  # file in the layout of FastChat's judge_prompts.jsonl; by default built-in
    judge_max_new_tokens: int = 2048  # maximum tokens per judgment
    max_concurrency: int = 8  # calls of the judge at the same time
    timeout: float = 120.0  # seconds without data after which a call fails; each call is tried up to six times
    max_calls: int = 0  # maximum number of calls of the judge each time you run the command; 0: no limit
    max_tokens: int = 0  # start no more calls after this many tokens, read and written; 0: no limit
    input_price: float = 0.0  # price per million tokens that the judge reads; 0: print no cost
    output_price: float = 0.0  # price per million tokens that the judge writes; 0: print no cost
    retry_errors: bool = False  # repeat calls of the judge whose reply had no verdict
    vote_page: bool = False  # scorer: people, who vote on a page for the best answer
    second_scorer: Literal["", "judge_module", "reward_model", "judge_model"] = ""  # to compare with the first
    second_rows: int = 50  # number of prompts that the second scorer scores
    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = "best_vs_worst"  # which answers make pairs
    min_score_margin: float = 0.0  # drop pairs whose scores differ by less than this
    control: bool = False  # also write control.jsonl: the same prompts, chosen and rejected picked at random


# %%
# recipe = "recipes/demo.yaml"  # without a GPU: remove the first "#"
settings = load_settings(Settings, globals())

# %% [markdown]
# ## Prompts, models and scorer
#
# The model that answers is the policy that the next round trains. Prompts that runs of 04 have answered, the built-in
# ones and those of `--exclude` are left out, so that you can evaluate the next model on them. Before anything is
# sampled, rules are tried on one answer, and a judge's address, key and prompts are checked.

# %%
from helpers.core import show
from helpers.evaluation import Generators, find_prompts, make_pairs, make_scorer
from helpers.runs import resumable, start_run

prompt_set = find_prompts(settings)
generators = Generators(prompt_set.models, settings)
scorer = make_scorer(settings, prompt_set)
show(prompt_set, generators, scorer)

# %% [markdown]
# ## The run
#
# The run is named after the settings, the prompts, the scorer and the models' weights and chat templates, so the same
# command finds the same run. With `--dry_run`, `start_run` ends the notebook here.

# %%
origin = generators.fingerprint(prompt_set.fingerprint, scorer.identity)
pairs_run = start_run(settings, base_model=prompt_set.base_model, origin=origin)
pairs_run.set(models=prompt_set.names, loading=generators.loading, weights=generators.weights)

# %% [markdown]
# ## Answers
#
# Every model answers each prompt `num_samples` times. Each answer is drawn with its own seed, from the prompt and the
# answer's number, so a resumed run gives the same answers. They are stored as FastChat's `choices`. Answers of
# an earlier run with the same prompts and sampling are used again.

# %%
samples = prompt_set.open_store(pairs_run.folder, settings)
with resumable(pairs_run):
    samples.import_answers(prompt_set.answers)  # those of --answers_dir
    samples.reuse(pairs_run, settings=settings, generators=generators)
    for name, generator in generators.load(samples):
        samples.generate_missing(name, generator, **generators.sampling)

# %% [markdown]
# ## Scores
#
# Reasoning (`<think>`) is not scored. Each score is stored with its answer. Scores of a model are used again by other
# runs. With `--vote_page` the notebook ends here. Run it again with `--from_votes` when people have voted.

# %%
with resumable(pairs_run):
    score_set = scorer.run(samples, pairs_run)

# %% [markdown]
# ## Pairs
#
# The report counts what is dropped at each step from prompts to pairs. Read it before you train: if the longer answer
# nearly always won, the next round teaches length. `--control` also writes pairs picked at random: train a second
# policy on them, and compare the two with 04 and 05.

# %%
pairs = make_pairs(settings, prompt_set, samples=samples, score_set=score_set, generators=generators)
show(pairs)
pairs.save(pairs_run)

# %% [markdown]
# ## Next
#
# Start the next round from the policy that answered. The pairs are then on-policy: both answers are likely under the
# policy and its reference. Pairs of another model's answers teach less about what this policy generates.

# %%
pairs.print_next(settings, prompt_set, run=pairs_run)
