"""Scores of answers: by rules, a reward model or a judge; or people, who vote on a page."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from helpers.core import (
    CleanExit,
    Row,
    SettingsError,
    UserError,
    fingerprint,
    import_user_module,
    printable,
    short_path,
)
from helpers.data.formats import row_template_options
from helpers.data.messages import Message
from helpers.evaluation.answers import JsonlStore
from helpers.evaluation.endpoint import Endpoint
from helpers.evaluation.judges import ModelJudge
from helpers.evaluation.judgments import AnswerSet, Judgments, model_pairs, read_judgments, read_votes
from helpers.evaluation.questions import Answer, Question
from helpers.evaluation.results import OUTCOMES
from helpers.evaluation.reward_model import RewardModel
from helpers.evaluation.samples import (
    VERDICTS,
    Prompts,
    SampleStore,
    chosen_scorers,
    find_judgments,
    prompt_messages,
    refuse_without_effect,
)
from helpers.runs.checkpoints import quoted
from helpers.runs.run import Run, list_runs

CHUNK = 64  # answers that are scored and stored at a time
NO_SCORER = (
    "nothing scores the answers. Give --judge_module MODULE, --reward_model MODEL or --judge_model NAME, or let people "
    "vote with --vote_page."
)
Scores = dict[Any, dict[str, float]]  # question_id → name of the sample → its score


@dataclasses.dataclass
class Scored:
    """The scores of samples, and what tells how far they can be trusted."""

    scorer: str
    scores: Scores
    bounds: tuple[float, float] | None = None  # the worst and the best score that there is
    consistency: float | None = None  # of a judge: share of comparisons whose two orders agree
    second: Scored | None = None  # another scorer's, of some of the prompts
    verdicts: list[Row] | None = None  # instead of scores: comparisons of two samples, in rows of model_judgment


class Scorer:
    """Gives each answer a number by `function`, which takes (question, answer) pairs. It is kept in scores.jsonl, and
    used again by every run with the same `identity`."""

    def __init__(
        self,
        name: str,
        settings: Any,
        identity: str = "",
        function: Callable[[list[tuple[Question, Answer]]], list[float]] | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.name, self.settings, self.identity, self.function, self.bounds = name, settings, identity, function, bounds
        self.second: Scorer | None = None

    def __rich__(self) -> Any:
        from rich.text import Text

        return Text(f"Scored by {self.name}" + (f", and in part by {self.second.name}" if self.second else ""))

    def check(self, questions: list[Question]) -> None:
        """Try to score, before anything is sampled. Raises SettingsError or UserError."""

    def run(self, samples: SampleStore, run: Run) -> Scored:
        """Score all answers with a text, and those to some prompts with the second scorer."""
        found = samples.answer_set
        texts = {n: {i: own[i] for i in own if own[i][0].strip()} for n, own in found.answers.items()}
        answers = dataclasses.replace(found, answers=texts)
        scored = self.score(answers, run)
        if self.second:
            count = min(self.settings.second_rows, len(answers.questions))
            drawn = random.Random(self.settings.seed).sample(answers.questions, count)
            ids = {question["question_id"] for question in drawn}
            some = {n: {i: turns for i, turns in own.items() if i in ids} for n, own in answers.answers.items()}
            scored.second = self.second.score(dataclasses.replace(answers, questions=drawn, answers=some), run)
        return scored

    def score(self, answers: AnswerSet, run: Run) -> Scored:
        """Score what has no score yet. Chunks are formed from all answers: a resumed run gives the same scores."""
        from tqdm.auto import tqdm

        assert self.function
        store = JsonlStore(run.folder / "scores.jsonl", lambda row: row["asked"])
        known: dict[Any, Row] = {}
        for other in list_runs(self.settings.output_dir, "pairs") if self.settings.resume != "never" else []:
            with contextlib.suppress(UserError):  # a broken file
                known |= JsonlStore(other.folder / "scores.jsonl", lambda row: row["asked"]).rows
        questions = {q["question_id"]: q for q in answers.questions}
        asked = {(i, n): (questions[i], turns[0]) for n, own in answers.answers.items() for i, turns in own.items()}
        keys = {place: fingerprint(self.identity, prompt_messages(q), q, text) for place, (q, text) in asked.items()}
        unique = {key: asked[place] for place, key in keys.items()}
        store.add(*(known[key] for key in unique if key in known and key not in store.rows))
        order = list(unique)
        for start in tqdm(range(0, len(order), CHUNK), desc=self.name, unit="batch"):
            chunk = order[start : start + CHUNK]
            if missing := [key for key in chunk if key not in store.rows]:
                values = dict(zip(chunk, self.function([unique[key] for key in chunk]), strict=True))
                asked_of = {key: unique[key][0]["question_id"] for key in missing}
                store.add(*({"asked": key, "scorer": self.name, "score": values[key], "question_id": asked_of[key]}
                            for key in missing))  # fmt: skip
        scores: Scores = {}
        for (i, name), key in keys.items():
            scores.setdefault(i, {})[name] = store.rows[key]["score"]
        low, high = self.bounds or (math.inf, -math.inf)
        are_within = all(low <= score <= high for own in scores.values() for score in own.values())
        return Scored(self.name, scores, self.bounds if are_within else None)


class RulesScorer(Scorer):
    """Scores by a module's function."""

    def check(self, questions: list[Question]) -> None:
        """Score an answer to one question of each kind, by its fields."""
        assert self.function
        self.function([(q, Answer("x")) for q in {tuple(sorted(q)): q for q in questions}.values()])


