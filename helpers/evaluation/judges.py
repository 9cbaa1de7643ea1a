"""Judges: a model, people (votes), rules, or a file of judgments. Prompts and rows are in FastChat's layouts."""

from __future__ import annotations

import json
import re
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from helpers.core import Row, SettingsError, UserError, find_path, fingerprint, read_jsonl, short_path
from helpers.data.messages import Message
from helpers.evaluation.answers import JsonlStore, ModelAnswers, resumable
from helpers.evaluation.endpoint import Endpoint, Reply, RequestRefused, run_parallel
from helpers.evaluation.judgments import (
    AnswerSet,
    Judgments,
    apply_rules,
    pair_row,
    rating_row,
    read_judgments,
    read_votes,
)
from helpers.evaluation.questions import Question, find_input, question_turns
from helpers.runs.run import Run

OUR_PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")
# FastChat (llm_judge/common.py) shows a reference in these categories only.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
FASTCHAT_NAMES = {"pairwise": ("pair-v2", "pair-math-v1"), "single": ("single-v1", "single-math-v1")}
JUDGE_FLAGS = ("judge_model", "votes", "judge_module", "judgments")


class JudgePrompts:
    """The prompts of a file, by default ours. FastChat's are recognized by their names."""

    def __init__(self, file: Path = OUR_PROMPTS) -> None:
        self.rows = {str(row.get("name")): row for row in read_jsonl(file)}
        self.file, self.is_fastchat = file, "pair-v2" in self.rows

    @classmethod
    def of(cls, settings: Any) -> JudgePrompts:
        """Those of --judge_prompts, or else of --bench_dir if it has any. Raises UserError."""
        if settings.judge_prompts:
            return cls(find_input("--judge_prompts", settings.judge_prompts))
        file = (find_path(settings.bench_dir) or OUR_PROMPTS.parent) / OUR_PROMPTS.name
        return cls(file if file.is_file() else OUR_PROMPTS)

    def name_for(self, question: Question, turn: int, mode: str) -> str:
        """The prompt for a turn (from 1) of a question. Raises UserError if the file lacks it."""
        has_reference = len(question.get("reference", ())) >= turn
        if self.is_fastchat:
            name = FASTCHAT_NAMES[mode][has_reference and question["category"] in REFERENCE_CATEGORIES]
        else:
            name = mode.removesuffix("wise") + "-reference" * has_reference
        name += "-multi-turn" * (turn > 1)
        if name not in self.rows:
            raise UserError(f"{self.file} has no prompt named {name}; it has {', '.join(sorted(self.rows))}")
        return name

    def messages(self, match: Row, question: Question, answers: ModelAnswers) -> list[Message]:
        """System and user message for a match. Raises UserError for a template with an unknown field."""
        row, turn, models = self.rows[match["prompt"]], match["turn"], match["models"]
        asked, reference = question_turns(question), question.get("reference", [])
        fields: dict[str, Any] = {"question": asked[turn - 1], "reference": _transcript(asked, reference, turn)}
        fields |= {f"question_{i}": text for i, text in enumerate(asked, 1)}
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)}
        for side, model in zip(("_a", "_b") if len(models) > 1 else ("",), models, strict=True):
            turns = answers[model][question["question_id"]]
            fields |= {f"answer{side}": turns[turn - 1], f"conversation{side}": _transcript(asked, turns, turn)}
            fields |= {f"answer{side}_{i}": text for i, text in enumerate(turns, 1)}
        try:
            text = row["prompt_template"].format(**fields)
        except (LookupError, ValueError) as error:
            raise UserError(f"{self.file}: the template of {match['prompt']} cannot be filled in: {error}") from None
        return [{"role": "system", "content": row["system_prompt"]}, {"role": "user", "content": text}]


def _transcript(asked: list[str], answers: list[str], turn: int) -> str:
    if turn == 1:
        return "".join(answers[:1])
    pairs = zip(asked[:turn], answers[:turn], strict=False)
    return "\n\n".join(f"## User\n\n{question}\n\n## Assistant\n\n{answer}" for question, answer in pairs)


