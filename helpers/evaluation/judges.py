"""What a judge is asked, and how its verdict is read. Prompts are rows of FastChat's judge_prompts.jsonl."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.core import UserError, fingerprint, read_jsonl
from helpers.data.conversations import Message
from helpers.evaluation.answers import JsonlStore
from helpers.evaluation.generators import Endpoint, Refused, Reply, run_parallel
from helpers.evaluation.questions import Question, shown_turns

OUR_PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")
# FastChat (llm_judge/common.py) shows a reference in these categories only.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
FASTCHAT = {("pairwise", False): "pair-v2", ("pairwise", True): "pair-math-v1",
            ("single", False): "single-v1", ("single", True): "single-math-v1"}  # fmt: skip


class JudgePrompts:
    """The prompts of a file, ours where none is named; FastChat's are known by their names."""

    def __init__(self, file: Path = OUR_PROMPTS) -> None:
        self.rows = {str(row.get("name")): row for row in read_jsonl(file)}
        self.fastchat = "pair-v2" in self.rows
        self.file = file

    @property
    def most_turns(self) -> int:
        """The last turn that can be judged: FastChat's prompts have room for two."""
        return 2 if self.fastchat else 1000

    def name_for(self, question: Question, turn: int, mode: str) -> str:
        """Which prompt a turn (from 1) of a question is judged with. Raises UserError where the file lacks it."""
        reference = len(question.get("reference", ())) >= turn
        if self.fastchat:
            name = FASTCHAT[mode, reference and question["category"] in REFERENCE_CATEGORIES]
        else:
            name = {"pairwise": "pair", "single": "single"}[mode] + ("-reference" if reference else "")
        name += "-multi-turn" if turn > 1 else ""
        if name not in self.rows:
            raise UserError(f"{self.file} has no prompt named {name}; it has {', '.join(sorted(self.rows))}")
        return name

    def messages(self, name: str, question: Question, turn: int, answers: list[list[str]]) -> list[Message]:
        """System and user message for one model's answers up to `turn`, or two models' in the order they are shown.

        Raises UserError for a template with a field that is not known.
        """
        row = self.rows[name]
        asked, reference = shown_turns(question), question.get("reference", [])
        fields: dict[str, Any] = {"question": asked[turn - 1], "reference": _talk(asked, reference, turn)}
        fields |= {f"question_{i}": text for i, text in enumerate(asked, 1)}
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)}
        for side, said in zip(("_a", "_b") if len(answers) > 1 else ("",), answers, strict=True):
            fields |= {f"answer{side}": said[turn - 1], f"conversation{side}": _talk(asked, said, turn)}
            fields |= {f"answer{side}_{i}": text for i, text in enumerate(said, 1)}
        try:
            text = row["prompt_template"].format(**fields)
        except (LookupError, ValueError) as error:
            raise UserError(f"{self.file}: the template of {name} cannot be filled in: {error}") from None
        return [{"role": "system", "content": row["system_prompt"]}, {"role": "user", "content": text}]

    def preview(self, messages: list[list[Message]], left: list[list[Message]]) -> str:
        """One prompt, whole, and what it would be to send those that are left to ask."""
        parts = [f"--- {m['role']} ---\n{m['content']}" for m in messages[0]]
        tokens = sum(len(m["content"]) for each in left for m in each) // 4
        calls = f"{len(left):,} calls like this one, some {tokens:,} tokens to read."
        before = len(messages) - len(left)
        return "\n".join([*parts, "---", calls, *([f"{before:,} more have been judged before."] if before else [])])


def _talk(asked: list[str], said: list[str], turn: int) -> str:
    if turn == 1:
        return "".join(said[:1])
    pairs = zip(asked[:turn], said[:turn], strict=False)
    return "\n\n".join(f"## User\n\n{question}\n\n## Assistant\n\n{answer}" for question, answer in pairs)


def strip_reasoning(judgment: str) -> str:
    """What a judge said without what it thought: what stands in <think> tags; all before a </think> without its
    opening tag, which many templates put into the prompt; all of a reply that opens with one and never closes it."""
    flags = re.DOTALL | re.IGNORECASE
    whole = re.sub(r"<think(ing)?>.*?</think(ing)?>", "", judgment, flags=flags)
    rest = re.split(r"</think(?:ing)?>", whole, flags=flags)[-1]
    return re.sub(r"^\s*<think(ing)?>.*", "", rest, flags=flags)


def parse_verdict(judgment: str) -> str:
    """The last verdict stated: "A", "B" or "tie" ([[C]]); "error" where there is none.

    FastChat takes the first of A, B and C that stands anywhere, so that a quoted [[A]] wins.
    """
    found = re.findall(r"\[\[([ABC])\]\]", strip_reasoning(judgment))
    return {"C": "tie"}.get(found[-1], found[-1]) if found else "error"


