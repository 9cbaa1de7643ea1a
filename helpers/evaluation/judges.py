"""A model as a judge, with FastChat's prompts, and the choice of a judge; scorers of answers, by rules or a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.core import Row, SettingsError, UserError, fingerprint, printable, read_jsonl, short_path
from helpers.data.messages import Message
from helpers.evaluation.answers import JsonlStore
from helpers.evaluation.bench import Bench
from helpers.evaluation.endpoint import Endpoint, Reply, RequestRefused, run_parallel
from helpers.evaluation.judgments import (
    AnswerSet,
    Judge,
    Judgments,
    call_failure,
    model_pairs,
    outcome_of,
    pair_row,
    rating_row,
    read_judgments,
    read_votes,
    tie_row,
)
from helpers.evaluation.questions import Answer, JudgePrompts, Question, model_name
from helpers.evaluation.verdicts import (
    RewardJudge,
    RewardModel,
    apply_rules,
    load_rules,
    parse_rating,
    parse_verdict,
    prompt_messages,
    score_by_rules,
)
from helpers.runs.checkpoints import hash_files
from helpers.runs.run import Run, list_runs
from helpers.runs.start import resumable

JUDGE_FLAGS = ("judge_model", "reward_model", "votes", "judge_module", "judgments", "bench")


def make_judge(settings: Any, answers: AnswerSet) -> Judge | Bench:
    """The judge that the settings of 05_judge.py name. Raises SettingsError without one, or if it cannot rate."""
    flag = next((name for name in JUDGE_FLAGS if getattr(settings, name)), None)
    if flag is None:
        raise SettingsError(
            "no judge is set. Give --judge_model NAME (with --base_url for your own server), --reward_model MODEL, "
            "--votes FILE, --judge_module MODULE or --bench TASK."
        )
    if settings.mode == "single" and flag not in ("judge_model", "judgments"):
        raise SettingsError(f"--mode single rates answers from 1 to 10; --{flag} compares them. Remove one of them.")
    if flag == "bench":
        return Bench(settings)
    if flag == "judgments":
        found = read_judgments(settings.judgments, settings.mode, settings.models, settings.baseline)
        return Judge(found, answers)
    pairs = model_pairs(answers.answers, settings.mode, model_name(settings.baseline, answers.answers))
    if flag == "judge_model":
        return ModelJudge(settings, answers, pairs)
    if flag == "reward_model":
        return RewardJudge(settings, answers, pairs)
    if flag == "judge_module":
        return Judge(apply_rules(settings.judge_module, answers, pairs), answers, pairs)
    judgments = Judgments("human", read_votes(settings.votes, answers, pairs, is_part=bool(settings.models)))
    unseen = len(answers.questions) - len({row["question_id"] for row in judgments.rows})
    judgments.notes += [f"{unseen} of {len(answers.questions)} questions have no vote."] if unseen else []
    return Judge(judgments, answers, pairs)


class ModelJudge(Judge):
    """A model that judges `matches`. Each call is stored in calls.jsonl and made only once, by whatever run. `ties` are
    the rows of answers that are the same."""

    def __init__(self, settings: Any, answers: AnswerSet, pairs: list[tuple[str, ...]]) -> None:
        self.settings, self.prompts = settings, JudgePrompts.of(settings)
        matches = self.prompts.make_matches(answers.questions, answers.answers, pairs, settings.mode)
        prompts = [self.prompts.rows[name] for name in sorted({match["prompt"] for match in matches})]
        super().__init__(Judgments(settings.judge_model, []), answers, pairs, prompts)
        self.matches, same = list[Row](), list[Row]()
        for m in matches:
            is_tie = settings.mode == "pairwise" and answers.is_same(m["question_id"], m["models"], m["turn"])
            (same if is_tie else self.matches).append(m)
        self.ties = [tie_row(m, m["turn"], m["models"], [self.name, m["prompt"]]) for m in same[::2]]
        self.questions = {question["question_id"]: question for question in answers.questions}
        self.replies: list[Reply] = []  # of this run; a list is safe among threads
        self._started, self._lock = 0, threading.Lock()  # calls of this run

    def messages(self, match: Row) -> list[Message]:
        return self.prompts.messages(match, self.questions[match["question_id"]], self.answers.answers)

    def request_hash(self, match: Row) -> str:
        """What is asked of which model, in 16 hex digits that are the same in another run."""
        return fingerprint(self.name, self.messages(match), self.settings.temperature)

    @functools.cached_property
    def hashes(self) -> list[str]:
        """What each match asks. The same prompt, of models with the same answers, is sent once."""
        return [self.request_hash(match) for match in self.matches]

    def cached_calls(self) -> dict[str, Row]:
        """The calls of all runs that have a verdict, by their hash. A broken file is printed and left out."""
        cached = dict[str, Row]()
        files = sorted(self.settings.output_dir.glob("[!.]*/calls.jsonl")) if self.settings.resume != "never" else []
        for file in files:
            try:  # the last line may be half written
                rows = read_jsonl(file, end=file.read_bytes().rfind(b"\n") + 1)
            except (UserError, OSError) as error:
                print(printable(f"note: calls in {short_path(file.parent)} are not used again: {error}"))
                continue
            for row in rows:
                if isinstance(row.get("models"), list) and row.get("winner", "error") != "error":
                    cached[str(row.get("asked"))] = row
        return cached

    def _preview(self) -> list[str]:
        """One complete prompt, and how many calls and tokens are left to send."""
        cached = self.cached_calls()
        asked = {key: match for key, match in zip(self.hashes, self.matches, strict=True) if key not in cached}
        tokens = sum(len(message["content"]) for match in asked.values() for message in self.messages(match)) // 4
        before = sum(key in cached for key in self.hashes)
        counts = {
            "more have been judged before.": before,
            "more are the same as one of them, and are not sent.": len(self.hashes) - before - len(asked),
            "comparisons are ties without a call, because the answers are the same.": len(self.ties),
        }
        lines = [f"--- {m['role']} ---\n{m['content']}" for match in self.matches[:1] for m in self.messages(match)]
        lines += ["---", f"{len(asked):,} calls like this one, about {tokens:,} tokens to read."]
        return lines + [f"{count:,} {what}" for what, count in counts.items() if count]

    def run(self, run: Run) -> Judgments:
        """Make the calls that are missing, `max_concurrency` at a time, until the budget is spent."""
        from tqdm.auto import tqdm

        s, self.replies, self._started = self.settings, [], 0
        endpoint = Endpoint(s.judge_model, s.base_url, s.timeout)
        super().run(run)  # first: it may delete a run
        with resumable(run):
            store = JsonlStore(run.folder / "calls.jsonl", lambda row: row["asked"])
            asked, cached = dict(zip(self.hashes, self.matches, strict=True)), self.cached_calls()
            reused = [key for key in asked if key in cached and key not in store.rows]
            store.add(*(_as_match(cached[key], asked[key]) for key in reused))
            done = {key for key, row in store.rows.items() if row["winner"] != "error" or not s.retry_errors}
            calls = [key for key in asked if key not in done][: s.max_calls or None]
            rows = run_parallel(calls, lambda key: self._judge(key, asked[key], endpoint), s.max_concurrency)
            for of_call in tqdm(rows, total=len(calls), desc=self.name, unit="call"):
                store.add(*of_call)
            refused = [row["refused"] for row in store.rows.values() if row.get("refused")]
            if refused and len(refused) == len(store.rows):
                raise UserError(f"every call was refused: {refused[-1].rstrip('.')}. Give --retry_errors to ask again.")
        print(self.describe_cost())
        calls_of = zip(map(store.rows.get, self.hashes), self.matches, strict=True)
        found = [_as_match(call, match) if call else None for call, match in calls_of]
        failed = [row for row in found if row and row["winner"] == "error"]
        for reason, count in Counter(map(call_failure, failed)).items():
            first = next(row for row in failed if call_failure(row) == reason)
            where = f"the first is question {first['question_id']}, turn {first['turn']}"
            print(printable(f"Not judged: {count} calls ({where}): {reason}"))
        return Judgments(self.name, self._rows(found), {}, found.count(None), len(found), self.judgments.notes)

    def describe_cost(self) -> str:
        """What this run spent; prices are per million tokens."""
        read, written = (sum(getattr(r, f"{kind}_tokens") for r in self.replies) for kind in ("prompt", "completion"))
        text = f"{len(self.replies):,} calls, {read:,} tokens read, {written:,} written"
        price = (read * self.settings.input_price + written * self.settings.output_price) / 1e6
        return f"{text}: {price:,.2f} at the prices given" if price else text

    def _may_call(self) -> bool:
        """Whether the budget has room for one more call, which counts from here."""
        with self._lock:
            tokens = sum(reply.prompt_tokens + reply.completion_tokens for reply in self.replies)
            is_spent = 0 < self.settings.max_calls <= self._started or 0 < self.settings.max_tokens <= tokens
            self._started += not is_spent
        return not is_spent

    def _judge(self, key: str, match: Row, endpoint: Endpoint) -> list[Row]:
        """The row of a call; none once the budget is spent."""
        s, messages = self.settings, self.messages(match)
        if not self._may_call():
            return []
        refused: dict[str, str] = {}
        for is_second in (False, True):  # a reply without a verdict is asked for once more
            try:
                reply = endpoint.ask(messages, temperature=s.temperature, max_tokens=s.max_new_tokens)
            except RequestRefused as error:  # for example too long: the others may be judged
                reply, refused = Reply("", True, 0, 0), {"refused": str(error)}
            self.replies.append(reply)
            text = reply.text + "…" * (not reply.finished)  # the end of what was cut off is not a verdict
            winner = _winner(match, text)
            if winner != "error" or refused or is_second or not self._may_call():
                break
        row = match | {"winner": winner, "finished": reply.finished, **refused, "asked": key}
        row |= {"user_prompt": messages[-1]["content"], "judgment": reply.text, "tstamp": time.time()}
        return [row | {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}]

    def _rows(self, calls: list[Row | None]) -> list[Row]:
        """FastChat's rows of the finished judgments, in the order of the matches; a pair needs both of its orders."""
        if self.settings.mode == "single":
            return [rating_row(self.name, call) for call in calls if call]
        orders = zip(self.matches[::2], calls[::2], calls[1::2], strict=True)
        return [
            pair_row(match, match["turn"], match["models"], [self.name, match["prompt"]], [one, two])
            for match, one, two in orders if one and two
        ] + self.ties  # fmt: skip