def strip_reasoning(text: str) -> str:
    """A judge's reply without its reasoning: <think> blocks; all before a </think> without its opening tag, which many
    templates put into the prompt; all of a reply that opens with <think> and never closes it."""
    flags = re.DOTALL | re.IGNORECASE
    text = re.sub(r"<think(ing)?>.*?</think(ing)?>", "", text, flags=flags)
    return re.sub(r"^\s*<think(ing)?>.*", "", re.split(r"</think(?:ing)?>", text, flags=flags)[-1], flags=flags)


def parse_verdict(text: str) -> str:
    """The last verdict of a reply: "A", "B" or "tie" ([[C]]); "error" if it has none.

    FastChat takes the first of A, B and C that occurs anywhere, so that a quoted [[A]] wins.
    """
    verdicts = re.findall(r"\[\[([ABC])\]\]", strip_reasoning(text)) or ["error"]
    return str(verdicts[-1]).replace("C", "tie")


def parse_rating(text: str) -> float:
    """The last rating of a reply, from 1 to 10; -1 as in FastChat if it has none."""
    text = strip_reasoning(text)
    ratings = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", text) or re.findall(r"\[(\d+(?:\.\d+)?)\]", text)
    return rating if ratings and 1 <= (rating := float(ratings[-1])) <= 10 else -1


def model_pairs(answers: ModelAnswers, mode: str, baseline: str = "") -> list[tuple[str, ...]]:
    """Models that are judged together: all pairs, those with `baseline`, or each model alone. Raises SettingsError."""
    pairs = list(combinations(answers, 2 if mode == "pairwise" else 1))
    if baseline and mode == "pairwise":
        pairs = [(baseline, name) for name in answers if name != baseline]
    if not pairs:
        raise SettingsError(f"a comparison needs two models, and there is one: {', '.join(answers)}. Add another.")
    return pairs


def make_matches(answers: AnswerSet, pairs: list[tuple[str, ...]], mode: str, prompts: JudgePrompts) -> list[Row]:
    """Every call to make: for each question and turn both orders of each pair, or each model alone.

    A match is the start of a row of calls.jsonl: {"question_id", "turn" (from 1), "models" as shown, "prompt"}. A turn
    that a model of the pair has not answered is skipped. Raises UserError if nothing is left.
    """
    matches = []
    for question in answers.questions:
        i, turns = question["question_id"], len(question["turns"])  # FastChat's prompts have room for two
        for turn in range(1, (min(turns, 2) if prompts.is_fastchat else turns) + 1):
            name = prompts.name_for(question, turn, mode)
            for pair in pairs:
                if all(len(answers.answers[model].get(i, ())) >= turn for model in pair):
                    orders = [pair, pair[::-1]] if mode == "pairwise" else [pair]
                    matches += [{"question_id": i, "turn": turn, "models": [*o], "prompt": name} for o in orders]
    if not matches:
        raise UserError(f"nothing to judge: no question has been answered by {' and '.join(pairs[0])}")
    return matches


class Judge:
    """A judge that makes no call: people's votes, rules, or a file. `fingerprint` names what is judged."""

    def __init__(self, judgments: Judgments, answers: AnswerSet, prompts: JudgePrompts) -> None:
        self.name, self.judgments, self.answers, self.prompts = judgments.judge, judgments, answers, prompts
        timeless = [{key: value for key, value in row.items() if key != "tstamp"} for row in judgments.rows]
        self.fingerprint = fingerprint(answers.questions, answers.answers, prompts.rows, *timeless)

    def preview(self) -> str:
        """What `run` would do."""
        return f"{len(self.judgments.rows):,} judgments by {self.name}, without a call."

    def run(self, run: Run) -> Judgments:
        """All judgments; a model's calls are stored in the run's folder as they complete."""
        if not run.finished:
            run.save(answers_dir=short_path(self.answers.folder))
        return self.judgments