class _Fields(dict[str, Any]):
    """A question whose missing fields raise MissingField: other errors of the rules are their own."""

    class MissingField(KeyError):
        pass

    def __missing__(self, key: str) -> Any:
        raise self.MissingField(key)


class JudgeScorer(Scorer):
    """Scores by a model that rates answers from 1 to 10, or by the share of comparisons that an answer wins."""

    def check(self, questions: list[Question]) -> None:
        """Check the key, the address, and the prompts of the judge."""
        Endpoint(self.settings.judge_model, self.settings.judge_base_url, flag="--judge_base_url")
        answers = {name: {q["question_id"]: [name] for q in questions} for name in ("one", "two")}
        if questions:
            judge = self._judge(AnswerSet(questions, answers))
            for match in {match["prompt"]: match for match in judge.matches}.values():
                judge.messages(match)

    def score(self, answers: AnswerSet, run: Run) -> Scored:
        judgments = self._judge(answers).run(run)
        judgments.raise_if_incomplete("--judge_max_new_tokens")
        return rating_scores(judgments) if self.settings.mode == "single" else _win_shares(judgments)

    def _judge(self, answers: AnswerSet) -> ModelJudge:
        s = self.settings
        own = {"temperature": 0.0, "max_new_tokens": s.judge_max_new_tokens, "base_url": s.judge_base_url}
        given = SimpleNamespace(**s.values() | own | {"output_dir": s.output_dir, "bench_dir": "", "models": ()})
        return ModelJudge(given, answers, model_pairs(answers.answers, s.mode))


def rating_scores(judgments: Judgments) -> Scored:
    """The ratings of first turns as scores."""
    scores: Scores = {}
    for row in judgments.rows:
        if row["turn"] == 1 and row["score"] != -1:
            scores.setdefault(row["question_id"], {})[row["model"]] = float(row["score"])
    return Scored(judgments.judge, scores, (1.0, 10.0))


