"""What a dataset will teach, before training on it: lengths, length bias, near ties, duplicates, leaks and shortcuts.

    python -m helpers data --dataset_id my_pairs.jsonl --model_id mistralai/Mistral-7B-Instruct-v0.2

takes the data settings of 01_sft.py and 02_dpo.py, reads .env, and needs a tokenizer but no model. With --sft it reads
conversations instead of pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jinja2 import Environment

from helpers.core import BLUE, GREY, ORANGE, REPO, Row, is_main_process, new_figure, short_path, show, write_json
from helpers.data.encode import PROMPT_TOO_LONG, SIDES, TOO_LONG, TRUNCATED_ANSWER
from helpers.data.prepare import load_instructions, load_preferences
from helpers.data.row_report import OTHERS_KEPT, RowReport
from helpers.models.resolve import load_tokenizer, resolve_model, resolve_start
from helpers.runs.start import settings_of
from helpers.settings.fields import SOURCE_ORDER, TrainSettings
from helpers.settings.load import load_settings, own_types, parse_value, recipe_words
from helpers.settings.sources import Words, current_name, from_recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase as Tokenizer


SAVED_PROMPTS = 32  # held-out prompts that are kept with a run; 03 verifies a merge on them
QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}
OPENING_WORDS = 3
BIAS = 0.6  # share of labels that length or openings alone get right, from which on it is a bias
NEAR_TIE = 0.1  # of the widest margin
SAME_WORDS = 0.9  # share of common words from which on two answers are nearly the same
ONE_SIDED = 0.9  # share of an opening's answers on one side from which on it is a shortcut
OFTEN = 0.1  # share of rows that is worth a warning
SHORT_PROMPT = 8  # characters below which an answer may begin with its prompt by chance
RENDERED = re.compile(
    r"\[/?INST\]|<\|im_(?:start|end)\|>|<\|(?:user|assistant|system|start_header_id|eot_id)\|>|<(?:start|end)_of_turn>|"
    r"^\s*#{2,3} ?(?:Instruction|Response|Input|Human|Assistant)\b|^\s*(?:Human|Assistant|USER|ASSISTANT): ",
    re.MULTILINE,
)
COLOURS = {"prompt": GREY, "conversation": GREY, "chosen": BLUE, "learned": BLUE, "rejected": ORANGE}
OF_A_RUN = ("model_id", "revision", "trust_remote_code", "chat_template", "eos_token")  # what 02 has from a run of 01
BARS = 8  # openings that are plotted


@dataclasses.dataclass(frozen=True)
class DataFinding:
    """An observation. `value` is a share of rows or pairs; `is_warning` means that something should be done."""

    name: str
    value: float
    text: str
    is_warning: bool = False

    @classmethod
    def of(cls, name: str, value: float, is_warning: bool, **facts: Any) -> DataFinding:
        """A finding with the text of the macro of its name in templates/findings.jinja."""
        template = Path(__file__).with_name("templates") / "findings.jinja"
        macros = Environment().from_string(template.read_text(encoding="utf-8")).module
        text = getattr(macros, name.replace(" ", "_"))(value, is_warning, **facts)
        return cls(name, value, " ".join(text.split()), is_warning)

    @classmethod
    def of_rows(cls, name: str, rows: Any, often: float, **facts: Any) -> list[DataFinding]:
        """A finding on the share of rows for which `rows` holds, a warning from the share `often` on; [] for none."""
        share, count = float(rows.mean()), int(rows.sum())
        return [cls.of(name, share, share >= often, count=count, total=len(rows), **facts)] if count else []


@dataclasses.dataclass
class DataReport:
    """Lengths in tokens, findings, and the row report that they come from."""

    row_report: RowReport
    train: DataFrame
    eval: DataFrame
    max_length: int
    findings: list[DataFinding]
    prompts: list[Any] = dataclasses.field(default_factory=list)  # the first held-out ones

    @classmethod
    def from_datasets(
        cls, train_set: Dataset, eval_set: Dataset, row_report: RowReport, max_length: int = 0
    ) -> DataReport:
        """The report on what `load_preferences` or `load_instructions` returned, for the same `max_length`."""
        train, held_out = read_texts(train_set), read_texts(eval_set)
        prompts = [held_out_prompt(row) for row in eval_set.select(range(min(SAVED_PROMPTS, len(eval_set)))).to_list()]
        findings = find_data_issues(train, held_out, row_report, max_length)
        return cls(row_report, train, held_out, max_length, findings, prompts)

    @functools.cached_property
    def lengths(self) -> dict[str, np.ndarray[Any, Any]]:
        """Tokens of each prompt, chosen and rejected answer (or conversation, and what is learned of it)."""
        names = [name for name in COLOURS if f"{name} tokens" in self.train]
        return {name: np.concatenate([rows[f"{name} tokens"] for rows in (self.train, self.eval)]) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: rows, quantiles of lengths in tokens, share of rows by reason, and findings."""
        rows = self.row_report
        reasons = rows.changed + rows.dropped + rows.flagged
        return {
            "rows": {"train": len(self.train), "held_out": len(self.eval), "read": rows.read},
            "max_length": self.max_length,
            "lengths": {name: _summary(tokens) for name, tokens in self.lengths.items()},
            "share_of_rows": {reason: count / max(1, rows.read) for reason, count in reasons.items()},
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("tokens of", "mean", *QUANTILES, box=None, pad_edge=False)
        for name, tokens in self.lengths.items():
            table.add_row(name, *(f"{number:,.0f}" for number in _summary(tokens).values()))
        lines = [Text(f"! {f.text}", "yellow") if f.is_warning else Text(f"· {f.text}") for f in self.findings]
        return Group(table, *lines)

    @functools.cached_property
    def figure(self) -> Figure:
        """Lengths; of pairs also the differences of their lengths, and the most frequent openings."""
        from matplotlib.ticker import MaxNLocator

        is_pairs = "rejected" in self.train
        plots = [_plot_lengths, _plot_differences, _plot_openings] if is_pairs else [_plot_lengths]
        figure: Figure = new_figure(figsize=(15 if is_pairs else 7, 3.6), layout="constrained")
        for axis, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            axis.set_title(plot(axis, self), loc="left", fontsize=10)
            counts = axis.xaxis if plot is _plot_openings else axis.yaxis
            counts.set_major_locator(MaxNLocator("auto", integer=True))
            counts.set_label_text("pairs" if is_pairs else "conversations")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        return figure

    def save(self, folder: Path) -> None:
        """Write data_report.png, data_report.json, and held_out.jsonl with prompts to verify a merge on."""
        if is_main_process():
            lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in self.prompts]
            (folder / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
            self.figure.savefig(folder / "data_report.png", dpi=120)
            write_json(folder / "data_report.json", self.as_dict())


def held_out_prompt(row: Row) -> Row:
    """The prompt of a row in words, and its tokens in training, with all that the template was given: tools, calls and
    variables. Of a conversation, what is before its last answer."""
    if "messages" not in row:
        return {"prompt": row["prompt"], "ids": row["prompt_ids"]}
    learned = [label != -100 for label in row["labels"]]
    starts = [i for i, is_learned in enumerate(learned) if is_learned and not (i and learned[i - 1])]
    return {"prompt": row["messages"][:-1], "ids": row["input_ids"][: max(starts, default=None)]}


def read_texts(rows: Dataset) -> DataFrame:
    """What is analysed of rows of `load_preferences` or `load_instructions`.

    Columns: prompt (words only, in lower case), chosen, rejected, margin, "... tokens" of each side, marker (the first
    one of a chat template in the prompt, or ""), repeats (whether the chosen answer begins with the last prompt).
    """
    from pandas import DataFrame

    if "messages" in rows.column_names:
        talks, tokens = rows["messages"][:], rows["tokens"][:]
        learned = [sum(label != -100 for label in labels) for labels in rows["labels"][:]]
        frame = DataFrame({"conversation tokens": tokens, "learned tokens": learned})
        frame["chosen"] = [talk[-1]["content"] for talk in talks]
        prompts = [next(m["content"] for m in talk if m["role"] == "user") for talk in talks]
        questions = [talk[-2]["content"].strip() for talk in talks]
    else:
        frame = DataFrame({f"{side} tokens": list(map(len, rows[f"{side}_ids"][:])) for side in SIDES})
        for side in SIDES[1:]:
            frame[side] = [talk[-1]["content"] for talk in rows[side][:]]
        frame["margin"] = np.array(rows["margin"][:], dtype=float)
        prompts = ["\n".join(m["content"] for m in talk) for talk in rows["prompt"][:]]
        questions = [talk[-1]["content"].strip() for talk in rows["prompt"][:]]
    frame["marker"] = [found[0].strip() if (found := RENDERED.search(text)) else "" for text in prompts]
    answers = zip(frame["chosen"], questions, strict=True)
    frame["repeats"] = [len(text) >= SHORT_PROMPT and answer.strip().startswith(text) for answer, text in answers]
    return frame.assign(prompt=[" ".join(re.findall(r"\w+", text.casefold())) or text for text in prompts])


def find_data_issues(
    train: DataFrame, held_out: DataFrame, row_report: RowReport, max_length: int
) -> list[DataFinding]:
    """All findings, warnings first. Of texts: prompts that are rendered already, answers that repeat their prompt."""
    import pandas

    findings, marker = _dropped_rows(row_report, max_length), next(filter(None, train["marker"]), "")
    findings += DataFinding.of_rows("rendered prompts", train["marker"] != "", 0, marker=repr(marker))
    findings += DataFinding.of_rows("prompts in answers", train["repeats"], 0)
    if "rejected" in train:
        both = pandas.concat([train, held_out])
        findings += [length_bias(both), *near_ties(both), *prefix_shortcuts(train)]
    repeated, most = train["prompt"].duplicated(keep=False), int(train["prompt"].value_counts().max())
    findings += DataFinding.of_rows("repeated prompts", repeated, OFTEN, most=most)
    findings += train_eval_overlap(train, held_out)
    return sorted(findings, key=lambda finding: not finding.is_warning)


def length_bias(rows: DataFrame) -> DataFinding:
    """How often the chosen answer has more tokens. Ties count half in the score of a judge of length."""
    chosen, rejected = rows["chosen tokens"], rows["rejected tokens"]
    longer = float((chosen > rejected).mean())
    score = longer + float((chosen == rejected).mean()) / 2
    is_biased, ratio = not 1 - BIAS < score < BIAS, chosen.mean() / rejected.mean()
    return DataFinding.of("longer is chosen", longer, is_biased, score=score, ratio=ratio)


def near_ties(rows: DataFrame) -> list[DataFinding]:
    """Pairs with nearly equal ratings, and pairs with answers of nearly the same words."""
    margins, widest = rows["margin"].dropna(), rows["margin"].max()
    close = NEAR_TIE * widest
    findings = DataFinding.of_rows("near ties", margins < close, OFTEN, close=close, widest=widest)
    words = [(set(c.split()), set(r.split())) for c, r in zip(rows["chosen"], rows["rejected"], strict=True)]
    is_same = np.array([len(c & r) >= SAME_WORDS * max(1, len(c | r)) for c, r in words])
    example = repr(next(iter(rows["chosen"][is_same]), "")[:60])
    return findings + DataFinding.of_rows("nearly the same answers", is_same, OFTEN, example=example)


def prefix_shortcuts(rows: DataFrame) -> list[DataFinding]:
    """Openings that occur on one side only, and how many labels openings alone predict (leaving each pair out)."""
    chosen, rejected = (list(map(opening, rows[side])) for side in SIDES[1:])
    good, bad = Counter(chosen), Counter(rejected)
    # what the other pairs say about the openings of each pair
    better = np.array([good[c] / (bad[c] + 1) for c in chosen])
    worse = np.array([(good[r] + 1) / bad[r] for r in rejected])
    is_tie = (better == worse) | (np.array(chosen) == np.array(rejected))
    score = float(np.where(is_tie, 0.5, better > worse).mean())
    counts = [(o, good[o], bad[o]) for o, n in (good + bad).most_common() if n >= max(5, 0.01 * len(chosen))]
    one_sided = [(repr(o), g, b) for o, g, b in counts if max(g, b) >= ONE_SIDED * (g + b)][:3]
    is_shortcut = bool(one_sided) or score >= BIAS
    return [DataFinding.of("openings", score, is_shortcut, words=OPENING_WORDS, one_sided=one_sided)]


def train_eval_overlap(train: DataFrame, held_out: DataFrame) -> list[DataFinding]:
    """Held-out rows that training sees: prompts that differ in case, spaces or punctuation only, and answers."""
    answers = {text for text in train["chosen"] if len(text.split()) > 2 * OPENING_WORDS}
    findings = DataFinding.of_rows("leaked prompts", held_out["prompt"].isin(train["prompt"]), 0.01)
    findings += DataFinding.of_rows("leaked answers", held_out["chosen"].isin(answers), 0.01)
    return findings or [DataFinding.of("leaked prompts", 0.0, False, count=0, total=len(held_out))]


def _dropped_rows(rows: RowReport, max_length: int) -> list[DataFinding]:
    findings = []
    if rows.dropped:
        count, (reason, most) = rows.dropped.total(), rows.dropped.most_common(1)[0]
        facts = {"count": count, "read": rows.read, "reasons": len(rows.dropped), "reason": reason, "most": most}
        findings.append(DataFinding.of("dropped", count / rows.read, count >= OFTEN * rows.read, **facts))
    for name, reason, limit in (
        ("too long", TOO_LONG, f"--max_length {max_length}"),
        ("prompt too long", PROMPT_TOO_LONG, "--max_prompt_length"),
    ):
        if count := rows.dropped[reason] + rows.dropped_pairs[f"{reason} {OTHERS_KEPT}"]:
            share, tokens = rows.dropped[reason] / rows.read, sorted(rows.lengths[reason])
            facts = {"shortest": tokens[0], "longest": tokens[-1], "enough": tokens[math.ceil(0.9 * count) - 1]}
            findings.append(DataFinding.of(name, share, share >= OFTEN / 2, count=count, limit=limit, **facts))
    if cut := rows.changed[TRUNCATED_ANSWER]:
        findings.append(DataFinding.of("cut answers", cut / rows.read, True, count=cut, max_length=max_length))
    return findings


def opening(text: str) -> str:
    """The first words of an answer."""
    return " ".join(text.split(maxsplit=OPENING_WORDS)[:OPENING_WORDS])


def _summary(tokens: np.ndarray[Any, Any]) -> dict[str, float]:
    return {"mean": float(tokens.mean())} | {name: float(np.quantile(tokens, at)) for name, at in QUANTILES.items()}


def _plot_lengths(axis: Any, report: DataReport) -> str:
    longest = max(2, report.max_length, *(tokens.max() for tokens in report.lengths.values()))
    bins = np.unique(np.geomspace(1, longest * 1.05, 50).astype(int))
    for name, tokens in report.lengths.items():
        label = f"{name}, median {np.median(tokens):,.0f}"
        axis.hist(tokens, bins=bins, histtype="step", linewidth=1.5, color=COLOURS[name], label=label)
    if report.max_length:
        axis.axvline(report.max_length, color="black", linestyle=":", label=f"max_length {report.max_length:,}")
    axis.set(xscale="log", xlabel="tokens")
    axis.xaxis.set_major_formatter("{x:,g}")  # by default powers in TeX, which a PlainFigure shows as they are
    axis.xaxis.set_minor_formatter("")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return "lengths"


def _plot_differences(axis: Any, report: DataReport) -> str:
    more = report.lengths["chosen"] - report.lengths["rejected"]
    edge = max(1, int(np.quantile(np.abs(more), 0.98)))
    for part, colour in ((more[more < 0], ORANGE), (more[more > 0], BLUE)):
        axis.hist(part, bins=np.linspace(-edge, edge, 41), color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="tokens of the chosen answer minus tokens of the rejected one")
    return f"the longer answer is the chosen one in {(more > 0).mean():.0%} of pairs"


def _plot_openings(axis: Any, report: DataReport) -> str:
    sides = {side: Counter(map(opening, report.train[side])) for side in SIDES[1:]}
    names = [name for name, _ in (sides["chosen"] + sides["rejected"]).most_common(BARS)][::-1]
    for offset, (side, counts) in zip((0.2, -0.2), sides.items(), strict=True):
        at = np.arange(len(names)) + offset
        axis.barh(at, [counts[name] for name in names], 0.4, color=COLOURS[side], label=side)
    axis.set_yticks(range(len(names)), [f"{name:.46}" for name in names])
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return "most frequent openings, training rows"


def show_example(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    """Print one row as the model sees it. In a conversation, what is learned is bold."""
    from rich.text import Text

    text = Text()
    for side in SIDES if "prompt_ids" in row else ():
        text.append(f"{side}: ", style="bold").append(f"{tokenizer.decode(row[f'{side}_ids'])}\n")
    for token, label in zip(row.get("input_ids", ()), row.get("labels", ()), strict=True):
        text.append(str(tokenizer.decode([token])), style="dim" if label == -100 else "bold green")
    show(text)


@dataclasses.dataclass
class ReportSettings(TrainSettings):
    """Report on a dataset without training on it. Defaults are those of 02_dpo.py; a recipe's section is read too."""

    step: ClassVar[str] = "data_report"
    program: ClassVar[str] = "-m helpers data"

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


def read_recipe(file: str, layers: dict[str, Words], notes: list[str]) -> Words:
    """What 02 reads in a recipe, or with --sft 01. For a run of 01 (`sft_run`), its model and template are those of the
    section `sft`, unless a layer above the recipe names a model."""
    above = {name: words for layer in SOURCE_ORDER for name, words in layers.get(layer, {}).items()}
    is_sft = parse_value(bool, "sft", above.get("sft", ["False"]), "flag")
    notebook = settings_of(REPO / "notebooks" / ("01_sft.py" if is_sft else "02_dpo.py"))
    own, words = own_types(ReportSettings), recipe_words(notebook, file, notes)
    if not is_sft and "model_id" not in above | words:
        run = [current_name("sft", name, given, own)[:2] for name, given in from_recipe("sft", file).items()]
        words = {name: given for name, given in run if name in OF_A_RUN} | words
    return {name: given for name, given in words.items() if name in own}


def main(argv: list[str] | None = None) -> None:
    """Run the command of the module's docstring."""
    settings = load_settings(ReportSettings, {}, argv, read_recipe)
    resolve_model(settings.model_id, settings.revision, "tokenizer_config.json")
    tokenizer, _ = load_tokenizer(resolve_start(settings), settings)
    if settings.sft:
        settings.max_prompt_length = 0
    train_set, eval_set, row_report = (load_instructions if settings.sft else load_preferences)(settings, tokenizer)
    report = DataReport.from_datasets(train_set, eval_set, row_report, settings.max_length)
    show(row_report, report)
    if settings.out:
        folder = Path(settings.out)
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder)
        print(f"Report: {short_path(folder / 'data_report.png')}, {short_path(folder / 'data_report.json')}")