def parse_rating(judgment: str) -> float:
    """The last rating stated, from 1 to 10; -1, as FastChat has it, where there is none."""
    found = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", strip_reasoning(judgment)) or re.findall(
        r"\[(\d+(?:\.\d+)?)\]", strip_reasoning(judgment)
    )
    return value if found and 1 <= (value := float(found[-1])) <= 10 else -1


ModelAnswers = dict[str, dict[Any, list[str]]]  # model → question_id → its answers, one a turn
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Match:
    """One call of the judge: a turn (from 1) of two models' answers in the order they are shown, or of one model's."""

    question: Question
    turn: int
    models: tuple[str, ...]
    prompt: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self.question["question_id"], self.turn, self.models, self.prompt

    def messages(self, prompts: JudgePrompts, said: ModelAnswers) -> list[Message]:
        """What the judge is asked."""
        answers = [said[model][self.question["question_id"]] for model in self.models]
        return prompts.messages(self.prompt, self.question, self.turn, answers)


def make_matches(
    questions: list[Question], said: ModelAnswers, groups: list[tuple[str, ...]], mode: str, prompts: JudgePrompts
) -> list[Match]:
    """Every call there is to make: for each question, turn and pair of models both orders; or each model alone.

    A turn that one of them has not answered is not judged. Raises UserError where nothing is left.
    """
    games = []
    for question in questions:
        for turn in range(1, min(len(question["turns"]), prompts.most_turns) + 1):
            name = prompts.name_for(question, turn, mode)
            for group in groups:
                if all(len(said[model].get(question["question_id"], ())) >= turn for model in group):
                    orders = [group, group[::-1]] if mode == "pairwise" else [group]
                    games += [Match(question, turn, order, name) for order in orders]
    if not games:
        raise UserError(f"nothing to judge: no question has been answered by {' and '.join(groups[0])}")
    return games


def request_hash(judge: str, messages: list[Message], temperature: float | None) -> str:
    """What was asked of whom, in 16 hex digits: the same in another run."""
    return fingerprint(judge, messages, temperature)


def uncached(asked: list[list[Message]], judge: str, temperature: float, ledgers: Iterable[Path]) -> list[Any]:
    """Those of `asked` to which none of the ledgers has a verdict that could be read."""
    before = {row.get("asked") for file in ledgers for row in _whole_rows(file) if row.get("winner") != "error"}
    return [messages for messages in asked if request_hash(judge, messages, temperature) not in before]


def _whole_rows(file: Path) -> list[Row]:
    return read_jsonl(file, end=file.read_bytes().rfind(b"\n") + 1)  # the last may be half written


class Budget:
    """Calls and tokens that may be spent from now on; 0 is no limit. Safe among threads."""

    def __init__(self, max_calls: int = 0, max_tokens: int = 0) -> None:
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.calls = self.prompt_tokens = self.completion_tokens = 0
        self._lock = threading.Lock()

    @property
    def left(self) -> bool:
        tokens = self.prompt_tokens + self.completion_tokens
        return (self.calls < self.max_calls or not self.max_calls) and (tokens < self.max_tokens or not self.max_tokens)

    def take(self) -> bool:
        """Whether there is a call left; it is taken."""
        with self._lock:
            left = self.left
            self.calls += left
            return left

    def cost(self, input_price: float, output_price: float) -> str:
        """What was spent, in words; prices are of a million tokens."""
        told = f"{self.calls:,} calls, {self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written"
        price = (self.prompt_tokens * input_price + self.completion_tokens * output_price) / 1e6
        return f"{told}: {price:,.2f} at the prices given" if price else told

    def spend(self, prompt_tokens: int, completion_tokens: int) -> None:
        with self._lock:
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens


