"""What a dataset will teach, before it is trained on: lengths, bias, duplicates, leaks, and openings that tell.

    python -m helpers data --dataset_id my_pairs.jsonl --model_id mistralai/Mistral-7B-Instruct-v0.2

has the names of 02_dpo.py's settings (with --sft, 01_sft.py's), reads .env for the Hub, needs a tokenizer and no model.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

import numpy as np

from helpers.core import SettingsError, ignore_broken_pipe, install_error_hook, is_main_process, short_path, write_json
from helpers.data.row_report import RowReport, Split
from helpers.settings import load as layers
from helpers.settings.load import parse_value, run_setup_module, silence_warnings

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure


PROMPTS = 32  # that are kept with a run
QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}


@dataclasses.dataclass
class DataReport:
    """Lengths in tokens by what they are of, what was found, and the account that it stands on."""

    account: RowReport
    train: AnswerTexts
    held_out: AnswerTexts
    max_length: int
    findings: list[DataFinding]
    prompts: list[Any] = dataclasses.field(default_factory=list)  # the first held-out ones, for what comes later

    @classmethod
    def of(cls, train: Dataset, held_out: Dataset, account: RowReport, max_length: int = 0) -> DataReport:
        """The report on what `load_preferences` or `load_instructions` gave, at the `max_length` they were given."""
        answers = read_answers(train), read_answers(held_out)
        prompts = held_out[:PROMPTS]["prompt"] if "prompt" in held_out.column_names else []
        return cls(account, *answers, max_length, find_data_issues(*answers, account, max_length), list(prompts))

    @property
    def lengths(self) -> dict[str, np.ndarray[Any, Any]]:
        """Tokens of each prompt, chosen and rejected answer (or conversation, and what is learned of it)."""
        return self.train.joined(self.held_out).lengths

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: rows, quantiles of lengths in tokens, share of rows by reason, and findings."""
        reasons = self.account.changed + self.account.dropped + self.account.noted
        return {
            "rows": {"train": len(self.train), "held_out": len(self.held_out), "read": self.account.read},
            "max_length": self.max_length,
            "lengths": {
                name: {"mean": float(n.mean())} | {q: float(np.quantile(n, at)) for q, at in QUANTILES.items()}
                for name, n in self.lengths.items()
            },
            "share_of_rows": {reason: count / max(1, self.account.read) for reason, count in reasons.items()},
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("tokens of", "mean", *QUANTILES, box=None, pad_edge=False)
        for name, n in self.lengths.items():
            table.add_row(name, f"{n.mean():,.0f}", *(f"{np.quantile(n, at):,.0f}" for at in QUANTILES.values()))
        said = [
            Text(f"{'!' if f.matters else '·'} {f.text}", style="yellow" if f.matters else "") for f in self.findings
        ]
        return Group(table, *said)

    @functools.cached_property
    def figure(self) -> Figure:
        """One page: lengths, which answer is longer, openings of the two sides, what became of the rows."""
        from helpers.data.plots import plot_data_report

        return plot_data_report(self)

    def save(self, folder: Path) -> None:
        """data_report.png and data_report.json in `folder`, and the held-out prompts that a merge is tried on."""
        if is_main_process():
            lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in self.prompts]
            (folder / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
            self.figure.savefig(folder / "data_report.png", dpi=120)
            write_json(folder / "data_report.json", self.as_dict())


@dataclasses.dataclass
class ReportSettings:
    """What a dataset will teach, without training on it. The names are those of 01_sft.py and 02_dpo.py."""

    sources: ClassVar[dict[str, str]] = {}

    recipe: str = ""  # YAML file that 02_dpo.py (or 01_sft.py, with --sft) would be started with
    sft: bool = False  # read conversations, as 01_sft.py does, rather than pairs
    model_id: str = "mistralai/Mistral-7B-Instruct-v0.2"  # whose tokenizer counts: a Hub id or a folder
    revision: str = ""  # the model's branch, tag or commit on the Hub
    trust_remote_code: bool = False  # run code that comes with the tokenizer
    dataset_id: tuple[str, ...] = ("argilla/ultrafeedback-binarized-preferences-cleaned",)  # Hub ids, files, folders
    dataset_config: str = ""  # the dataset's configuration, where it has several
    dataset_split: str = "train"  # the split that is read
    dataset_revision: str = ""  # the dataset's branch, tag or commit on the Hub
    dataset_num_proc: int = 0  # processes that prepare the data; 0 takes as many as help
    eval_split: str = ""  # split that evaluation rows are taken from, where the dataset has one
    train_rows: int = 0  # rows to train on; 0 takes all
    eval_rows: int = 2_750  # rows held out; 0 takes eval_fraction of them
    eval_fraction: float = 0.2  # share held out where eval_rows is 0
    data_format: str = "auto"  # by the columns; or a format by name
    pairing: Literal["best_vs_worst", "best_vs_random", "all_pairs"] = (
        "best_vs_worst"  # of several ranked answers: the best against which others
    )
    recommended: bool = False  # keep only the rows that the dataset's card recommends
    min_margin: float = 0.0  # pairs rated closer than this are dropped; ties always are
    max_prompt_length: int = 1024  # tokens of a prompt; 0 for no limit
    max_length: int = 1512  # tokens of a prompt and its answer, likewise
    overlong: Literal["drop", "truncate_prompt", "truncate_completion", "error"] = (
        "drop"  # what becomes of rows beyond them
    )
    strict: bool = False  # stop when any row has to be dropped
    chat_template: str = "auto"  # the tokenizer's own, else mistral; or a format by name, or a file
    system_prompt: str = ""  # put before every conversation that has no system message of its own
    seed: int = 42  # seed of the split
    out: str = ""  # folder for data_report.png and data_report.json; none are written when empty


def main(argv: list[str] | None = None) -> None:
    """The command: see the module's docstring."""
    from helpers.core import show
    from helpers.data.conversations import LengthLimits
    from helpers.data.formats import PairingConfig
    from helpers.data.loading import parse_dataset_specs
    from helpers.data.prepare import load_instructions, load_preferences
    from helpers.models.chat import set_chat_template
    from helpers.models.resolve import resolve_model

    install_error_hook()
    silence_warnings()
    given = _read_settings(sys.argv[1:] if argv is None else argv)
    from transformers import AutoTokenizer

    model = resolve_model(given.model_id, given.revision, "tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(
        model, revision=given.revision or "main", trust_remote_code=given.trust_remote_code
    )
    set_chat_template(tokenizer, given.chat_template)
    split = Split(given.train_rows, given.eval_rows, given.eval_fraction, given.seed)
    more: dict[str, Any] = {"split": split, "strict": given.strict, "num_proc": given.dataset_num_proc}
    sources = parse_dataset_specs(given)
    if given.sft:
        limits = LengthLimits(total=given.max_length, overlong=given.overlong)
        train, held_out, account = load_instructions(
            sources, tokenizer, limits, system_prompt=given.system_prompt, **more
        )
    else:
        limits = LengthLimits(given.max_prompt_length, given.max_length, given.overlong)
        options = PairingConfig(given.pairing, given.recommended, given.min_margin, given.system_prompt, given.seed)
        train, held_out, account = load_preferences(sources, tokenizer, limits, options, **more)
    report = DataReport.of(train, held_out, account, given.max_length)
    show(account, f"train {len(train):,}, held out {len(held_out):,}", report)
    if given.out:
        folder = Path(given.out)
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder)
        print(f"Report: {short_path(folder / 'data_report.png')} and data_report.json beside it.")