def _win_shares(judgments: Judgments) -> Scored:
    """The share of comparisons that each answer wins; a comparison whose two orders disagree is a tie."""
    outcomes: dict[Any, dict[str, list[float]]] = {}
    agree = []
    for row in judgments.rows:
        calls = {row["g1_winner"], row["g2_winner"]}
        if "error" in calls:
            continue
        agree += [] if row.get("identical") else [len(calls) == 1]
        won = OUTCOMES[calls.pop() if len(calls) == 1 else "tie"]  # 1 for the second
        own = outcomes.setdefault(row["question_id"], {})
        own.setdefault(row["model_1"], []).append(1 - won)
        own.setdefault(row["model_2"], []).append(won)
    scores = {i: {name: sum(won) / len(won) for name, won in own.items()} for i, own in outcomes.items()}
    return Scored(judgments.judge, scores, consistency=sum(agree) / len(agree) if agree else None)


class GivenVerdicts(Scorer):
    """What a judge or people have decided before: nothing is scored."""

    def __init__(self, settings: Any) -> None:
        """Read the judgments. Raises UserError, or SettingsError for settings that comparisons leave without effect."""
        self.judgments: Judgments | None = None
        if settings.from_judgments:
            self.judgments = read_judgments(short_path(find_judgments(settings)), "", flag="--from_judgments")
        self.is_rated = bool(self.judgments and "score" in self.judgments.rows[0])
        if not self.is_rated:
            refuse_without_effect(settings, ("pairing",), *(name for name in VERDICTS if getattr(settings, name)))
        super().__init__("the verdicts that are given", settings)

    def run(self, samples: SampleStore, run: Run) -> Scored:
        """Ratings of first turns as scores, or comparisons. Verdicts on a model are about its first sample."""
        answers = samples.answer_set
        firsts = {model: name for name, (model, k) in samples.names.items() if k == 0}
        if self.judgments is None:
            known = answers.answers | {model: answers.answers[name] for model, name in firsts.items()}
            pairs = [pair for names in (answers.answers, firsts) for pair in itertools.combinations(names, 2)]
            found = dataclasses.replace(answers, answers=known)
            votes = read_votes(self.settings.from_votes, found, [*dict.fromkeys(pairs)], "--from_votes", is_part=True)
            judgments = Judgments("human", votes)
        else:
            judgments = self.judgments
        ids = {str(q["question_id"]): q["question_id"] for q in answers.questions}
        rows = [
            row | {key: firsts.get(row[key], row[key]) for key in ("model", "model_1", "model_2") if key in row}
            | {"question_id": ids.get(str(row["question_id"]))} for row in judgments.rows
        ]  # fmt: skip
        judgments = dataclasses.replace(judgments, rows=rows)
        if self.is_rated:
            return rating_scores(judgments)
        consistency = _win_shares(judgments).consistency if self.judgments else None
        return Scored(judgments.judge, {}, consistency=consistency, verdicts=rows)


class VotePage(Scorer):
    """People, who vote on a page for the best answer to each prompt."""

    def run(self, samples: SampleStore, run: Run) -> Scored:
        """Write the page. Raises CleanExit: there are no pairs before the votes."""
        names = [*samples.names]
        sampling = {name: self.settings.values()[name] for name in ("temperature", "top_p", "num_samples")}
        page = samples.write_vote_page(names, title=run.name, settings=sampling)
        run.save(status="interrupted", page=page)
        command = f"python notebooks/06_pairs.py --from_votes ~/Downloads/votes-{page}*.json"
        command += f" --answers_dir {quoted(run.folder)}" + " --control" * self.settings.control
        margin = self.settings.min_score_margin
        command += f" --min_score_margin {margin:g}" if margin else ""
        command += f" --recipe {quoted(self.settings.recipe)}" if self.settings.recipe else ""
        raise CleanExit(f"Vote on {short_path(run.folder / 'answers.html')} and export the votes.\nNext: {command}")


