"""What a dataset will teach, before training on it: lengths, length bias, near ties, duplicates, leaks and shortcuts.

    python -m helpers data --dataset_id my_pairs.jsonl --model_id mistralai/Mistral-7B-Instruct-v0.2

takes the data settings of 02_dpo.py (with --sft, of 01_sft.py), reads .env, and needs a tokenizer but no model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from helpers.core import BLUE, GREY, ORANGE, is_main_process, short_path, show, write_json
from helpers.data.prepare import PROMPT_TOO_LONG, SIDES, TOO_LONG, TRUNCATED_ANSWER
from helpers.data.row_report import OTHERS_KEPT, RowReport, load_instructions, load_preferences
from helpers.settings.fields import TrainSettings
from helpers.settings.load import from_recipe, load_settings, split_flags

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase as Tokenizer


SAVED_PROMPTS = 32  # held-out prompts that are kept with a run; 03 verifies a merge on them
QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}
OPENING_WORDS = 3
BIAS = 0.6  # share of labels that length or openings alone get right, from which on it is a bias
NEAR_TIE = 0.1  # of the widest margin
SAME_WORDS = 0.9  # share of common words from which on two answers are nearly the same
ONE_SIDED = 0.9  # share of an opening's answers on one side from which on it is a shortcut
OFTEN = 0.1  # share of rows that is worth a warning
COLOURS = {"prompt": GREY, "conversation": GREY, "chosen": BLUE, "learned": BLUE, "rejected": ORANGE}
BARS = 8  # of a panel
LABEL_WIDTH = 46  # characters
Numbers = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class DataFinding:
    """An observation. `value` is a share of rows or pairs; `is_warning` means that something should be done."""

    name: str
    value: float
    text: str
    is_warning: bool = False


@dataclasses.dataclass
class AnswerTexts:
    """What is analysed: token counts by name, normalised prompts, and the answers of pairs (or conversations)."""

    lengths: dict[str, Numbers]
    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    margins: Numbers

    @classmethod
    def of(cls, rows: Dataset) -> AnswerTexts:
        """The texts of rows of `load_preferences` or `load_instructions`."""
        import pyarrow.compute as pc

        table = rows.with_format("arrow")[:]
        if "messages" in table.column_names:
            learned = [sum(label != -100 for label in labels) for labels in table["labels"].to_pylist()]
            lengths = {"conversation": table["tokens"].to_numpy(), "learned": np.array(learned)}
            talks = table["messages"].to_pylist()
            prompts = [next(m["content"] for m in talk if m["role"] == "user") for talk in talks]
            return cls(lengths, _normalised(prompts), [talk[-1]["content"] for talk in talks], [], np.array([]))
        lengths = {side: pc.list_value_length(table[f"{side}_ids"]).to_numpy() for side in SIDES}
        prompts = ["\n".join(m["content"] for m in talk) for talk in table["prompt"].to_pylist()]
        chosen, rejected = ([talk[-1]["content"] for talk in table[side].to_pylist()] for side in SIDES[1:])
        margins = np.array([m for m in table["margin"].to_pylist() if m is not None])
        return cls(lengths, _normalised(prompts), chosen, rejected, margins)

    def __add__(self, other: AnswerTexts) -> AnswerTexts:
        lengths = {name: np.concatenate([n, other.lengths[name]]) for name, n in self.lengths.items()}
        margins = np.concatenate([self.margins, other.margins])
        texts = (self.prompts + other.prompts, self.chosen + other.chosen, self.rejected + other.rejected)
        return AnswerTexts(lengths, *texts, margins)


@dataclasses.dataclass
class DataReport:
    """Lengths in tokens, findings, and the row report that they come from."""

    row_report: RowReport
    train: AnswerTexts
    eval: AnswerTexts
    max_length: int
    findings: list[DataFinding]
    prompts: list[Any] = dataclasses.field(default_factory=list)  # the first held-out ones

    @classmethod
    def of(cls, train_set: Dataset, eval_set: Dataset, row_report: RowReport, max_length: int = 0) -> DataReport:
        """The report on what `load_preferences` or `load_instructions` returned, for the same `max_length`."""
        train, held_out = AnswerTexts.of(train_set), AnswerTexts.of(eval_set)
        prompts = eval_set[:SAVED_PROMPTS]["prompt"] if "prompt" in eval_set.column_names else []
        findings = find_data_issues(train, held_out, row_report, max_length)
        return cls(row_report, train, held_out, max_length, findings, list(prompts))

    @property
    def lengths(self) -> dict[str, Numbers]:
        """Tokens of each prompt, chosen and rejected answer (or conversation, and what is learned of it)."""
        return (self.train + self.eval).lengths

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: rows, quantiles of lengths in tokens, share of rows by reason, and findings."""
        rows = self.row_report
        return {
            "rows": {"train": len(self.train.prompts), "held_out": len(self.eval.prompts), "read": rows.read},
            "max_length": self.max_length,
            "lengths": {
                name: {"mean": float(n.mean())} | {q: float(np.quantile(n, at)) for q, at in QUANTILES.items()}
                for name, n in self.lengths.items()
            },
            "share_of_rows": {
                reason: count / max(1, rows.read)
                for reason, count in (rows.changed + rows.dropped + rows.flagged).items()
            },
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("tokens of", "mean", *QUANTILES, box=None, pad_edge=False)
        for name, n in self.lengths.items():
            table.add_row(name, f"{n.mean():,.0f}", *(f"{np.quantile(n, at):,.0f}" for at in QUANTILES.values()))
        lines = [Text(f"! {f.text}", "yellow") if f.is_warning else Text(f"· {f.text}") for f in self.findings]
        return Group(table, *lines)

    @functools.cached_property
    def figure(self) -> Figure:
        """One page: lengths, length difference, openings of both sides, and what happened to the rows."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        is_pairs = bool(self.train.rejected)
        figure = Figure(figsize=(11, 6.5 if is_pairs else 3.4), layout="constrained")
        axes = figure.subplots(2 if is_pairs else 1, 2).flatten()
        _plot_lengths(axes[0], self)
        _plot_rows(axes[-1], self.row_report)
        if is_pairs:
            _plot_differences(axes[1], self.lengths)
            _plot_openings(axes[2], self.train)
        units = ("y pairs", "y pairs", "x pairs", "x rows") if is_pairs else ("y conversations", "x rows")
        for axis, (side, unit) in zip(axes, map(str.split, units), strict=True):
            getattr(axis, f"{side}axis").set_major_locator(MaxNLocator("auto", integer=True))
            getattr(axis, f"set_{side}label")(unit, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.title.set_fontsize(10)
            axis.xaxis.label.set_fontsize(8)
        return figure

    def save(self, folder: Path) -> None:
        """Write data_report.png, data_report.json, and held_out.jsonl with prompts to verify a merge on."""
        if is_main_process():
            lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in self.prompts]
            (folder / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
            self.figure.savefig(folder / "data_report.png", dpi=120)
            write_json(folder / "data_report.json", self.as_dict())


def find_data_issues(
    train: AnswerTexts, held_out: AnswerTexts, row_report: RowReport, max_length: int
) -> list[DataFinding]:
    """All findings, warnings first."""
    findings = _dropped_rows(row_report, max_length)
    if train.rejected:
        both = train + held_out
        findings += [length_bias(both), *near_ties(both), *prefix_shortcuts(train)]
    counts = Counter(train.prompts)
    if share := sum(n for n in counts.values() if n > 1) / len(train.prompts):
        text = f"{share:.0%} of training rows share their prompt with others (one has {max(counts.values())} rows)."
        more = " The model sees these prompts more often than others." if share >= OFTEN else ""
        findings.append(DataFinding("repeated prompts", share, text + more, share >= OFTEN))
    findings += train_eval_overlap(train, held_out)
    return sorted(findings, key=lambda finding: not finding.is_warning)


def length_bias(rows: AnswerTexts) -> DataFinding:
    """How often the chosen answer has more tokens. Ties count half in the score of a judge of length."""
    more = rows.lengths["chosen"] - rows.lengths["rejected"]
    longer, score = float((more > 0).mean()), float((more > 0).mean() + (more == 0).mean() / 2)
    ratio = rows.lengths["chosen"].mean() / rows.lengths["rejected"].mean()
    text = f"The longer answer is the preferred one in {longer:.0%} of pairs. "
    if score >= BIAS and ratio > 1.05:
        text += f"Chosen answers are {ratio:,.1f} times as long as rejected ones. "
    text += f"A judge that looks at length only would score {score:.0%}"
    if 1 - BIAS < score < BIAS:
        return DataFinding("longer is chosen", longer, f"{text}: length says little about the label.")
    taught = "longer" if score >= BIAS else "shorter"
    text += f". Training on these pairs will teach the model to write {taught} answers, better or not."
    if score >= BIAS:
        text += (
            " `--ld_alpha 0.5` reduces the weight of the extra tokens; compare answers of similar length when judging."
        )
    return DataFinding("longer is chosen", longer, text, True)


def near_ties(rows: AnswerTexts) -> list[DataFinding]:
    """Pairs with nearly equal ratings, and pairs with answers of nearly the same words."""
    findings = []
    if len(rows.margins):
        widest = float(rows.margins.max())
        close = NEAR_TIE * widest
        if share := float((rows.margins < close).mean()):
            text = f"The ratings of {share:.0%} of rated pairs differ by less than {close:.2g} (at most {widest:.3g})."
            more = f" Such labels are unreliable. `--min_margin {close:.2g}` drops these pairs."
            text += more if share >= OFTEN else ""
            findings.append(DataFinding("near ties", share, text, share >= OFTEN))
    words = [(set(c.split()), set(r.split())) for c, r in zip(rows.chosen, rows.rejected, strict=True)]
    same = [i for i, (c, r) in enumerate(words) if len(c & r) >= SAME_WORDS * max(1, len(c | r))]
    if share := len(same) / len(words):
        text = f"{len(same):,} pairs ({share:.1%}) have answers of nearly the same words, such as "
        text += f"{rows.chosen[same[0]][:60]!r}. They teach little."
        findings.append(DataFinding("nearly the same answers", share, text, share >= OFTEN))
    return findings


def prefix_shortcuts(rows: AnswerTexts) -> list[DataFinding]:
    """Openings that occur on one side only, and how many labels openings alone predict (leaving each pair out)."""
    chosen, rejected = (list(map(opening, side)) for side in (rows.chosen, rows.rejected))
    good, bad = Counter(chosen), Counter(rejected)
    score = 0.0
    for c, r in zip(chosen, rejected, strict=True):
        ahead = math.log(good[c] / (bad[c] + 1)) - math.log((good[r] + 1) / bad[r])
        score += 0.5 if ahead == 0 or c == r else float(ahead > 0)
    score /= len(chosen)
    counts = [(o, good[o], bad[o]) for o, n in (good + bad).most_common() if n >= max(5, 0.01 * len(chosen))]
    one_sided = [(o, g, b) for o, g, b in counts if max(g, b) >= ONE_SIDED * (g + b)][:3]
    text = f"Openings (the first {OPENING_WORDS} words) alone predict {score:.0%} of the labels"
    if not one_sided and score < BIAS:
        return [DataFinding("openings", score, f"{text}: they reveal little.")]
    listed = "; ".join(f"{o!r} opens {g:,} chosen and {b:,} rejected answers" for o, g, b in one_sided)
    text += f"{f': {listed}' if listed else ''}. The model can learn these words instead of what makes an answer good."
    return [DataFinding("openings", score, f"{text} Check that they are wanted.", True)]


def train_eval_overlap(train: AnswerTexts, held_out: AnswerTexts) -> list[DataFinding]:
    """Held-out rows that training sees: prompts that differ in case, spaces or punctuation only, and answers."""
    prompts = set(train.prompts)
    answers = {text for text in train.chosen if len(text.split()) > 2 * OPENING_WORDS}
    findings = []
    for name, count, ignored in (
        ("prompts", sum(prompt in prompts for prompt in held_out.prompts), " (ignoring case, spaces and punctuation)"),
        ("answers", sum(text in answers for text in held_out.chosen), ""),
    ):
        if share := count / max(1, len(held_out.prompts)):
            text = f"{count:,} held-out {name} ({share:.1%}) are in the training rows too{ignored}. Evaluation on them "
            text += "measures memory. Remove them from one side."
            findings.append(DataFinding(f"leaked {name}", share, text, share >= 0.01))
    return findings or [DataFinding("leaked prompts", 0.0, "No held-out prompt or answer is in the training rows.")]


def _dropped_rows(rows: RowReport, max_length: int) -> list[DataFinding]:
    findings = []
    if rows.dropped:
        share = rows.dropped.total() / rows.read
        reason, count = rows.dropped.most_common(1)[0]
        text = f"{share:.1%} of rows were dropped. Most frequent reason: {reason} ({count:,})."
        findings.append(DataFinding("dropped", share, text, share >= OFTEN))
    for reason, tokens, flag in (
        (TOO_LONG, sorted(rows.long_rows), f"--max_length {max_length}"),
        (PROMPT_TOO_LONG, sorted(rows.long_prompts), "--max_prompt_length"),
    ):
        if count := rows.dropped[reason] + rows.dropped_pairs[f"{reason} {OTHERS_KEPT}"]:
            share, enough = rows.dropped[reason] / rows.read, tokens[math.ceil(0.9 * count) - 1]
            text = f"{count:,} were dropped as longer than {flag} ({tokens[0]:,} to {tokens[-1]:,} tokens)."
            more = f" `{flag.split()[0]} {enough}` would keep most, `--overlong truncate_prompt` long prompts."
            is_warning = share >= OFTEN / 2
            findings.append(DataFinding(reason, share, text + (more if is_warning else ""), is_warning))
    if cut := rows.changed[TRUNCATED_ANSWER]:
        text = (
            f"{cut:,} rows have an answer truncated at --max_length {max_length}: the model learns not to stop. Use a "
        )
        findings.append(
            DataFinding("cut answers", cut / rows.read, f"{text}larger `--max_length` or `--overlong drop`.", True)
        )
    return findings


def opening(text: str) -> str:
    """The first words of an answer."""
    return " ".join(text.split(maxsplit=OPENING_WORDS)[:OPENING_WORDS])


def _normalised(texts: list[str]) -> list[str]:
    """Words only, in lower case."""
    return [" ".join(re.findall(r"\w+", text.casefold())) or text for text in texts]


def _plot_lengths(axis: Any, report: DataReport) -> None:
    longest = max(int(n.max()) for n in report.lengths.values())
    bins = np.unique(np.geomspace(1, max(longest, report.max_length, 2) * 1.05, 50).astype(int))
    for name, n in report.lengths.items():
        label = f"{name}, median {np.median(n):,.0f}"
        axis.hist(n, bins=bins, histtype="step", linewidth=1.5, color=COLOURS[name], label=label)
    if report.max_length:
        axis.axvline(report.max_length, color="black", linestyle=":", label=f"max_length {report.max_length:,}")
    axis.set_xscale("log")
    axis.set_title("lengths", loc="left")
    axis.set_xlabel("tokens")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _plot_differences(axis: Any, lengths: dict[str, Numbers]) -> None:
    more = lengths["chosen"] - lengths["rejected"]
    edge = max(1, int(np.quantile(np.abs(more), 0.98)))
    for part, colour in ((more[more < 0], ORANGE), (more[more > 0], BLUE)):
        axis.hist(part, bins=np.linspace(-edge, edge, 41), color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(f"the longer answer is the chosen one in {(more > 0).mean():.0%} of pairs", loc="left")
    axis.set_xlabel("tokens of the chosen answer minus tokens of the rejected one")


def _plot_openings(axis: Any, rows: AnswerTexts) -> None:
    sides = {"chosen": Counter(map(opening, rows.chosen)), "rejected": Counter(map(opening, rows.rejected))}
    names = [name for name, _ in (sides["chosen"] + sides["rejected"]).most_common(BARS)][::-1]
    for offset, (side, counts) in zip((0.2, -0.2), sides.items(), strict=True):
        at = np.arange(len(names)) + offset
        axis.barh(at, [counts[name] for name in names], 0.4, color=COLOURS[side], label=side)
    axis.set_yticks(range(len(names)), [_label(name) for name in names], parse_math=False)
    axis.set_title("most frequent openings, training rows", loc="left")
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def _plot_rows(axis: Any, rows: RowReport) -> None:
    bars = [("kept", rows.kept, BLUE), *((reason, n, ORANGE) for reason, n in rows.dropped.most_common(BARS))]
    bars += [(reason, n, GREY) for reason, n in (rows.changed + rows.flagged).most_common(BARS // 2)]
    for i, (_, count, colour) in enumerate(bars):
        axis.barh(i, count, 0.7, color=colour)
        axis.text(count, i, f" {count:,} ({count / max(1, rows.read):.1%})", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [_label(reason) for reason, *_ in bars], parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, max(count for _, count, _ in bars) * 1.25)
    axis.set_title(f"rows: {rows.read:,} read", loc="left")


def _label(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LABEL_WIDTH else f"{line[: LABEL_WIDTH - 1]}…"


def show_example(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    """Print one row as the model sees it. In a conversation, what is learned is bold."""
    from rich.text import Text

    text = Text()
    if "labels" in row:
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            text.append(str(tokenizer.decode([token])), style="dim" if label == -100 else "bold green")
    else:
        for side in SIDES:
            text.append(f"{side}: ", style="bold").append(f"{tokenizer.decode(row[f'{side}_ids'])}\n")
    show(text)


@dataclasses.dataclass
class ReportSettings(TrainSettings):
    """What a dataset will teach, without training on it. Settings are those of 01_sft.py and 02_dpo.py."""

    step: ClassVar[str] = "data_report"

    sft: bool = False  # read conversations, as 01_sft.py does, instead of pairs
    out: str = ""  # folder for data_report.png and data_report.json; empty writes none
    model_id: str = "mistralai/Mistral-7B-Instruct-v0.2"  # model whose tokenizer is used: a Hub id or a folder
    dataset_id: tuple[str, ...] = ("argilla/ultrafeedback-binarized-preferences-cleaned",)  # Hub ids, files, folders
    dataset_split: str = "train"  # split to read
    train_rows: int = 0  # rows to train on; 0 takes all
    eval_rows: int = 2_750  # rows to hold out; 0 takes eval_fraction of them
    eval_fraction: float = 0.2  # share to hold out if eval_rows is 0
    data_format: str = "auto"  # auto detects it from the columns; or the name of a format
    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = "best_vs_worst"  # pairs of ranked answers
    recommended: bool = False  # keep only rows that the dataset card recommends
    min_margin: float = 0.0  # drop pairs whose ratings differ by less; ties are always dropped
    max_prompt_length: int = 1024  # maximum tokens of a prompt; 0 for no limit
    max_length: int = 1512  # maximum tokens of a prompt and its answer; 0 for no limit


def main(argv: list[str] | None = None) -> None:
    """Run the command of the module's docstring."""
    from helpers.models.chat import set_chat_template
    from helpers.models.resolve import resolve_model

    words = sys.argv[1:] if argv is None else argv
    flags = {} if {"-h", "--help"} & set(words) else dict(split_flags(words))
    if "recipe" in flags:  # it belongs to 01 and 02, and has settings that a report has no use for
        sft, dpo = (from_recipe(step, flags["recipe"][0]) for step in ("sft", "dpo"))
        is_sft = flags.get("sft", ["False"]) in ([], ["True"], ["true"])
        recipe = sft if is_sft else {name: sft[name] for name in ("model_id",) if name in sft} | dpo
        names = {field.name for field in dataclasses.fields(ReportSettings)} - {"recipe"}
        del flags["recipe"]
        flags = {name: values for name, values in recipe.items() if name in names} | flags
        words = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    settings = load_settings(ReportSettings, {}, words)
    from transformers import AutoTokenizer

    revision, is_trusted = settings.revision, settings.trust_remote_code
    model = resolve_model(settings.model_id, revision, "tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main", trust_remote_code=is_trusted)
    set_chat_template(tokenizer, settings.chat_template)
    if settings.sft:
        settings.max_prompt_length = 0
    load = load_instructions if settings.sft else load_preferences
    train_set, eval_set, row_report = load(settings, tokenizer)
    report = DataReport.of(train_set, eval_set, row_report, settings.max_length)
    show(row_report, report)
    if settings.out:
        folder = Path(settings.out)
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder)
        print(f"Report: {short_path(folder / 'data_report.png')}, {short_path(folder / 'data_report.json')}")