def _read_settings(argv: list[str]) -> ReportSettings:
    """Flags, over what a recipe says under these names, over the defaults. Raises SettingsError."""
    import tyro

    if {"-h", "--help"} & set(argv):
        with ignore_broken_pipe():
            tyro.cli(ReportSettings, args=["--help"], use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    types = {field.name: get_type_hints(ReportSettings)[field.name] for field in dataclasses.fields(ReportSettings)}
    layers.read_dotenv()  # a token, or the address of a mirror
    flags = dict(layers.split_flags(argv))
    for name in set(flags) - set(types):
        close = difflib.get_close_matches(name, types, n=1)
        raise SettingsError(f"unknown setting --{name}: {f'did you mean --{close[0]}?' if close else 'see --help'}")
    values: dict[str, list[str]] = {}
    if recipe := flags.get("recipe"):
        sft, dpo = (layers.from_recipe(step, recipe[0]) for step in ("sft", "dpo"))
        pairs = "sft" not in flags or not parse_value(bool, "sft", flags["sft"], "flag")
        values = sft if not pairs else {"model_id": sft["model_id"]} | dpo if "model_id" in sft else dpo
        if "setup_module" in values:
            run_setup_module(values["setup_module"][0])
    words = {name: (given, "recipe") for name, given in values.items() if name in types}
    words |= {name: (given, "flag") for name, given in flags.items()}
    settings = ReportSettings(**{name: parse_value(types[name], name, *given) for name, given in words.items()})
    source = words.get("dataset_split", ([], "default"))[1]
    settings.sources = {"dataset_split": source}  # type: ignore[misc]
    return settings


WORDS = 3  # of an answer's opening
LONGER = 0.6  # share of pairs from which on length is a hint at the label
NEAR = 0.1  # of the widest margin: what counts as rated nearly alike
ALIKE = 0.9  # share of common words from which on two answers are nearly the same
TELLS = 0.9  # share on one side from which on an opening gives the label away
OFTEN = 0.1  # share of rows that is worth a warning
Numbers = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class DataFinding:
    """`value` is a share of rows or pairs, unless the text says otherwise; `matters` where something should be done."""

    name: str
    value: float
    text: str
    matters: bool = False


@dataclasses.dataclass
class AnswerTexts:
    """What the report looks at: tokens by name, normalised prompts, and the answers of each pair (or conversation)."""

    lengths: dict[str, Numbers]
    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    margins: Numbers

    def __len__(self) -> int:
        return len(self.prompts)

    def joined(self, other: AnswerTexts) -> AnswerTexts:
        """These rows, and then the other's."""
        lengths = {name: np.concatenate([n, other.lengths[name]]) for name, n in self.lengths.items()}
        margins = np.concatenate([self.margins, other.margins])
        texts = (self.prompts + other.prompts, self.chosen + other.chosen, self.rejected + other.rejected)
        return AnswerTexts(lengths, *texts, margins)


def read_answers(rows: Dataset) -> AnswerTexts:
    """Rows of `load_preferences` or `load_instructions`."""
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    if "messages" in table.column_names:
        learned = [sum(label != -100 for label in labels) for labels in table["labels"].to_pylist()]
        lengths = {"conversation": table["tokens"].to_numpy(), "learned": np.array(learned)}
        talks = table["messages"].to_pylist()
        first = [next(m["content"] for m in talk if m["role"] == "user") for talk in talks]
        return AnswerTexts(lengths, [_plain(p) for p in first], [t[-1]["content"] for t in talks], [], np.array([]))
    sides = ("prompt", "chosen", "rejected")
    lengths = {side: pc.list_value_length(table[f"{side}_ids"]).to_numpy() for side in sides}
    prompts = ["\n".join(m["content"] for m in talk) for talk in table["prompt"].to_pylist()]
    chosen, rejected = ([talk[-1]["content"] for talk in table[side].to_pylist()] for side in sides[1:])
    margins = np.array([m for m in table["margin"].to_pylist() if m is not None])
    return AnswerTexts(lengths, [_plain(p) for p in prompts], chosen, rejected, margins)


def find_data_issues(
    train: AnswerTexts, held_out: AnswerTexts, account: RowReport, max_length: int
) -> list[DataFinding]:
    """Every finding that these rows give, those that matter first."""
    found = [*_rows_lost(account, max_length)]
    if train.rejected:
        both = train.joined(held_out)
        found += [longer_is_chosen(both), *near_ties(both), *prefix_shortcuts(train)]
    found += [*_repeated(train), *train_eval_overlap(train, held_out)]
    return sorted(found, key=lambda finding: not finding.matters)


def longer_is_chosen(rows: AnswerTexts) -> DataFinding:
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
    return DataFinding("longer is chosen", longer, text, not 1 - LONGER < score < LONGER)


def near_ties(rows: AnswerTexts) -> list[DataFinding]:
    """Pairs rated nearly alike, and pairs whose answers are nearly the same words."""
    found = []
    if len(rows.margins):
        close = NEAR * float(rows.margins.max())
        share = float((rows.margins < close).mean())
        text = f"{share:.0%} of rated pairs are less than {close:.2g} apart (the widest {rows.margins.max():.3g})"
        more = f": who rated them was hardly sure. --min_margin {close:.2g} leaves them out."
        if share:
            found.append(DataFinding("near ties", share, text + (more if share >= OFTEN else "."), share >= OFTEN))
    alike = [_overlap(c, r) >= ALIKE for c, r in zip(rows.chosen, rows.rejected, strict=True)]
    share = sum(alike) / len(alike)
    if any(alike):
        text = f"{sum(alike):,} pairs ({share:.1%}) have answers of nearly the same words, "
        example = rows.chosen[alike.index(True)][:60]
        text += f"such as {example!r}: there is little to learn where they differ in a detail."
        found.append(DataFinding("nearly the same answers", share, text, share >= OFTEN))
    return found


def prefix_shortcuts(rows: AnswerTexts) -> list[DataFinding]:
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
        return [DataFinding("openings", score, said + ": they give little away.")]
    listed = "; ".join(f"{o!r} opens {g:,} chosen and {b:,} rejected answers" for o, g, b in telling)
    text = f"{said}{f': {listed}' if listed else ''}. The model can learn these words in place of what makes an answer "
    return [DataFinding("openings", score, text + "good: look whether they are what you want.", True)]


def train_eval_overlap(train: AnswerTexts, held_out: AnswerTexts) -> list[DataFinding]:
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
            found.append(DataFinding(f"leaked {name}", share, text, share >= 0.01))
    return found or [DataFinding("leaked prompts", 0.0, "No held-out prompt or answer stands in the training rows.")]


def _repeated(rows: AnswerTexts) -> list[DataFinding]:
    count = Counter(rows.prompts)
    share = sum(n for n in count.values() if n > 1) / len(rows)
    if share == 0:
        return []
    text = (
        f"{share:.0%} of training rows share their prompt with another (one stands there {max(count.values())} times)"
    )
    more = ": the model sees these prompts more often than the rest." if share >= OFTEN else "."
    return [DataFinding("repeated prompts", share, text + more, share >= OFTEN)]


def _rows_lost(account: RowReport, max_length: int) -> list[DataFinding]:
    found = []
    lost = account.dropped.total() / max(1, account.read)
    if account.dropped:
        reason, count = account.dropped.most_common(1)[0]
        text = f"{lost:.1%} of rows were dropped, {count:,} of them because of: {reason}."
        found.append(DataFinding("dropped", lost, text, lost >= OFTEN))
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
            more = f": --{limit} {enough} would keep most of them, --overlong truncate_prompt those with a long prompt."
            matters = share >= OFTEN / 2
            found.append(DataFinding(reason, share, text + (more if matters else "."), matters))
    if cut := account.changed["an answer lost its end"]:
        text = f"{cut:,} rows have an answer that lost its end at max_length {max_length:,}: the model learns not to "
        text += "stop. A larger --max_length or --overlong drop mends that."
        found.append(DataFinding("cut answers", cut / account.read, text, True))
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
