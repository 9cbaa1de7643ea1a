"""What stands out in prepared rows: each finding is a number, what it means for training, and what to do about it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.accounts import Account

if TYPE_CHECKING:
    from datasets import Dataset

WORDS = 3  # of an answer's opening
LONGER = 0.6  # share of pairs from which on length is a hint at the label
NEAR = 0.1  # of the widest margin: what counts as rated nearly alike
ALIKE = 0.9  # share of common words from which on two answers are nearly the same
TELLS = 0.9  # share on one side from which on an opening gives the label away
OFTEN = 0.1  # share of rows that is worth a warning
Numbers = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """`value` is a share of rows or pairs, unless the text says otherwise; `matters` where something should be done."""

    name: str
    value: float
    text: str
    matters: bool = False


@dataclasses.dataclass
class Answers:
    """What the report looks at: tokens by name, normalised prompts, and the answers of each pair (or conversation)."""

    lengths: dict[str, Numbers]
    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    margins: Numbers

    def __len__(self) -> int:
        return len(self.prompts)

    def joined(self, other: Answers) -> Answers:
        """These rows, and then the other's."""
        lengths = {name: np.concatenate([n, other.lengths[name]]) for name, n in self.lengths.items()}
        margins = np.concatenate([self.margins, other.margins])
        texts = (self.prompts + other.prompts, self.chosen + other.chosen, self.rejected + other.rejected)
        return Answers(lengths, *texts, margins)


def read_answers(rows: Dataset) -> Answers:
    """Rows of `load_preferences` or `load_instructions`."""
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    if "messages" in table.column_names:
        learned = [sum(label != -100 for label in labels) for labels in table["labels"].to_pylist()]
        lengths = {"conversation": table["tokens"].to_numpy(), "learned": np.array(learned)}
        talks = table["messages"].to_pylist()
        first = [next(m["content"] for m in talk if m["role"] == "user") for talk in talks]
        return Answers(lengths, [_plain(p) for p in first], [t[-1]["content"] for t in talks], [], np.array([]))
    sides = ("prompt", "chosen", "rejected")
    lengths = {side: pc.list_value_length(table[f"{side}_ids"]).to_numpy() for side in sides}
    prompts = ["\n".join(m["content"] for m in talk) for talk in table["prompt"].to_pylist()]
    chosen, rejected = ([talk[-1]["content"] for talk in table[side].to_pylist()] for side in sides[1:])
    margins = np.array([m for m in table["margin"].to_pylist() if m is not None])
    return Answers(lengths, [_plain(p) for p in prompts], chosen, rejected, margins)


def find_all(train: Answers, held_out: Answers, account: Account, max_length: int) -> list[Finding]:
    """Every finding that these rows give, those that matter first."""
    found = [*_rows_lost(account, max_length)]
    if train.rejected:
        both = train.joined(held_out)
        found += [longer_is_chosen(both), *near_ties(both), *openings(train)]
    found += [*_repeated(train), *leaks(train, held_out)]
    return sorted(found, key=lambda finding: not finding.matters)


def longer_is_chosen(rows: Answers) -> Finding:
    """How often the chosen answer is the longer one, in tokens; ties count half, as a judge of length would score."""
    more = rows.lengths["chosen"] - rows.lengths["rejected"]
    longer, score = float((more > 0).mean()), float((more > 0).mean() + (more == 0).mean() / 2)
    ratio = rows.lengths["chosen"].mean() / rows.lengths["rejected"].mean()
    said = f"The longer answer is the preferred one in {longer:.0%} of pairs"
    judge = f"a judge that looks at nothing but length would score {score:.0%}"
    if score >= LONGER:
        times = f", and chosen answers are {ratio:,.1f} times as long" if ratio > 1.05 else ""
        text = (
            f"{said}{times}: {judge}. Training on these pairs will teach the model to write longer answers, whether or "
            "not they are better. --ld_alpha 0.5 weighs the extra tokens less; compare answers of like length when you "
            "judge."
        )
    elif score <= 1 - LONGER:
        text = (
            f"{said}: the shorter one is mostly preferred, and {judge}. Training on these pairs will teach the model "
            "to write shorter answers, whether or not they are better."
        )
    else:
        text = f"{said}, and {judge}: length says little about the label."
    return Finding("longer is chosen", longer, text, not 1 - LONGER < score < LONGER)


def near_ties(rows: Answers) -> list[Finding]:
    """Pairs rated nearly alike, and pairs whose answers are nearly the same words."""
    found = []
    if len(rows.margins):
        close = NEAR * float(rows.margins.max())
        share = float((rows.margins < close).mean())
        text = f"{share:.0%} of rated pairs are less than {close:.2g} apart (the widest {rows.margins.max():.3g})"
        more = f": who rated them was hardly sure. --min_margin {close:.2g} leaves them out."
        if share:
            found.append(Finding("near ties", share, text + (more if share >= OFTEN else "."), share >= OFTEN))
    alike = [_overlap(c, r) >= ALIKE for c, r in zip(rows.chosen, rows.rejected, strict=True)]
    share = sum(alike) / len(alike)
    if any(alike):
        text = f"{sum(alike):,} pairs ({share:.1%}) have answers of nearly the same words, "
        example = rows.chosen[alike.index(True)][:60]
        text += f"such as {example!r}: there is little to learn where they differ in a detail."
        found.append(Finding("nearly the same answers", share, text, share >= OFTEN))
    return found


