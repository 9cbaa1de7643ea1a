"""Judges: a model, people (votes), rules, or a file of judgments. Prompts and rows are in FastChat's layouts."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from helpers.core import Row, SettingsError, UserError, fingerprint, printable, short_path
from helpers.data.messages import Message
from helpers.evaluation.answers import JsonlStore
from helpers.evaluation.bench import Bench
from helpers.evaluation.endpoint import Endpoint, Reply, RequestRefused, run_parallel
from helpers.evaluation.judgments import (
    AnswerSet,
    Judgments,
    apply_rules,
    call_failure,
    describe_self_judging,
    model_name,
    model_pairs,
    pair_row,
    rating_row,
    read_calls,
    read_judgments,
    read_votes,
    tie_row,
)
from helpers.evaluation.questions import JudgePrompts, strip_thoughts
from helpers.evaluation.reward_model import RewardModel, judge_by_scores
from helpers.runs.run import Run
from helpers.runs.start import resumable

JUDGE_FLAGS = ("judge_model", "reward_model", "votes", "judge_module", "judgments", "bench")
# [[A]], [[ 9/10 ]], [[Assistant B]] ...; its last bracket may be missing at the end of a reply. [[1]](url) is a link.
BRACKETED = re.compile(r"\[\s*\[([^\[\]]{1,60})\](?:\s*\](?!\()|\W*\Z)")
VERDICT = re.compile(
    r"(?:(?:my|the|final|verdict|winner|choice|is|assistant|answer|model|response|option|conversation)\b\W*)*"
    r"(?:a\s+)?(tie|draw|[abc])(?:\W+(?:s|is|wins?|better|the|winner|best|a|tie|c|answer|response))*", re.IGNORECASE,
)  # fmt: skip
NUMBER = r"(\d+(?:[.,]\d+)?)(?:\s*(?:/|(?:out )?of)\s*(\d+)(?:\.0+)?)?"  # and what it is out of
RATING = re.compile(rf"(?:(?:my|the|final|overall|rating|score|is)\b\W*)*{NUMBER}", re.IGNORECASE)
# Without the brackets: a line, or for a rating a sentence, that says what it is.
LABEL = r"[^\w\n]{0,20}(?:(?:my|the|final|overall)\W{1,20})*"
LABELLED_VERDICT = re.compile(
    rf"^{LABEL}(?:verdict|decision|judge?ment|choice|winner)\b\W{{0,20}}(?:is\b)?\W{{0,20}}(.+)$",
    re.IGNORECASE | re.MULTILINE,
)
LABELLED_RATING = re.compile(
    rf"(?:(?:^|[.!?]\s){LABEL}(?:rating|score|grade)\b(?: ?\([^)\n]*\))?[^\w\n]*(?:is\b[^\w\n]*)?"
    r"|\bI(?:'(?:d|ll)| would| will)? (?:rate|give|score)\b[^.\n\d]{0,60}(?=[\d.,]+\s*(?:/|out of|\W*$))"
    r"|^[^\w\n]{0,20}(?=[\d.,]+\s*(?:/|out of)))"
    rf"{NUMBER}(?![\d.,/]*\d|…|\s*-\s*\d|\s*(?:to|or|and|for|would)\b)", re.IGNORECASE | re.MULTILINE,
)  # fmt: skip
# What is in the same sentence before or after a verdict that is denied, quoted, supposed or explained.
NOT_GIVEN_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|rather than|than|instead of|considered|tempted"
    r"|(?:wrong|unfair|hard|tempting)(?= to))|n't)"
    r"(?:\s+(?:to|a|an|the|it|be|is|my|as|of|for|with|go|say|choose|pick|select|give|award|call|think|vote|prefer"
    r"|verdict|rating))*[\s\"'`*(]*$"
    r"|\b(?:says|said|wrote|writes|contains|includes|quotes|returns|outputs|prints|ends with|asks|told|tells)[:,]?\s+"
    r"(?:[\w']+ +){0,4}[\"'`*(]*$"
    r"|\b(?:give|output|write|state) your\b|\be\.g\.|\bfor example\b|\binitial|\bat first\b"
    r"|\bfirst (?:thought|impression)\b|\b(?:would|could|might) (?:not )?have\b",
    re.IGNORECASE,
)
NOT_GIVEN_AFTER = re.compile(
    r"[\"'`*)\s]*(?:(?:if|when|means?|indicates?|is for|for a tie|at first|initially"
    r"|(?:is|was) (?:not|wrong)|isn)\b"
    r"|(?:would|could|might)\b(?! be (?:my|the (?:right|fair|final|correct)\b)))",
    re.IGNORECASE,
)
DECISIVE_BEFORE = re.compile(
    r"\b(?:verdict|decision|judge?ment|final(?:ly)?|overall|conclu\w+|winner|choice|cho+se|pick|prefer|therefore|thus|hence"
    r"|rating|rate|score|give|award|settle|in the end|no|actually|wait|go with|goes to)\b", re.IGNORECASE,
)  # fmt: skip
DECISIVE_AFTER = re.compile(r"\W*(?:it is|wins|remains|is my)\b", re.IGNORECASE)
CLAUSE_END = re.compile(r"\n|;|(?<=[.!?])(?<!e\.g\.)\s+|\b(?:but|however|yet)\b", re.IGNORECASE)
JOINT = re.compile(r"(?:or|and|nor|vs|versus|maybe|perhaps|possibly|even)*")
INDEX = re.compile(r"[A-Za-z0-9_)\]]$|\w\($")  # before a number in brackets: x[[1]], f([[1]])


def strip_reasoning(text: str) -> str:
    """A judge's reply without its thoughts and empty lines. Quotes and dashes become ASCII."""
    text = strip_thoughts(text).translate(str.maketrans("\u2018\u2019\u201c\u201d\u2013", "''\"\"-"))
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def parse_verdict(text: str) -> str:
    """The last verdict that a reply gives: "A", "B" or "tie" ([[C]]); "error" if it gives none, or none that is clear.

    FastChat takes the first of A, B and C that occurs anywhere, also one that is quoted or denied.
    """
    text = strip_reasoning(text)
    verdict = _last_given(text, _read_verdict)
    if verdict is None:
        plain = [v for found in LABELLED_VERDICT.finditer(text) if (v := _read_verdict(found[1]))]
        plain = plain or re.findall(r"^\W*\[([ABC])\]\W*$|\A\W*([ABC])\W*\Z", text, re.MULTILINE)[:1]
        verdict = "".join(plain[-1:] and plain[-1])
    return str(verdict or "error").replace("C", "tie")