def make_scorer(settings: Any, prompts: Prompts | None = None, second: str = "") -> Scorer:
    """The scorer that the settings name, tried on the prompts before anything is sampled. Raises SettingsError.

    `second` names the setting of a scorer instead.
    """
    given = prompts.answers if prompts else {}
    counts = Counter(i for rows in given.values() for i, row in rows.items() for _ in row["choices"])
    if counts and max(counts.values()) < 2:
        raise UserError("No question has two answers to compare. Give answers of two models, or several choices.")
    if any(getattr(settings, name) for name in VERDICTS):
        return GivenVerdicts(settings)
    highest = chosen_scorers(settings)
    if settings.second_scorer and not highest and getattr(settings, settings.second_scorer) and not second:
        raise SettingsError(
            f"--second_scorer {settings.second_scorer} is the only scorer. Give another one to compare it with."
        )
    if len(highest) > 1 and not second:
        raise SettingsError(f"--{' and --'.join(highest)} exclude each other. Give one, or name the other with "
                            "--second_scorer.")  # fmt: skip
    if not highest or (second and not getattr(settings, second)):
        raise SettingsError(NO_SCORER if not second else f"--second_scorer {second} needs --{second}. Give it, too.")
    scorer = _make(second or highest[0], settings)
    scorer.check(prompts.questions if prompts else [])
    if settings.second_scorer and not second:
        scorer.second = make_scorer(settings, prompts, settings.second_scorer)
    return scorer


def _make(flag: str, settings: Any) -> Scorer:
    if flag == "judge_module":
        return _rules(settings)
    if flag == "reward_model":
        return _reward_model(settings)
    if flag == "judge_model":
        return JudgeScorer(settings.judge_model, settings)
    return VotePage("people", settings)


def _rules(settings: Any) -> Scorer:
    module = settings.judge_module
    rules = import_user_module(module, "judge_module")
    if not callable(getattr(rules, "score", None)):
        raise SettingsError(f"--judge_module {module} is not a module with score(). Write one, as in recipes/demo.")
    source = hashlib.sha256(inspect.getsource(rules).encode()).hexdigest()[:16]

    def score(answers: list[tuple[Question, Answer]]) -> list[float]:
        numbers = []
        for question, answer in answers:
            try:
                value = rules.score(str(answer), _Fields({"prompt": question["turns"][0], **question}))
            except _Fields.MissingField as error:
                raise SettingsError(f"--judge_module {module} needs a field {error} in every question. Add it to the "
                                    "prompts, or use another scorer.") from None  # fmt: skip
            except Exception as error:
                at = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == rules.__file__]
                where = f" in line {at[-1].lineno}" if at else ""
                raise SettingsError(printable(
                    f"--judge_module {module}: score() fails{where} on the answer {str(answer)[:60]!r} to question "
                    f"{question['question_id']}: {type(error).__name__}: {error}. Correct the module."
                )) from None  # fmt: skip
            numbers.append(_to_number(value, module))
        return numbers

    return RulesScorer(f"rules {module}", settings, f"{module} {source}", score, (0.0, 1.0))


def _to_number(score: Any, module: str) -> float:
    """A score as a number. Of an object with several fields each counts twice as much as the next, in all at most 1."""
    is_record = dataclasses.is_dataclass(score) and not isinstance(score, type)
    values = [math.nan]
    with contextlib.suppress(TypeError, ValueError):
        parts = dataclasses.astuple(cast(Any, score)) if is_record else (score,)
        values = [math.nan if isinstance(part, str) else float(part) for part in parts]
    if not all(map(math.isfinite, values)):
        raise SettingsError(f"--judge_module {module}: score() returns {printable(repr(score))}. Return a finite "
                            "number, or a dataclass of such numbers.")  # fmt: skip
    if not is_record:
        return values[0]
    weights = [2.0**-k for k in range(len(values))]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _reward_model(settings: Any) -> Scorer:
    model = RewardModel(
        settings.reward_model, settings.reward_quantization, settings.batch_size, settings.trust_remote_code
    )

    def score(answers: list[tuple[Question, Answer]]) -> list[float]:
        talks: list[list[Message]] = [
            [*prompt_messages(q), {"role": "assistant", "content": str(a)}] for q, a in answers
        ]
        return model.score(talks, [row_template_options(q) for q, _ in answers])

    return Scorer(f"reward model {model.name}", settings, model.fingerprint, score)
