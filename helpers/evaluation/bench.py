"""Tasks with right answers, before and after: EleutherAI's lm-evaluation-harness (lm-eval 0.4), on models as 04 loads
them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from scipy.stats import binomtest

from helpers.core import BLUE, ORANGE, Row, SettingsError, UserError, new_figure, shorten
from helpers.evaluation.answers import JsonlStore, make_table
from helpers.evaluation.generators import Generators, HFGenerator
from helpers.evaluation.judgments import Judgments
from helpers.evaluation.questions import find_input
from helpers.models.adapters import describe_error
from helpers.models.resolve import resolve_models
from helpers.runs.checkpoints import hash_files
from helpers.runs.run import Run
from helpers.runs.start import resumable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = '`--bench` needs the package lm-eval. Install it with `pip install "lm-eval[hf,ifeval]"`.'
BATCH, SHOWN = 8, 5  # requests at a time; questions that are shown of those that got worse, for each task
BENCH_METHOD = (
    "A question's result is the task's first metric that is 0 or 1 for each question, after the task's last filter. "
    "p: exact McNemar test, of the questions that exactly one model answers right. Interval of the difference: "
    "Clopper and Pearson's of their share, times how many they are."
)


class Bench:
    """Models that answer tasks, in place of a judge: see `Judge` for the interface. Raises SettingsError or UserError
    for a task that is unknown, or a model that cannot run here."""

    def __init__(self, settings: Any) -> None:
        try:
            import lm_eval.evaluator
            import lm_eval.models.huggingface  # noqa: F401
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(INSTALL if "lm_eval" in str(error) else f"{INSTALL} ({error})") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if settings.is_set("answers_dir") or settings.bench_dir:
            raise SettingsError("--bench asks the models. Remove --answers_dir and --bench_dir, and give --models.")
        files = {name: find_input("--bench", name) for name in settings.bench if name.endswith((".yaml", ".yml"))}
        self.manager = TaskManager(include_defaults=len(files) < len(settings.bench))  # it reads 14,000 files
        named = [(files[name].stem if name in files else name, str(files.get(name, name))) for name in settings.bench]
        self.specs = dict(named)
        if len(self.specs) < len(set(named)):
            raise SettingsError(f"--bench {' '.join(settings.bench)}: two tasks have one name. Rename a file.")
        for name in self.specs.values():
            if name not in self.manager.task_index and not Path(name).is_file():
                raise SettingsError(f"--bench {name} is no task of lm-eval and no YAML file. See `lm-eval ls tasks`.")
        refs = resolve_models(settings.models or ("latest",), settings.output_dir)
        if remote := [ref.name for ref in refs if ref.base_url]:
            raise SettingsError(f"--bench needs models that are loaded here, and {remote[0]} is behind an endpoint.")
        if len(refs) < 2:
            raise SettingsError(f"--bench compares models, and there is one: {refs[0].name}. Add one to --models.")
        for name in self.specs:  # before anything is written
            self._load(name)
        how = SimpleNamespace(
            trust_remote_code=False, quantization="auto", chat_template="auto", chat_template_kwargs="", seed=0
        )
        self.generators = Generators(refs, how, sampling={})
        self.models, self.limit = [ref.name for ref in refs], settings.limit
        self.name = f"lm-eval {' '.join(self.specs)}"
        contents = [_contents(Path(spec)) if Path(spec).is_file() else spec for spec in self.specs.values()]
        self.fingerprint = self.generators.fingerprint(contents, self.limit)

    def preview(self) -> str:
        """What `run` would do."""
        size = f"the first {self.limit:,} questions" if self.limit else "all questions"
        return f"{size} of {', '.join(self.specs)}, for {', '.join(self.models)}."

    def missing(self, model: str) -> list[str]:
        """The tasks that a model has not answered yet."""
        return [task for task in self.specs if "metrics" not in self.store.rows.get((model, task), {})]

    def run(self, run: Run) -> BenchJudgments:
        """Let each model answer what is missing; what it answered is stored in the run's folder after each task."""
        with resumable(run):  # which may delete a run
            self.store = JsonlStore(run.folder / "bench.jsonl", lambda row: (row["model"], row["task"]))
            if not run.finished:
                run.save(models=self.models, loading=self.generators.loading, weights=self.generators.weights)
            for model, generator in self.generators.load(cast(Any, self)):
                for task in self.missing(model):
                    self.store.add({"model": model, "task": task, **self._ask(task, cast(HFGenerator, generator))})
        rows = [row for task in self.specs for row in self._choose_metric(task)]
        return BenchJudgments(self.name, [], answered=rows)

    def _load(self, task: str) -> dict[str, Any]:
        """The parts of a task, with their questions. Raises UserError."""
        try:
            return dict(self.manager.load([self.specs[task]])["tasks"])
        except (MemoryError, UserError):
            raise
        except Exception as error:  # of a file, the Hub, or a package that the task needs
            raise UserError(f"--bench {task} cannot be loaded: {describe_error(error).rstrip('.')}.") from None

    def _ask(self, task: str, generator: HFGenerator) -> Row:
        """The metric of a task, and for each of its questions whether the answer is right."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        ends_thought = "</think>" if "</think>" in generator.tokenizer.get_vocab() else None
        model = HFLM(
            generator.model, tokenizer=generator.tokenizer, batch_size=BATCH, think_end_token=ends_thought,
            mixed_precision_dtype=generator.autocast, chat_template_args=generator.variables,
        )  # fmt: skip
        tasks = self._load(task)
        found: Any = simple_evaluate(
            model, tasks=[*tasks.values()], limit=self.limit or None, apply_chat_template=True, bootstrap_iters=0,
            task_manager=self.manager,
        )  # fmt: skip
        samples = [(name, sample) for name, own in found["samples"].items() for sample in own]
        last = samples[-1][1]["filter"]
        samples = [(name, sample) for name, sample in samples if sample["filter"] == last]
        metrics = [m for m in samples[0][1]["metrics"] if all(sample.get(m) in (0, 1) for _, sample in samples)]
        if not metrics:
            raise _no_metric(task, samples[0][1]["metrics"])
        docs = [
            {"id": f"{name}/{sample['doc_id']}", "question": str(tasks[name].doc_to_text(sample["doc"])),
             "target": str(sample["target"]), "answer": str(sample["resps"][0][0]),
             "values": {metric: int(sample[metric]) for metric in metrics}}
            for name, sample in samples
        ]  # fmt: skip
        return {"metrics": metrics, "filter": last, "docs": docs}

    def _choose_metric(self, task: str) -> list[Row]:
        """What the models answered, by the first metric that is 0 or 1 for every answer of all of them."""
        rows = [self.store.rows[model, task] for model in self.models]
        shared = [name for name in rows[0]["metrics"] if all(name in row["metrics"] for row in rows)]
        if not shared:
            raise _no_metric(task, rows[0]["metrics"])
        metric = shared[0] + f" ({rows[0]['filter']})" * (rows[0]["filter"] != "none")
        docs = [[doc | {"right": doc["values"][shared[0]]} for doc in row["docs"]] for row in rows]
        return [row | {"metric": metric, "docs": own} for row, own in zip(rows, docs, strict=True)]


def _no_metric(task: str, known: Sequence[str]) -> UserError:
    names = ", ".join(known)
    return UserError(f"--bench {task} has no metric that says right or wrong for each question ({names}).")


def _contents(task: Path) -> list[str]:
    """A YAML file of a task, and a hash of the files of its folder that it names: data, and modules of functions."""
    text = task.read_text("utf-8")
    names = {*re.findall(r"[\w.-]+", text), *(f"{module}.py" for module in re.findall(r"!function (\w+)\.", text))}
    return [text, hash_files(file for file in task.parent.iterdir() if file.name in names and file.is_file())]


def compare_right(before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    """How many questions got better and worse, the difference of the accuracies with its 95 % interval, and p."""
    n, better = len(before), sum(b < a for b, a in zip(before, after, strict=True))
    worse = sum(b > a for b, a in zip(before, after, strict=True))
    bound = float(binomtest(0, n).proportion_ci(method="exact").high)
    low, high, p = -bound, bound, 1.0
    if changed := better + worse:
        test = binomtest(better, changed)
        ends, p = test.proportion_ci(method="exact"), float(test.pvalue)
        low, high = ((2 * float(end) - 1) * changed / n for end in ends)
    shares = {"before": sum(before) / n, "after": sum(after) / n, "difference": (better - worse) / n}
    return {"questions": n, "better": better, "worse": worse, **shares, "interval": (low, high), "p": p}


@dataclasses.dataclass
class BenchJudgments(Judgments):
    """What models answered: a row for each task and model, with its questions."""

    answered: list[Row] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class BenchResults:
    """The accuracy of each model on each task, and what changed from one model to a later one."""

    judge: str
    models: dict[str, dict[str, float]]  # model → its accuracy by task
    tasks: list[dict[str, Any]]  # for each task and pair of models, see `compare_right`
    worse: list[dict[str, str]]  # questions that only the earlier model answered right, some of each task and pair

    @classmethod
    def from_judgments(cls, judgments: BenchJudgments) -> BenchResults:
        models: dict[str, dict[str, float]] = {}
        tasks, worse = [], []
        by_task = {task: [*rows] for task, rows in itertools.groupby(judgments.answered, lambda row: row["task"])}
        for task, rows in by_task.items():
            for row in rows:
                own = [doc["right"] for doc in row["docs"]]
                models.setdefault(row["model"], {})[task] = sum(own) / len(own)
            for old, new in itertools.combinations(rows, 2):
                pair = {"task": task, "metric": new["metric"], "baseline": old["model"], "candidate": new["model"]}
                sides = ([doc["right"] for doc in row["docs"]] for row in (old, new))
                tasks.append(pair | compare_right(*sides))
                both = zip(old["docs"], new["docs"], strict=True)
                lost = [(one, two) for one, two in both if one["right"] > two["right"]]
                worse += [
                    pair | {"question": shorten(one["question"], 300), "target": shorten(one["target"], 100),
                            "before": shorten(one["answer"], 300), "after": shorten(two["answer"], 300)}
                    for one, two in lost[:SHOWN]
                ]  # fmt: skip
        return cls(judgments.judge, models, tasks, worse)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"method": BENCH_METHOD}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        head = ["task", "questions", "before", "after", "difference", "95% interval", "better", "worse", "p"]
        parts: list[Any] = []
        for old, new in dict.fromkeys((row["baseline"], row["candidate"]) for row in self.tasks):
            own = [row for row in self.tasks if (row["baseline"], row["candidate"]) == (old, new)]
            cells = [
                (f"{row['task']}, {row['metric']}", row["questions"], f"{row['before']:.1%}", f"{row['after']:.1%}",
                 f"{row['difference']:+.1%}", "{:+.1%} to {:+.1%}".format(*row["interval"]), row["better"],
                 row["worse"], f"{row['p']:.2g}")
                for row in own
            ]  # fmt: skip
            parts += [Text(f"{old} before, {new} after", style="bold"), make_table(head, cells), ""]
        if self.worse:
            texts = [(f"{r['task']}: {r['question']}", r["target"], r["before"], r["after"]) for r in self.worse]
            parts += [make_table(["what got worse", "right", "before", "after"], texts, show_lines=True), ""]
        return Group(*parts, Text(BENCH_METHOD, style="dim"))

    def figure(self) -> Figure:
        """The accuracies of each pair on each task, before and after."""
        figure: Figure = new_figure(figsize=(9, 1.2 + 0.6 * len(self.tasks)), layout="constrained")
        axis = figure.subplots()
        for side, colour, shift in (("before", ORANGE, -0.18), ("after", BLUE, 0.18)):
            places = [i + shift for i in range(len(self.tasks))]
            bars = axis.barh(places, [row[side] for row in self.tasks], color=colour, height=0.34, label=side)
            axis.bar_label(bars, [f"{row[side]:.1%}" for row in self.tasks], fontsize=9)
        names = [f"{row['task']}\n{row['baseline']}, {row['candidate']}" for row in self.tasks]
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1.1), xlabel="share of right answers")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        return figure