def make_judge(settings: Any, answers: AnswerSet) -> Judge:
    """The judge that the settings of 05_judge.py name. Raises SettingsError without one, or if it cannot rate."""
    flag = next((name for name in JUDGE_FLAGS if getattr(settings, name)), None)
    if flag is None:
        raise SettingsError(
            "no judge is set. Give --judge_model NAME (with --base_url for your own server), --votes FILE or "
            "--judge_module MODULE."
        )
    if settings.mode == "single" and flag in ("votes", "judge_module"):
        raise SettingsError(f"--mode single rates answers, and --{flag} compares them. Remove one of them.")
    prompts = JudgePrompts.of(settings)
    if flag == "judgments":
        return Judge(read_judgments(settings.judgments, settings.mode, settings.models), answers, prompts)
    pairs = model_pairs(answers.answers, settings.mode, settings.baseline)
    if flag == "judge_model":
        return ModelJudge(settings, answers, prompts, make_matches(answers, pairs, settings.mode, prompts))
    if flag == "votes":
        return Judge(Judgments("human", read_votes(settings.votes, answers)), answers, prompts)
    return Judge(apply_rules(settings.judge_module, answers, pairs), answers, prompts)


class ModelJudge(Judge):
    """A model that judges matches. Each call is stored in calls.jsonl and made only once, by whatever run."""

    def __init__(self, settings: Any, answers: AnswerSet, prompts: JudgePrompts, matches: list[Row]) -> None:
        super().__init__(Judgments(settings.judge_model, []), answers, prompts)
        self.settings, self.matches = settings, matches
        self.questions = {question["question_id"]: question for question in answers.questions}
        self.replies: list[Reply] = []  # of this run; a list is safe among threads

    def messages(self, match: Row) -> list[Message]:
        return self.prompts.messages(match, self.questions[match["question_id"]], self.answers.answers)

    def request_hash(self, match: Row) -> str:
        """What is asked of which model, in 16 hex digits that are the same in another run."""
        return fingerprint(self.name, self.messages(match), self.settings.temperature)

    def cached_calls(self) -> dict[str, Row]:
        """The calls of all runs that have a verdict, by their hash; the last line of a file may be half written."""
        s = self.settings
        files = sorted(s.output_dir.glob("[!.]*/calls.jsonl")) if s.resume != "never" else []
        rows = [row for file in files for row in read_jsonl(file, end=file.read_bytes().rfind(b"\n") + 1)]
        return {str(row.get("asked")): row for row in rows if row.get("winner") != "error"}

    def preview(self) -> str:
        """One complete prompt, and how many calls and tokens are left to send."""
        cached = self.cached_calls()
        left = [self.messages(match) for match in self.matches if self.request_hash(match) not in cached]
        tokens = sum(len(m["content"]) for messages in left for m in messages) // 4
        lines = [f"--- {m['role']} ---\n{m['content']}" for m in self.messages(self.matches[0])]
        lines += ["---", f"{len(left):,} calls like this one, about {tokens:,} tokens to read."]
        if len(left) < len(self.matches):
            lines.append(f"{len(self.matches) - len(left):,} more have been judged before.")
        return "\n".join(lines)

    def run(self, run: Run) -> Judgments:
        """Make the calls that are missing, `max_concurrency` at a time, until the budget is spent."""
        from tqdm.auto import tqdm

        s = self.settings
        self.replies = []
        endpoint = Endpoint(s.judge_model, s.base_url, s.timeout)
        store = JsonlStore(run.folder / "calls.jsonl", _call_key)
        super().run(run)
        with resumable(run):
            self._reuse_calls(store)
            missing = self._missing(store, s.retry_errors)[: s.max_calls or None]
            rows = run_parallel(missing, lambda match: self._judge(match, endpoint), s.max_concurrency)
            for row in tqdm(rows, total=len(missing), desc=self.name, unit="call"):
                if row:
                    store.add(row)
            refused = [row["refused"] for row in store.rows.values() if row.get("refused")]
            if refused and len(refused) == len(store.rows):
                raise UserError(f"every call was refused: {refused[-1]} Give --retry_errors to ask again.")
        print(self.describe_cost())
        return Judgments(self.name, self._rows(store), {}, len(self._missing(store)), len(self.matches))

    def describe_cost(self) -> str:
        """What this run spent; prices are per million tokens."""
        read, written = (sum(getattr(r, f"{kind}_tokens") for r in self.replies) for kind in ("prompt", "completion"))
        text = f"{len(self.replies):,} calls, {read:,} tokens read, {written:,} written"
        price = (read * self.settings.input_price + written * self.settings.output_price) / 1e6
        return f"{text}: {price:,.2f} at the prices given" if price else text

    def _is_spent(self) -> bool:
        tokens = sum(reply.prompt_tokens + reply.completion_tokens for reply in self.replies)
        return bool(0 < self.settings.max_calls <= len(self.replies) or 0 < self.settings.max_tokens <= tokens)

    def _missing(self, store: JsonlStore, retry_errors: bool = False) -> list[Row]:
        found = [(match, store.rows.get(_call_key(match))) for match in self.matches]
        return [m for m, row in found if row is None or (retry_errors and row["winner"] == "error")]

    def _reuse_calls(self, store: JsonlStore) -> None:
        """Copy judgments of the same prompts by the same judge from other runs."""
        cached, rows = self.cached_calls(), []
        for match in self._missing(store):
            if row := cached.get(self.request_hash(match)):
                names = dict(zip(row["models"], match["models"], strict=True))  # the same answers under other names
                rows.append(row | match | {"winner": names.get(row["winner"], row["winner"])})
        store.add(*rows)

    def _judge(self, match: Row, endpoint: Endpoint) -> Row | None:
        """The row of a match; None once the budget is spent."""
        s, messages = self.settings, self.messages(match)
        if self._is_spent():
            return None
        refused: dict[str, str] = {}
        for _ in range(2):  # a reply without a verdict is asked for once more
            try:
                reply = endpoint.ask(messages, temperature=s.temperature, max_tokens=s.max_new_tokens)
            except RequestRefused as error:  # for example too long: the others may be judged
                reply, refused = Reply("", True, 0, 0), {"refused": str(error)}
            self.replies.append(reply)
            winner = _winner(match, reply.text)
            if winner != "error" or refused or self._is_spent():
                break
        row = match | {"winner": winner, "finished": reply.finished, **refused}
        row |= {"asked": self.request_hash(match), "user_prompt": messages[-1]["content"], "judgment": reply.text}
        return row | {"tstamp": time.time(), "prompt_tokens": reply.prompt_tokens,
                      "completion_tokens": reply.completion_tokens}  # fmt: skip

    def _rows(self, store: JsonlStore) -> list[Row]:
        """FastChat's rows of the finished judgments, in the order of the matches; a pair needs both of its orders."""
        rows = [store.rows.get(_call_key(match)) for match in self.matches]
        if self.settings.mode == "single":
            return [rating_row(self.name, row) for row in rows if row]
        orders = zip(self.matches[::2], rows[::2], rows[1::2], strict=True)
        return [
            pair_row(match, match["turn"], match["models"], [self.name, match["prompt"]], [one, two])
            for match, one, two in orders if one and two
        ]  # fmt: skip


def _call_key(row: Row) -> str:
    return json.dumps([row[name] for name in ("question_id", "turn", "models", "prompt")])


def _winner(match: Row, text: str) -> Any:
    """The model that won, "tie" or "error"; for one model alone its rating or "error"."""
    if len(match["models"]) == 1:
        return rating if (rating := parse_rating(text)) > 0 else "error"
    verdict = parse_verdict(text)
    return match["models"]["AB".index(verdict)] if verdict in ("A", "B") else verdict