def parse_rating(text: str) -> float:
    """The last rating that a reply gives, from 1 to 10; -1 as in FastChat if it gives none, or none that is clear.

    A rating is in double brackets or is called one: a number in single brackets may be a citation or an index.
    """
    text = strip_reasoning(text)
    rating = _last_given(text, _read_rating)
    if rating is None:
        plain = [_read_rating(f"{number}/{scale or 10}") for number, scale in LABELLED_RATING.findall(text)]
        rating = (plain or [_read_rating(text)])[-1]
    return float(rating or -1)


def _read_verdict(text: str) -> str | None:
    found = VERDICT.fullmatch(text.replace("_", " ").strip(" \n\t*`'\":.!-()[]"))
    return {"a": "A", "b": "B"}.get(found[1].lower(), "C") if found else None


def _read_rating(text: str) -> float | None:
    """The number in a text that has nothing else; -1 for one that is out of range or unclear."""
    found = RATING.fullmatch(text.strip(" \n\t*`'\":.![]"))
    rating = float(found[1].replace(",", ".")) if found and found[2] in (None, "10") else -1.0
    return rating if 1 <= rating <= 10 else -1.0 if re.search(r"\d", text) else None


def _last_given(text: str, read: Callable[[str], Any]) -> Any:
    """The last value in double brackets that is given, not only mentioned. None if there is none; "" if it is unclear.

    Of several that differ, one is clear if it is alone on a line, or with a word such as "verdict" before it.
    """
    text = re.sub(r"\\(?=[\[\]])|</?[a-z]+>", "", text)  # escapes and tags
    if re.search(r"\[\s*\[[^\[\]]*\Z", text):
        return ""  # cut off
    mentions: list[list[Any]] = []  # value, whether it is given, denied or listed with others, whether it is clear
    end = 0
    for found in BRACKETED.finditer(text):
        between, rest = text[end : found.start()], text[found.end() : found.end() + 300]
        scale = re.match(r"\s*(?:/|out of)\s*[\d.]+", rest)
        rest = rest[scale.end() :] if scale else rest
        value = read(found[1] + (scale[0] if scale else ""))
        if value is None or (isinstance(value, float) and INDEX.search(text[: found.start()])):
            continue
        before, after = CLAUSE_END.split(between)[-1], CLAUSE_END.split(rest, maxsplit=1)[0]
        end = found.end()
        state = "denied" if NOT_GIVEN_BEFORE.search(before) or NOT_GIVEN_AFTER.match(after) else "given"
        joint = re.sub(r"\W+", "", between).lower()
        if mentions and mentions[-1][0] != value and JOINT.fullmatch(joint):
            if mentions[-1][1] == "denied":
                state = "denied" if joint else state
            elif state == "given":
                state = mentions[-1][1] = "listed"
        starts, ends = not re.search(r"\w", before), not re.search(r"\w", after)
        clear = DECISIVE_BEFORE.search(before) or DECISIVE_AFTER.match(after) or (starts and ends)
        mentions.append([value, state, bool(clear), starts or ends or isinstance(value, str)])
    given = [mention for mention in mentions if mention[1] == "given"]
    if len({mention[0] for mention in given}) == 1:
        return next((value for value, _, clear, alone in given if clear or alone), None)
    is_unclear = bool(given) or any(state == "listed" for _, state, _, _ in mentions)
    return next((value for value, _, clear, _ in reversed(given) if clear), "" if is_unclear else None)