def openings(rows: Answers) -> list[Finding]:
    """Openings that stand on one side only, and how far openings alone give the label away (leaving each pair out)."""
    chosen, rejected = ([opening(text) for text in side] for side in (rows.chosen, rows.rejected))
    good, bad = Counter(chosen), Counter(rejected)
    score = 0.0
    for c, r in zip(chosen, rejected, strict=True):
        ahead = _odds(good[c] - 1, bad[c]) - _odds(good[r], bad[r] - 1)
        score += 0.5 if ahead == 0 or c == r else float(ahead > 0)
    score /= len(chosen)
    least = max(5, 0.01 * len(chosen))
    telling = [
        (o, good[o], bad[o]) for o, n in (good + bad).most_common() if n >= least and max(good[o], bad[o]) >= TELLS * n
    ][:3]
    said = f"Openings (the first {WORDS} words) alone would get {score:.0%} of the labels right"
    if not telling and score < LONGER:
        return [Finding("openings", score, said + ": they give little away.")]
    listed = "; ".join(f"{o!r} opens {g:,} chosen and {b:,} rejected answers" for o, g, b in telling)
    text = f"{said}{f': {listed}' if listed else ''}. The model can learn these words in place of what makes an answer "
    return [Finding("openings", score, text + "good: look whether they are what you want.", True)]


def leaks(train: Answers, held_out: Answers) -> list[Finding]:
    """Held-out rows that training has seen: prompts that differ in case, spaces or punctuation only, and answers."""
    prompts = set(train.prompts)
    seen = sum(prompt in prompts for prompt in held_out.prompts)
    long = {text for text in train.chosen if len(text.split()) > WORDS * 2}
    answers = sum(text in long for text in held_out.chosen)
    found = []
    for name, count in (("prompts", seen), ("answers", answers)):
        share = count / max(1, len(held_out))
        if count:
            text = f"{count:,} held-out {name} ({share:.1%}) stand in the training rows too"
            text += ", but for case, spaces or punctuation" if name == "prompts" else ""
            text += ": on these, held-out numbers measure memory. Take them out of one of the two."
            found.append(Finding(f"leaked {name}", share, text, share >= 0.01))
    return found or [Finding("leaked prompts", 0.0, "No held-out prompt or answer stands in the training rows.")]


def _repeated(rows: Answers) -> list[Finding]:
    count = Counter(rows.prompts)
    share = sum(n for n in count.values() if n > 1) / len(rows)
    if share == 0:
        return []
    text = (
        f"{share:.0%} of training rows share their prompt with another (one stands there {max(count.values())} times)"
    )
    more = ": the model sees these prompts more often than the rest." if share >= OFTEN else "."
    return [Finding("repeated prompts", share, text + more, share >= OFTEN)]


def _rows_lost(account: Account, max_length: int) -> list[Finding]:
    found = []
    lost = account.dropped.total() / max(1, account.read)
    if account.dropped:
        reason, count = account.dropped.most_common(1)[0]
        text = f"{lost:.1%} of rows were dropped, {count:,} of them because of: {reason}."
        found.append(Finding("dropped", lost, text, lost >= OFTEN))
    limits = {
        "over-long": (account.over_long, "max_length", f" {max_length:,}" if max_length else ""),
        "prompt over-long": (account.long_prompts, "max_prompt_length", ""),
    }
    for reason, (tokens, limit, value) in limits.items():
        if count := account.dropped[reason] + account.lost_pairs[f"a pair of a kept row: {reason}"]:
            share, longest = account.dropped[reason] / account.read, sorted(tokens)
            what = "prompts are" if limit == "max_prompt_length" else "conversations or pairs are"
            text = f"{count:,} {what} over {limit}{value} ({longest[0]:,} to {longest[-1]:,} tokens) and were dropped"
            enough = longest[math.ceil(0.9 * count) - 1]
            more = f": --{limit} {enough} would keep most of them, --overlong trim_prompt those with a long prompt."
            matters = share >= OFTEN / 2
            found.append(Finding(reason, share, text + (more if matters else "."), matters))
    if cut := account.changed["an answer lost its end"]:
        text = f"{cut:,} rows have an answer that lost its end at max_length {max_length:,}: the model learns not to "
        text += "stop. A larger --max_length or --overlong drop mends that."
        found.append(Finding("cut answers", cut / account.read, text, True))
    return found


def opening(text: str) -> str:
    """The first words of an answer, without what comes after."""
    return " ".join(text.split(maxsplit=WORDS)[:WORDS])


def _odds(chosen: int, rejected: int) -> float:
    return math.log((chosen + 1) / (rejected + 1))


def _overlap(a: str, b: str) -> float:
    x, y = set(a.split()), set(b.split())
    return len(x & y) / max(1, len(x | y))


def _plain(text: str) -> str:
    """Words alone, in small letters: what two prompts have in common when they are the same to a reader."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text
