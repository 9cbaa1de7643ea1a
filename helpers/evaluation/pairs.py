"""The choice of a scorer, and preference pairs of scored answers or of verdicts: what they teach, and a control."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from helpers.core import CleanExit, Row, SettingsError, UserError, atomic_write, printable, short_path
from helpers.data.encode import find_unrendered
from helpers.data.formats import row_template_options, template_columns
from helpers.data.messages import Message
from helpers.evaluation.answers import make_table
from helpers.evaluation.generators import Generators
from helpers.evaluation.judges import JudgeScorer, Scorer, ScoreSet, reward_scorer, rules_scorer
from helpers.evaluation.questions import Answer, Question
from helpers.evaluation.results import mean_interval
from helpers.evaluation.samples import VERDICTS, ExistingVerdicts, Prompts, SampleStore, chosen_scorers, policy_flag
from helpers.evaluation.verdicts import prompt_messages
from helpers.runs.checkpoints import shell_quote
from helpers.runs.run import PAIR_FILES, Run

BOTH = ("chosen", "rejected")
THIRDS = ("short", "middle", "long")
NO_ANSWER, ALL_EMPTY, ONE_ANSWER = "has no answer", "all answers are empty", "all answers are the same"
NOT_SCORED, NOT_ENDED = "fewer than two answers have a score", "no better answer is complete (see --max_new_tokens)"
ALL_BEST, ALL_WORST, ALL_EQUAL = (f"all answers have the {kind} score" for kind in ("best", "worst", "same"))
NEVER_BETTER, MARGIN = "--chosen_from is not better", "margin below --min_score_margin"
LATER_TURN, NO_VERDICT, UNJUDGED = "the verdict is on a later turn", "without a clear verdict", "has no verdict"
DISAGREE, SPLIT = "the two orders disagree", "people disagree"
SAME_ANSWERS, MISSING = "the answers are the same", "an answer is empty or missing"
NO_SPREAD = (ONE_ANSWER, ALL_BEST, ALL_WORST, ALL_EQUAL)


def make_scorer(settings: Any, prompts: Prompts | None = None) -> Scorer:
    """The scorer that the settings name, tried on the prompts before anything is sampled. Raises SettingsError."""
    given = prompts.answers if prompts else {}
    counts = Counter(i for rows in given.values() for i, row in rows.items() for _ in row["choices"])
    if counts and max(counts.values()) < 2:
        raise UserError("No question has two answers to compare. Give answers of two models, or several choices.")
    if any(getattr(settings, name) for name in VERDICTS):
        return ExistingVerdicts(settings)
    flags, second = chosen_scorers(settings), settings.second_scorer
    if second and not getattr(settings, second):
        raise SettingsError(f"--second_scorer {second} needs --{second}. Give it, too.")
    if second and not flags:
        raise SettingsError(f"--second_scorer {second} is the only scorer. Give another one to compare it with.")
    if len(flags) > 1:
        raise SettingsError(f"--{' and --'.join(flags)} exclude each other. Give one, or name the other with "
                            "--second_scorer.")  # fmt: skip
    if not flags:
        raise SettingsError("nothing scores the answers. Give --judge_module MODULE, --reward_model MODEL or "
                            "--judge_model NAME, or let people vote with --vote_page.")  # fmt: skip
    kinds: dict[str, Callable[[Any, list[Question]], Scorer]] = {
        "judge_module": rules_scorer, "reward_model": reward_scorer, "judge_model": JudgeScorer, "vote_page": VotePage,
    }  # fmt: skip
    scorer, *rest = [kinds[flag](settings, prompts.questions if prompts else []) for flag in (*flags, second) if flag]
    scorer.second = rest[0] if rest else None
    return scorer


class VotePage(Scorer):
    """People, who vote on a page for the best answer to each prompt."""

    def __init__(self, settings: Any, questions: list[Question]) -> None:
        super().__init__("people", settings)

    def run(self, samples: SampleStore, run: Run) -> ScoreSet:
        """Write the page. Raises CleanExit: there are no pairs before the votes."""
        s = self.settings
        sampling = {name: s.values()[name] for name in ("temperature", "top_p", "num_samples")}
        page = samples.write_vote_page([*samples.names], title=run.name, settings=sampling)
        run.save(status="interrupted", page=page)
        command = f"python notebooks/06_pairs.py --from_votes ~/Downloads/votes-{page}*.json"
        command += f" --answers_dir {shell_quote(run.folder)}" + " --control" * s.control
        command += f" --min_score_margin {s.min_score_margin:g}" if s.min_score_margin else ""
        command += f" --recipe {shell_quote(s.recipe)}" if s.recipe else ""
        raise CleanExit(f"Vote on {short_path(run.folder / 'answers.html')} and export the votes.\nNext: {command}")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An answer that may be chosen or rejected."""

    name: str  # of the sample
    model: str
    answer: Answer
    score: float | None = None

    @property
    def text(self) -> str:
        return str(self.answer)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a question, the better one first."""

    question: Question
    chosen: Candidate
    rejected: Candidate
    scorer: str


@dataclasses.dataclass
class PairSet:
    """The pairs, the control, and the report on every prompt: `kept + sum(dropped) == read`. `answers` counts the
    answers, `lost` the comparisons of kept prompts that are no pair."""

    scorer: str
    read: int
    dropped: Counter[str]
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    control: list[Pair] = dataclasses.field(default_factory=list)
    answers: Counter[str] = dataclasses.field(default_factory=Counter)
    lost: Counter[str] = dataclasses.field(default_factory=Counter)
    scored: list[Candidate] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    keeps_thoughts: bool = True

    @property
    def kept(self) -> int:
        """Prompts with a pair."""
        return len({str(pair.question["question_id"]) for pair in self.pairs})

    def measure(self, score_set: ScoreSet, asked: int) -> None:
        """What to know before training on the pairs: see `notes`."""
        unequal = [p for p in self.pairs if len(p.chosen.text) != len(p.rejected.text)]
        longer = np.array([float(len(p.chosen.text) > len(p.rejected.text)) for p in unequal])
        sizes = {side: [len(getattr(p, side).text) for p in self.pairs] for side in BOTH}
        self.metrics = {"pairs": len(self.pairs), "prompts": self.kept}
        self.metrics |= {f"{side}_length": sum(n) / len(n) for side, n in sizes.items() if n}
        if len(longer):
            interval = mean_interval(longer, [str(p.question["question_id"]) for p in unequal], seed=0)
            self.metrics |= {"longer_won": float(longer.mean()), "longer_won_interval": interval}
        if score_set.verdicts is None and asked:
            self.metrics["no_spread"] = sum(self.dropped[reason] for reason in NO_SPREAD) / asked
        if score_set.consistency is not None:
            self.metrics["consistency"] = score_set.consistency
        if score_set.second:  # how often another scorer agrees on the pairs that it has scored
            counts = Counter[str]()
            for p in self.pairs:
                scores = score_set.second.scores.get(p.question["question_id"], {})
                if {p.chosen.name, p.rejected.name} <= {*scores}:
                    margin = scores[p.chosen.name] - scores[p.rejected.name]
                    counts["agrees" if margin > 0 else "ties" if margin == 0 else "disagrees"] += 1
            self.metrics["second"] = {"scorer": score_set.second.scorer, **counts}
        self.metrics["by_length"] = self._by_length()

    def _by_length(self) -> list[Row]:
        """The answers in thirds by length: the mean score, and how many were chosen and rejected."""
        lengths = [len(c.text) for c in self.scored]
        thirds = np.searchsorted(np.quantile(lengths or [0], [1 / 3, 2 / 3]), lengths)
        chosen, rejected = ({id(getattr(p, side)) for p in self.pairs} for side in BOTH)
        rows: list[Row] = []
        for place, name in enumerate(THIRDS):
            own = [c for c, third in zip(self.scored, thirds, strict=True) if third == place]
            if own:
                sizes = sorted(len(c.text) for c in own)
                row: Row = {"answers": name, "characters": f"{sizes[0]} to {sizes[-1]}"}
                row |= {"mean score": sum(c.score or 0 for c in own) / len(own)}
                row |= {"chosen": sum(id(c) in chosen for c in own), "rejected": sum(id(c) in rejected for c in own)}
                rows.append(row)
        return rows

    def notes(self) -> list[str]:
        """What the pairs teach besides what the scorer likes, and how far it can be trusted."""
        m, notes = self.metrics, list[str]()
        if "longer_won" in m:
            low, high = m["longer_won_interval"]
            notes.append(
                f"The longer answer was chosen in {m['longer_won']:.0%} of pairs ({low:.0%} to {high:.0%}): "
                f"chosen answers have {m['chosen_length']:.0f} characters on average, rejected ones "
                f"{m['rejected_length']:.0f}."
            )
        if "no_spread" in m:
            notes.append(f"{m['no_spread']:.0%} of prompts have answers that are all the same or have equal scores.")
        if "consistency" in m:
            notes.append(f"The judge gave the same verdict in both orders in {m['consistency']:.0%} of comparisons.")
        if second := m.get("second"):
            words = [f"{word} on {second[word]}" for word in ("agrees", "ties", "disagrees") if word in second]
            notes.append(f"{second['scorer']} {', '.join(words) or 'has scored none'} of these pairs.")
        return notes

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        rows = [("prompts", self.read), *((f"  dropped: {reason}", n) for reason, n in self.dropped.most_common())]
        rows += [("prompts with pairs", self.kept), (f"pairs, scored by {self.scorer}", len(self.pairs))]
        rows += [(f"  no pair: {reason}", n) for reason, n in self.lost.most_common()]
        rows += [(f"answers: {kind}", n) for kind, n in self.answers.items() if n]
        table = make_table(["", "count"], [(name, f"{count:,}") for name, count in rows])
        parts = [table, ""]
        if by_length := self.metrics.get("by_length"):
            cells = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in by_length]
            parts += [make_table([*by_length[0]], cells), ""]
        return Group(*parts, *(Text(f"• {note}") for note in self.notes()))

    def save(self, run: Run) -> None:
        """Write preferences.jsonl and control.jsonl, and finish the run. Raises UserError if there is no pair."""
        data: dict[str, Any] = {"read": self.read, "kept": self.kept, "dropped": self.dropped.total(), "changed": 0}
        data |= {"reasons": dict(self.dropped), "answers": dict(self.answers), "comparisons": dict(self.lost)}
        fields: dict[str, Any] = {"data": data, "metrics": self.metrics, "scorer": self.scorer}
        if not self.pairs:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in (self.dropped + self.lost).most_common())
            error = f"none of {self.read} prompts gave a pair ({reasons}). Use other prompts, or more --num_samples."
            run.save(status="failed", error=error, **fields)
            raise UserError(error)
        for name, pairs in zip(PAIR_FILES, (self.pairs, self.control), strict=True):
            if pairs:
                text = "".join(json.dumps(self._row(pair), ensure_ascii=False) + "\n" for pair in pairs)
                atomic_write(run.folder / name, text.encode("utf-8", "backslashreplace"))
        run.finish(**fields)

    def _row(self, pair: Pair) -> Row:
        row: Row = {"question_id": pair.question["question_id"], "prompt": prompt_messages(pair.question)}
        row |= template_columns(row_template_options(pair.question))
        sides: dict[str, Candidate] = {side: getattr(pair, side) for side in BOTH}
        row |= {side: [self._message(c.answer)] for side, c in sides.items()}
        row |= {f"score_{side}": c.score for side, c in sides.items() if c.score is not None}
        row |= {f"{side}_model": c.model for side, c in sides.items()}
        return row | {"scorer": pair.scorer, "sampling": self.sampling}

    def _message(self, answer: Answer) -> Message:
        thoughts = {"reasoning_content": answer.thoughts} if self.keeps_thoughts and answer.thoughts else {}
        return {"role": "assistant", "content": str(answer)} | thoughts

    def print_next(self, settings: Any, prompts: Prompts, run: Run) -> None:
        """Print the commands that train the policy that answered on the pairs, and on the control."""
        flag, note = policy_flag(settings, prompts)
        if note:
            print(printable(f"note: {note}"))
        words = ["python notebooks/02_dpo.py", flag, "--dataset_id"]
        more = ["--trust_remote_code"] if settings.trust_remote_code else []
        more += [f"--recipe {shell_quote(settings.recipe)}"] if settings.recipe else []
        if self.control:  # first: the newest run is where the next notebooks start
            print("First the control:", *words, shell_quote(run.folder / PAIR_FILES[1]), *more)
        print("Next:", *words, shell_quote(run.folder / PAIR_FILES[0]), *more)


def make_pairs(
    settings: Any, prompts: Prompts, samples: SampleStore, score_set: ScoreSet, generators: Generators
) -> PairSet:
    """The pairs of scored answers or of verdicts, and their report. Empty answers make no pair, and answers that were
    cut off are never chosen. The control has the same prompts, as often, and answers that are picked at random."""
    answers, models = samples.answer_set, {name: model for name, (model, _) in samples.names.items()}
    verdicts = _group_verdicts(score_set.verdicts or [])
    pairs = PairSet(score_set.scorer, prompts.read, prompts.left_out.copy())
    for question in answers.questions:
        i, draw = question["question_id"], random.Random(f"{settings.seed} {question['turns'][0]}")
        scores, decided = score_set.scores.get(i, {}), verdicts.get(str(i), {})
        found = [Candidate(n, models[n], own[i][0], scores.get(n)) for n, own in answers.answers.items() if i in own]
        candidates = [c for c in found if c.text.strip()]
        texts = {c.text for c in candidates}
        pairs.answers += Counter({"in all": len(found), "empty": len(found) - len(candidates)})
        pairs.answers["cut off at --max_new_tokens"] += sum(c.answer.cut for c in candidates)
        pairs.answers["repeated"] += len(candidates) - len(texts)
        own: list[Pair] | str
        if len(texts) < 2:
            own = ONE_ANSWER if candidates else ALL_EMPTY if found else NO_ANSWER
        elif score_set.verdicts is None:
            own = _pairs_of_scores(question, candidates, score_set, prompts.sides, settings, draw, pairs.lost)
        else:
            own = _pairs_of_verdicts(question, candidates, decided, score_set, prompts.sides, settings, pairs.lost)
        judged = {*scores, *(name for both, counts in decided.items() if {*counts} != {SAME_ANSWERS} for name in both)}
        if own != ONE_ANSWER and (not_judged := sum(c.name not in judged for c in candidates)):
            pairs.answers["not judged"] += not_judged
        if isinstance(own, str):
            pairs.dropped[own] += 1
        else:
            pairs.pairs += own
            pairs.control += _random_pairs(question, candidates, draw, len(own)) if settings.control else []
        pairs.scored += [c for c in candidates if c.score is not None]
    names = ("temperature", "top_p", "max_new_tokens", "num_samples", "seed")
    pairs.sampling = {name: settings.values()[name] for name in names} if prompts.models else {}
    thought: list[Message] = [{"role": "assistant", "content": "", "reasoning_content": "Hm."}]
    kinds = [(tokenizer, generators.variables[name]) for name, (tokenizer, _) in generators.tokenizers.items()]
    pairs.keeps_thoughts = not any(find_unrendered(tokenizer, thought, variables) for tokenizer, variables in kinds)
    pairs.measure(score_set, asked=len(prompts.questions))
    return pairs


def _pairs_of_scores(
    question: Question, candidates: list[Candidate], score_set: ScoreSet, sides: tuple[str, ...], settings: Any,
    draw: random.Random, lost: Counter[str],
) -> list[Pair] | str:  # fmt: skip
    """The pairs of a prompt, or why it has none."""
    rated = [*{(c.model, c.text): c for c in candidates[::-1] if c.score is not None}.values()][::-1]
    values = {c.score for c in rated}
    if len(rated) < 2:
        return NOT_SCORED
    if len(values) == 1:
        worst, best = score_set.bounds or (None, None)
        return ALL_BEST if values == {best} else ALL_WORST if values == {worst} else ALL_EQUAL
    upper, lower = ([c for c in rated if side in ("", c.model)] for side in sides)
    both = [(a, b) for a in upper for b in lower if not a.answer.cut and _margin(a, b) > 0]
    if not both:
        return NEVER_BETTER if any(sides) else NOT_ENDED
    if settings.pairing != "all_pairs":  # the first of the best
        best_one = max((a for a, _ in both), key=lambda a: a.score or 0.0)
        both = [(a, b) for a, b in both if a is best_one]
        both = [draw.choice(both) if settings.pairing == "best_vs_random" else max(both, key=lambda ab: _margin(*ab))]
    kept = [(a, b) for a, b in both if _margin(a, b) >= settings.min_score_margin]
    if 0 < len(kept) < len(both):
        lost[MARGIN] += len(both) - len(kept)
    return [Pair(question, a, b, score_set.scorer) for a, b in kept] or MARGIN


def _margin(a: Candidate, b: Candidate) -> float:
    return round((a.score or 0.0) - (b.score or 0.0), 9)


def _random_pairs(question: Question, candidates: list[Candidate], draw: random.Random, count: int) -> list[Pair]:
    """At most `count` different pairs, picked at random; an answer that was cut off is rejected at most."""
    plain = [dataclasses.replace(c, score=None) for c in {c.text: c for c in candidates[::-1]}.values()]
    both = [pair for pair in itertools.combinations(plain, 2) if not all(c.answer.cut for c in pair)]
    drawn = [draw.sample(pair, 2) for pair in draw.sample(both, min(count, len(both)))]
    ordered = [pair[::-1] if pair[0].answer.cut else pair for pair in drawn]
    return [Pair(question, chosen, rejected, "random") for chosen, rejected in ordered]


Verdicts = dict[tuple[str, str], Counter[str]]  # two samples → how often each won, or why none did


def _group_verdicts(rows: list[Row]) -> dict[str, Verdicts]:
    """The verdicts by question_id. One on a later turn is left out: there the conversations differ, not only the
    answers."""
    found: dict[str, Verdicts] = {}
    for row in rows:
        calls = row["g1_winner"], row["g2_winner"]
        won = SAME_ANSWERS if row.get("identical") else str(row.get(calls[0], calls[0]))
        faults = {LATER_TURN: row["turn"] > 1, NO_VERDICT: "error" in calls, DISAGREE: calls[0] != calls[1]}
        won = next((fault for fault, is_there in faults.items() if is_there), won)
        own, pair = found.setdefault(str(row["question_id"]), {}), (row["model_1"], row["model_2"])
        own.setdefault(pair if pair[::-1] not in own else pair[::-1], Counter())[won] += 1
    return found


def _deduplicate(verdicts: Verdicts, candidates: list[Candidate]) -> Verdicts:
    """The verdicts, of samples with the same text those on the first: a comparison of two texts is one."""
    first = {(c.model, c.text): c.name for c in reversed(candidates)}
    names, found = {c.name: first[c.model, c.text] for c in candidates}, dict[tuple[str, ...], Counter[str]]()
    for (one, two), counts in verdicts.items():
        pair = tuple(sorted((names.get(one, one), names.get(two, two))))
        renamed = Counter({names.get(winner, winner): count for winner, count in counts.items()})
        found[pair] = max(found.get(pair, Counter()), renamed, key=Counter.total)
    return {(pair[0], pair[1]): counts for pair, counts in found.items()}


def _pairs_of_verdicts(
    question: Question, candidates: list[Candidate], verdicts: Verdicts, score_set: ScoreSet, sides: tuple[str, ...],
    settings: Any, lost: Counter[str],
) -> list[Pair] | str:  # fmt: skip
    """The decided comparisons of a prompt as pairs, or why it has none. Of several people the majority decides."""
    by_name, pairs, reasons = {c.name: c for c in candidates}, list[Pair](), Counter[str]()
    for (one, two), counts in _deduplicate(verdicts, candidates).items():
        if not {one, two} <= {*by_name}:
            reasons[MISSING] += 1
            continue
        if counts[one] == counts[two]:
            reasons[SPLIT if counts[one] else next(reason for reason in counts if counts[reason])] += 1
            continue
        names = sorted((one, two), key=lambda name: -counts[name])
        chosen, rejected = (dataclasses.replace(by_name[name], score=float(counts[name])) for name in names)
        if chosen.answer.cut:
            reasons[NOT_ENDED] += 1
        elif any(side not in ("", c.model) for side, c in zip(sides, (chosen, rejected), strict=True)):
            reasons[NEVER_BETTER] += 1
        elif _margin(chosen, rejected) < settings.min_score_margin:
            reasons[MARGIN] += 1
        else:
            pairs.append(Pair(question, chosen, rejected, score_set.scorer))
    if pairs:
        lost.update(reasons)
        return pairs
    del reasons[SAME_ANSWERS]  # others differ, and are not judged
    return reasons.most_common(1)[0][0] if reasons else UNJUDGED
