"""What a dataset will teach, before it is trained on: lengths, bias, duplicates, leaks, and openings that tell.

    python -m helpers.data_report --dataset_id my_pairs.jsonl --model_id mistralai/Mistral-7B-Instruct-v0.2

has the names of 02_dpo.py's settings (with --sft, 01_sft.py's), reads .env for the Hub, needs a tokenizer and no model.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

import numpy as np

from helpers import layers
from helpers.accounts import Account
from helpers.data_findings import Answers, Finding, find_all, read_answers
from helpers.errors import SettingsError, report_user_errors
from helpers.paths import short_path
from helpers.processes import is_main_process, until_read
from helpers.runs import write_json
from helpers.settings import parse_words, quieten, run_prepare
from helpers.split import Split

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

PROMPTS = 32  # that are kept with a run
QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}


@dataclasses.dataclass
class DataReport:
    """Lengths in tokens by what they are of, what was found, and the account that it stands on."""

    account: Account
    train: Answers
    held_out: Answers
    max_length: int
    findings: list[Finding]
    prompts: list[Any] = dataclasses.field(default_factory=list)  # the first held-out ones, for what comes later

    @classmethod
    def of(cls, train: Dataset, held_out: Dataset, account: Account, max_length: int = 0) -> DataReport:
        """The report on what `load_preferences` or `load_instructions` gave, at the `max_length` they were given."""
        answers = read_answers(train), read_answers(held_out)
        prompts = held_out[:PROMPTS]["prompt"] if "prompt" in held_out.column_names else []
        return cls(account, *answers, max_length, find_all(*answers, account, max_length), list(prompts))

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
        from helpers.data_plots import draw_report

        return draw_report(self)

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
    pairing: Literal["worst", "random", "all"] = "worst"  # of several ranked answers: the best against which others
    recommended: bool = False  # keep only the rows that the dataset's card recommends
    min_margin: float = 0.0  # pairs rated closer than this are dropped; ties always are
    max_prompt_length: int = 1024  # tokens of a prompt; 0 for no limit
    max_length: int = 1512  # tokens of a prompt and its answer, likewise
    overlong: Literal["drop", "trim_prompt", "cut_answer", "error"] = "drop"  # what becomes of rows beyond them
    strict: bool = False  # stop when any row has to be dropped
    chat_format: str = "auto"  # the tokenizer's own, else mistral; or a format by name, or a file
    system_prompt: str = ""  # put before every conversation that has no system message of its own
    seed: int = 42  # seed of the split
    out: str = ""  # folder for data_report.png and data_report.json; none are written when empty


def main(argv: list[str] | None = None) -> None:
    """The command: see the module's docstring."""
    from helpers.chat import apply_chat_format
    from helpers.display import show
    from helpers.formats import Options
    from helpers.instructions import load_instructions
    from helpers.lengths import Limits
    from helpers.loading import read_sources
    from helpers.preferences import load_preferences
    from helpers.sources import local_or_hub

    report_user_errors()
    quieten()
    given = _read_settings(sys.argv[1:] if argv is None else argv)
    from transformers import AutoTokenizer

    model = local_or_hub(given.model_id, given.revision, "tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(
        model, revision=given.revision or "main", trust_remote_code=given.trust_remote_code
    )
    apply_chat_format(tokenizer, given.chat_format)
    split = Split(given.train_rows, given.eval_rows, given.eval_fraction, given.seed)
    more: dict[str, Any] = {"split": split, "strict": given.strict, "num_proc": given.dataset_num_proc}
    sources = read_sources(given)
    if given.sft:
        limits = Limits(total=given.max_length, overlong=given.overlong)
        train, held_out, account = load_instructions(
            sources, tokenizer, limits, system_prompt=given.system_prompt, **more
        )
    else:
        limits = Limits(given.max_prompt_length, given.max_length, given.overlong)
        options = Options(given.pairing, given.recommended, given.min_margin, given.system_prompt, given.seed)
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
        with until_read():
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
        pairs = "sft" not in flags or not parse_words(bool, "sft", flags["sft"], "flag")
        values = sft if not pairs else {"model_id": sft["model_id"]} | dpo if "model_id" in sft else dpo
        if "prepare" in values:
            run_prepare(values["prepare"][0])
    words = {name: (given, "recipe") for name, given in values.items() if name in types}
    words |= {name: (given, "flag") for name, given in flags.items()}
    settings = ReportSettings(**{name: parse_words(types[name], name, *given) for name, given in words.items()})
    source = words.get("dataset_split", ([], "default"))[1]
    settings.sources = {"dataset_split": source}  # type: ignore[misc]
    return settings


if __name__ == "__main__":
    main()