def _as_match(call: Row, match: Row) -> Row:
    """A call with the same prompt, as the call of a match, whose models may have other names."""
    names = dict(zip(call["models"], match["models"], strict=True))
    return call | match | {"winner": names.get(call["winner"], call["winner"])}


def _winner(match: Row, text: str) -> Any:
    """The model that won, "tie" or "error"; for one model alone its rating or "error"."""
    if len(match["models"]) == 1:
        return rating if (rating := parse_rating(text)) > 0 else "error"
    verdict = parse_verdict(text)
    return match["models"]["AB".index(verdict)] if verdict in ("A", "B") else verdict


Scores = dict[Any, dict[str, float]]  # question_id → name of the sample → its score
CHUNK = 64  # answers that are scored and stored at a time


@dataclasses.dataclass
class ScoreSet:
    """The scores of samples, and what tells how far they can be trusted."""

    scorer: str
    scores: Scores
    bounds: tuple[float, float] | None = None  # the worst and the best score that there is
    consistency: float | None = None  # of a judge: share of comparisons whose two orders agree
    second: ScoreSet | None = None  # another scorer's, of some of the prompts
    verdicts: list[Row] | None = None  # instead of scores: comparisons of two samples, in rows of model_judgment


@dataclasses.dataclass
class Scorer:
    """Gives each answer a number by `function`, which takes (question, answer) pairs. It is kept in scores.jsonl, and
    if `is_reusable`, used again by every run with the same `identity`."""

    name: str
    settings: Any
    identity: str = ""
    function: Callable[[list[tuple[Question, Answer]]], list[float]] | None = None
    bounds: tuple[float, float] | None = None
    second: Scorer | None = None
    is_reusable: bool = True

    def __rich__(self) -> str:
        return f"Scored by {self.name}" + (f", and in part by {self.second.name}" if self.second else "")

    def run(self, samples: Any, run: Run) -> ScoreSet:
        """Score all answers of a SampleStore with a text, and those to some prompts with the second scorer."""
        found = samples.answer_set
        texts = {n: {i: own[i] for i in own if own[i][0].strip()} for n, own in found.answers.items()}
        answers = dataclasses.replace(found, answers=texts)
        scored = self.score(answers, run)
        if self.second:
            count = min(self.settings.second_rows, len(answers.questions))
            drawn = random.Random(self.settings.seed).sample(answers.questions, count)
            scored.second = self.second.score(dataclasses.replace(answers, questions=drawn), run)
        return scored

    def score(self, answers: AnswerSet, run: Run) -> ScoreSet:
        """Score what has no score yet. Chunks are formed from all answers: a resumed run gives the same scores."""
        from tqdm.auto import tqdm

        assert self.function
        store, known = JsonlStore(run.folder / "scores.jsonl", lambda row: row["asked"]), dict[Any, Row]()
        is_reused = self.is_reusable and self.settings.resume != "never"
        for other in list_runs(self.settings.output_dir, "pairs") if is_reused else []:
            with contextlib.suppress(UserError):  # a broken file
                known |= JsonlStore(other.folder / "scores.jsonl", store.key).rows
        asked = {(q["question_id"], name): (q, own[q["question_id"]][0]) for name, own in answers.answers.items()
                 for q in answers.questions if q["question_id"] in own}  # fmt: skip
        keys = {place: fingerprint(self.identity, prompt_messages(q), q, text) for place, (q, text) in asked.items()}
        unique = {key: asked[place] for place, key in keys.items()}
        store.add(*(known[key] for key in unique if key in known and key not in store.rows))
        order = list(unique)
        for start in tqdm(range(0, len(order), CHUNK), desc=self.name, unit="batch"):
            chunk = order[start : start + CHUNK]
            if not store.rows.keys() >= {*chunk}:
                scored = zip(chunk, self.function([unique[key] for key in chunk]), strict=True)
                store.add(*({"asked": key, "scorer": self.name, "score": score,
                             "question_id": unique[key][0]["question_id"]}
                            for key, score in scored if key not in store.rows))  # fmt: skip
        scores: Scores = {}
        for (i, name), key in keys.items():
            scores.setdefault(i, {})[name] = store.rows[key]["score"]
        low, high = self.bounds or (math.inf, -math.inf)
        are_within = all(low <= store.rows[key]["score"] <= high for key in unique)
        return ScoreSet(self.name, scores, self.bounds if are_within else None)