class Judge:
    """A judge that makes no call: people's votes, rules, or a file. `fingerprint` names what is judged."""

    def __init__(
        self, judgments: Judgments, answers: AnswerSet, pairs: Sequence[tuple[str, ...]] = (), *prompts: Any
    ) -> None:
        self.name, self.judgments, self.answers = judgments.judge, judgments, answers
        judgments.notes += answers.unanswered(pairs)
        timeless = [{key: value for key, value in row.items() if key != "tstamp"} for row in judgments.rows]
        texts = [[name, *([str(i), turns] for i, turns in own.items())] for name, own in answers.answers.items()]
        order: list[Any] = sorted(pairs) or [*answers.answers]  # which model of a pair is the baseline
        self.fingerprint = fingerprint(answers.questions, sorted(texts), order, prompts, *sorted(map(str, timeless)))

    def preview(self) -> str:
        """What `run` would do."""
        ties = sum(row.get("identical", False) for row in self.judgments.rows)
        lines = [f"{len(self.judgments.rows):,} judgments by {self.name}, without a call."]
        lines += [f"{ties:,} of them are ties, because the answers are the same."] if ties else []
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What to know before the judge works."""
        return [*self.judgments.notes, *describe_self_judging(self.name, self.answers.answers)]

    def run(self, run: Run) -> Judgments:
        """All judgments; a model's calls are stored in the run's folder as they complete."""
        if not run.finished:
            run.save(answers_dir=short_path(self.answers.folder))
        return self.judgments


def make_judge(settings: Any, answers: AnswerSet) -> Judge | Bench:
    """The judge that the settings of 05_judge.py name. Raises SettingsError without one, or if it cannot rate."""
    flag = next((name for name in JUDGE_FLAGS if getattr(settings, name)), None)
    if flag is None:
        raise SettingsError(
            "no judge is set. Give --judge_model NAME (with --base_url for your own server), --reward_model MODEL, "
            "--votes FILE, --judge_module MODULE or --bench TASK."
        )
    if settings.mode == "single" and flag in ("reward_model", "votes", "judge_module", "bench"):
        raise SettingsError(f"--mode single rates answers from 1 to 10; --{flag} compares them. Remove one of them.")
    if flag == "bench":
        return Bench(settings)
    if flag == "judgments":
        return Judge(read_judgments(settings.judgments, settings.mode, settings.models), answers)
    pairs = model_pairs(answers.answers, settings.mode, model_name(settings.baseline, answers.answers))
    if flag == "judge_model":
        return ModelJudge(settings, answers, pairs)
    if flag == "reward_model":
        return RewardJudge(settings, answers, pairs)
    if flag == "judge_module":
        return Judge(apply_rules(settings.judge_module, answers, pairs), answers, pairs)
    judgments = Judgments("human", read_votes(settings.votes, answers, pairs))
    unseen = len(answers.questions) - len({row["question_id"] for row in judgments.rows})
    judgments.notes += [f"{unseen} of {len(answers.questions)} questions have no vote."] if unseen else []
    return Judge(judgments, answers, pairs)


class RewardJudge(Judge):
    """A reward model: of two answers, the one with the higher score wins."""

    def __init__(self, settings: Any, answers: AnswerSet, pairs: list[tuple[str, ...]]) -> None:
        self.reward, self.pairs = RewardModel(settings.reward_model, settings.quantization), pairs
        name = f"reward model {self.reward.name}"
        super().__init__(Judgments(name, []), answers, pairs, self.reward.fingerprint)

    def preview(self) -> str:
        return "\n".join([f"The answers to {len(self.answers.questions):,} questions, by {self.name}.", *self.notes()])

    def run(self, run: Run) -> Judgments:
        super().run(run)
        with resumable(run):
            rows, means = judge_by_scores(self.reward, self.answers, self.pairs, run.folder / "scores.jsonl")
        return Judgments(self.name, rows, notes=[*self.judgments.notes, means])


class ModelJudge(Judge):
    """A model that judges `matches`. Each call is stored in calls.jsonl and made only once, by whatever run.

    `ties` are the rows of answers that are the same.
    """

    def __init__(self, settings: Any, answers: AnswerSet, pairs: list[tuple[str, ...]]) -> None:
        self.settings, self.prompts = settings, JudgePrompts.of(settings)
        matches = self.prompts.make_matches(answers.questions, answers.answers, pairs, settings.mode)
        used = sorted({match["prompt"] for match in matches})
        super().__init__(
            Judgments(settings.judge_model, []), answers, pairs, [self.prompts.rows[name] for name in used]
        )
        self.matches, same = list[Row](), list[Row]()
        for match in matches:
            is_tie = settings.mode == "pairwise" and answers.is_same(
                match["question_id"], match["models"], match["turn"]
            )
            (same if is_tie else self.matches).append(match)
        self.ties = [tie_row(m, m["turn"], m["models"], [self.name, m["prompt"]]) for m in same[::2]]
        self.questions = {question["question_id"]: question for question in answers.questions}
        self.replies: list[Reply] = []  # of this run; a list is safe among threads

    def messages(self, match: Row) -> list[Message]:
        return self.prompts.messages(match, self.questions[match["question_id"]], self.answers.answers)

    def request_hash(self, match: Row) -> str:
        """What is asked of which model, in 16 hex digits that are the same in another run."""
        return fingerprint(self.name, self.messages(match), self.settings.temperature)

    def cached_calls(self) -> dict[str, Row]:
        """The calls of all runs that have a verdict, by their hash."""
        files = sorted(self.settings.output_dir.glob("[!.]*/calls.jsonl")) if self.settings.resume != "never" else []
        return {str(row.get("asked")): row for file in files for row in read_calls(file)}

    def preview(self) -> str:
        """One complete prompt, and how many calls and tokens are left to send."""
        cached = self.cached_calls()
        hashes = [self.request_hash(match) for match in self.matches]
        asked = {one: match for one, match in zip(hashes, self.matches, strict=True) if one not in cached}
        left = [self.messages(match) for match in asked.values()]
        tokens = sum(len(m["content"]) for messages in left for m in messages) // 4
        lines = [f"--- {m['role']} ---\n{m['content']}" for match in self.matches[:1] for m in self.messages(match)]
        lines += ["---", f"{len(left):,} calls like this one, about {tokens:,} tokens to read."]
        if before := sum(one in cached for one in hashes):
            lines.append(f"{before:,} more have been judged before.")
        if same := len(hashes) - before - len(left):
            lines.append(f"{same:,} more are the same as one of them, and are not sent.")
        if self.ties:
            lines.append(f"{len(self.ties):,} comparisons are ties without a call, because the answers are the same.")
        return "\n".join([*lines, *self.notes()])

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
            missing: dict[str, list[Row]] = {}  # the same prompt, of models with the same answers, is sent once
            for match in self._missing(store, s.retry_errors):
                missing.setdefault(self.request_hash(match), []).append(match)
            calls = [*missing.values()][: s.max_calls or None]
            rows = run_parallel(calls, lambda matches: self._judge(matches, endpoint), s.max_concurrency)
            for of_call in tqdm(rows, total=len(calls), desc=self.name, unit="call"):
                store.add(*of_call)
            refused = [row["refused"] for row in store.rows.values() if row.get("refused")]
            if refused and len(refused) == len(store.rows):
                raise UserError(f"every call was refused: {refused[-1].rstrip('.')}. Give --retry_errors to ask again.")
        print(self.describe_cost())
        failed = [
            store.rows[_call_key(m)] for m in self.matches if store.rows.get(_call_key(m), {}).get("winner") == "error"
        ]
        for reason, count in Counter(call_failure(row) for row in failed).items():
            first = next(row for row in failed if call_failure(row) == reason)
            where = f"the first is question {first['question_id']}, turn {first['turn']}"
            print(printable(f"Not judged: {count} calls ({where}): {reason}"))
        count, notes = len(self._missing(store)), self.judgments.notes
        return Judgments(self.name, self._rows(store), {}, count, len(self.matches), notes)

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

    def _judge(self, matches: list[Row], endpoint: Endpoint) -> list[Row]:
        """The rows of matches with the same prompt; none once the budget is spent."""
        s, messages = self.settings, self.messages(matches[0])
        if self._is_spent():
            return []
        refused: dict[str, str] = {}
        for _ in range(2):  # a reply without a verdict is asked for once more
            try:
                reply = endpoint.ask(messages, temperature=s.temperature, max_tokens=s.max_new_tokens)
            except RequestRefused as error:  # for example too long: the others may be judged
                reply, refused = Reply("", True, 0, 0), {"refused": str(error)}
            self.replies.append(reply)
            text = reply.text + "…" * (not reply.finished)  # the end of what was cut off is not a verdict
            if _winner(matches[0], text) != "error" or refused or self._is_spent():
                break
        row = {"finished": reply.finished, **refused, "asked": self.request_hash(matches[0])}
        row |= {"user_prompt": messages[-1]["content"], "judgment": reply.text, "tstamp": time.time()}
        row |= {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        return [match | {"winner": _winner(match, text)} | row for match in matches]

    def _rows(self, store: JsonlStore) -> list[Row]:
        """FastChat's rows of the finished judgments, in the order of the matches; a pair needs both of its orders."""
        rows = [store.rows.get(_call_key(match)) for match in self.matches]
        if self.settings.mode == "single":
            return [rating_row(self.name, row) for row in rows if row]
        orders = zip(self.matches[::2], rows[::2], rows[1::2], strict=True)
        return [
            pair_row(match, match["turn"], match["models"], [self.name, match["prompt"]], [one, two])
            for match, one, two in orders if one and two
        ] + self.ties  # fmt: skip


def _call_key(row: Row) -> str:
    return json.dumps([row[name] for name in ("question_id", "turn", "models", "prompt")])


def _winner(match: Row, text: str) -> Any:
    """The model that won, "tie" or "error"; for one model alone its rating or "error"."""
    if len(match["models"]) == 1:
        return rating if (rating := parse_rating(text)) > 0 else "error"
    verdict = parse_verdict(text)
    return match["models"]["AB".index(verdict)] if verdict in ("A", "B") else verdict