class Judge:
    """A model that judges games. What it said is kept in `ledger` as it comes, and asked for only once."""

    def __init__(
        self, endpoint: Endpoint, prompts: JudgePrompts, said: ModelAnswers, file: Path, **arguments: Any
    ) -> None:
        self.endpoint, self.prompts, self.said, self.arguments = endpoint, prompts, said, arguments
        self.ledger = JsonlStore(
            file, lambda row: (row["question_id"], row["turn"], tuple(row["models"]), row["prompt"])
        )

    def missing(self, games: list[Match], retry_errors: bool = False) -> list[Match]:
        """Those that have no result, or with `retry_errors` none that could be read."""
        rows = self.ledger.rows
        return [
            game for game in games
            if game.key not in self.ledger or (retry_errors and rows[game.key]["winner"] == "error")
        ]  # fmt: skip

    def request_hash(self, messages: list[Message]) -> str:
        return request_hash(self.endpoint.model, messages, self.arguments.get("temperature"))

    def take_over(self, games: list[Match], others: Iterable[Path]) -> int:
        """Judgments of the same prompts by the same judge in ledgers of other runs are not asked for again."""
        wanted: dict[str, list[Match]] = {}
        for game in self.missing(games):
            wanted.setdefault(self.request_hash(game.messages(self.prompts, self.said)), []).append(game)
        count = 0
        for file in others if wanted else ():
            for row in _whole_rows(file):
                for game in wanted.pop(str(row.get("asked")), []) if row.get("winner") != "error" else ():
                    names = dict(zip(row["models"], game.models, strict=True))  # the same answers under other names
                    own = {"question_id": game.question["question_id"], "models": list(game.models)}
                    self.ledger.add(row | own | {"winner": names.get(row["winner"], row["winner"])})
                    count += 1
        return count

    def ask(self, games: list[Match], concurrency: int, budget: Budget) -> None:
        """Ask about each of `games`, `concurrency` at a time and while the budget lasts, and keep what is said."""
        from tqdm.auto import tqdm

        def within_budget() -> Iterator[Match]:
            for game in games:
                if not budget.left:
                    return
                yield game

        done = run_parallel(within_budget(), lambda game: self._judge(game, budget), concurrency)
        for _, row in tqdm(done, total=len(games), desc=self.endpoint.model, unit="call"):
            if row:
                self.ledger.add(row)

    def _judge(self, game: Match, budget: Budget) -> Row | None:
        """The row of a game. A reply that was cut off before its verdict, or has none, is asked for once more."""
        messages, reply, winner, refused = game.messages(self.prompts, self.said), None, "error", ""
        for _ in range(2):
            if not budget.take():
                break
            try:
                reply = self.endpoint.ask(messages, **self.arguments)
            except Refused as error:  # of this pair, as when it is too long: that is no reason to leave out the others
                reply, refused = Reply("", True, 0, 0), str(error)
                break
            budget.spend(reply.prompt_tokens, reply.completion_tokens)
            winner = self._result(game, reply.text)
            if winner != "error":
                break
        if reply is None:
            return None
        return {
            "question_id": game.question["question_id"],
            "turn": game.turn,
            "models": list(game.models),
            "prompt": game.prompt,
            "winner": winner,
            "finished": reply.finished,
            **({"refused": refused} if refused else {}),
            "asked": self.request_hash(messages),
            "user_prompt": messages[-1]["content"],
            "judgment": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "tstamp": time.time(),
        }

    def _result(self, game: Match, text: str) -> Any:
        """The name of the model that won, "tie" or "error"; of one model alone its rating or "error"."""
        if len(game.models) == 1:
            return rating if (rating := parse_rating(text)) > 0 else "error"
        verdict = parse_verdict(text)
        return game.models["AB".index(verdict)] if verdict in ("A", "B") else verdict

    def rows(self, games: list[Match]) -> list[Row]:
        """FastChat's rows, of what has been judged: a pair once both its orders have been; in the order of `games`."""
        done, judge = self.ledger.rows, self.endpoint.model
        if games and len(games[0].models) == 1:
            return [
                {
                    "question_id": row["question_id"],
                    "model": row["models"][0],
                    "judge": [judge, row["prompt"]],
                    "user_prompt": row["user_prompt"],
                    "judgment": row["judgment"],
                    "score": -1 if row["winner"] == "error" else row["winner"],
                    "turn": row["turn"],
                    "tstamp": row["tstamp"],
                }
                for row in (done[game.key] for game in games if game.key in done)
            ]
        pairs = zip(games[::2], games[1::2], strict=True)  # a pair's two orders stand together
        return [
            pair_row(one.question, one.turn, one.models, [judge, one.prompt],
                      [done[one.key]["winner"], done[two.key]["winner"]],
                      [(done[g.key]["user_prompt"], done[g.key]["judgment"]) for g in (one, two)],
                      done[two.key]["tstamp"])
            for one, two in pairs if one.key in done and two.key in done
        ]  # fmt: skip


def pair_row(
    question: Question, turn: int, models: tuple[str, ...], judge: list[str], winners: list[str],
    texts: list[tuple[str, str]] | None = None, tstamp: float | None = None,
) -> Row:  # fmt: skip
    names = {models[0]: "model_1", models[1]: "model_2"}
    texts = texts or [("", ""), ("", "")]
    row: Row = {"question_id": question["question_id"], "model_1": models[0], "model_2": models[1]}
    row |= {f"g{i}_winner": names.get(winner, winner) for i, winner in enumerate(winners, 1)}
    row["judge"] = judge
    for i, (prompt, judgment) in enumerate(texts, 1):
        row |= {f"g{i}_user_prompt": prompt, f"g{i}_judgment": judgment}
    return row | {"turn": turn, "tstamp": tstamp or time.time()}