def rules_scorer(settings: Any, questions: list[Question]) -> Scorer:
    """Scores by a module's function, tried on one question of each kind, by its fields."""
    rules = load_rules(settings.judge_module, "score")
    for question in {tuple(sorted(question)): question for question in questions}.values():
        score_by_rules(rules, question, Answer("x"))

    def score(answered: list[tuple[Question, Answer]]) -> list[float]:
        return [score_by_rules(rules, *each) for each in answered]

    # what rules read besides, such as a list of words, may change too: their scores are not used again
    folder = Path(str(rules.__file__)).parent
    files = {Path(file) for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))}
    identity = f"{settings.judge_module} {hash_files(file for file in files if file.parent == folder)}"
    return Scorer(f"rules {settings.judge_module}", settings, identity, score, (0.0, 1.0), is_reusable=False)


def reward_scorer(settings: Any, questions: list[Question]) -> Scorer:
    s = settings
    model = RewardModel(s.reward_model, s.reward_quantization, s.batch_size, s.trust_remote_code)
    name, identity = f"reward model {model.name}", model.fingerprint
    return Scorer(name, s, identity, lambda each: model.score_answers([(q, [answer]) for q, answer in each]))


class JudgeScorer(Scorer):
    """Scores by a model that rates answers from 1 to 10, or by the share of comparisons that an answer wins."""

    def __init__(self, settings: Any, questions: list[Question]) -> None:
        super().__init__(settings.judge_model, settings)
        # check its key, its address and its prompts
        Endpoint(settings.judge_model, settings.judge_base_url, flag="--judge_base_url")
        if questions:
            judge = self._judge(AnswerSet(questions, {n: {q["question_id"]: [n] for q in questions} for n in "ab"}))
            for match in {match["prompt"]: match for match in judge.matches}.values():
                judge.messages(match)

    def score(self, answers: AnswerSet, run: Run) -> ScoreSet:
        judgments = self._judge(answers).run(run)
        judgments.raise_if_incomplete("--judge_max_new_tokens")
        return rating_scores(judgments) if self.settings.mode == "single" else win_shares(judgments)

    def _judge(self, answers: AnswerSet) -> ModelJudge:
        s = self.settings
        own = {"temperature": 0.0, "max_new_tokens": s.judge_max_new_tokens, "base_url": s.judge_base_url}
        given = SimpleNamespace(**s.values() | own | {"output_dir": s.output_dir, "bench_dir": "", "models": ()})
        return ModelJudge(given, answers, model_pairs(answers.answers, s.mode))


def rating_scores(judgments: Judgments) -> ScoreSet:
    """The ratings of first turns as scores."""
    scores: Scores = {}
    for row in judgments.rows:
        if row["turn"] == 1 and row["score"] != -1:
            scores.setdefault(row["question_id"], {})[row["model"]] = float(row["score"])
    return ScoreSet(judgments.judge, scores, (1.0, 10.0))


def win_shares(judgments: Judgments) -> ScoreSet:
    """The share of comparisons that each answer wins; a comparison whose two orders disagree is a tie."""
    outcomes, agree = dict[Any, dict[str, list[float]]](), list[bool]()
    for row in judgments.rows:
        if (won := outcome_of(row)) is not None:
            agree += [] if row.get("identical") else [row["g1_winner"] == row["g2_winner"]]
            own = outcomes.setdefault(row["question_id"], {})
            own.setdefault(row["model_1"], []).append(1 - won)
            own.setdefault(row["model_2"], []).append(won)
    scores = {i: {name: sum(won) / len(won) for name, won in own.items()} for i, own in outcomes.items()}
    return ScoreSet(judgments.judge, scores, consistency=sum(agree) / len(agree) if agree else None)
