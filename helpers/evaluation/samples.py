"""Prompts for another round, the models that answer them, and several answers to each."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core import Row, SettingsError, UserError, find_path, fingerprint, short_path
from helpers.data.formats import row_template_options
from helpers.evaluation.answers import AnswerStore, Generator, hash_answers
from helpers.evaluation.generators import Generators
from helpers.evaluation.judges import Scorer, ScoreSet, rating_scores, win_shares
from helpers.evaluation.judgments import (
    ONE_ORDER,
    AnswerSet,
    Judgments,
    read_exports,
    read_judgments,
    read_votes,
)
from helpers.evaluation.questions import (
    OUR_QUESTIONS,
    Answer,
    Question,
    answer_turns,
    answers_folder,
    choose_models,
    model_name,
    read_answers,
    read_question_file,
    read_questions,
)
from helpers.evaluation.verdicts import prompt_messages
from helpers.models.resolve import ModelRef, resolve_models
from helpers.runs.checkpoints import hash_files, read_run, shell_quote
from helpers.runs.run import STEPS, Run, is_hub_id, list_runs

VERDICTS = ("from_judgments", "from_votes")  # settings that name pairs which are decided already
SCORERS = ("judge_module", "reward_model", "judge_model", "vote_page")  # settings, the first of which scores
# Settings that have no effect if answers are given, and if their scorer is not used.
OF_SAMPLING = ("prompts", "prompts_file", "dataset_id", "dataset_split", "num_samples", "max_new_tokens", "temperature",
               "top_p", "base_url", "quantization", "chat_template", "chat_template_kwargs")  # fmt: skip
OF_SCORERS = {
    "judge_model": ("mode", "judge_base_url", "judge_prompts", "judge_max_new_tokens", "max_concurrency", "timeout",
                    "max_calls", "max_tokens", "input_price", "output_price", "retry_errors"),
    "reward_model": ("reward_quantization",),
}  # fmt: skip


@dataclasses.dataclass
class Prompts:
    """Prompts that are asked, by which models, or the answers that there are already."""

    questions: list[Question]
    models: list[ModelRef]  # that are asked; [] if there are answers
    answers: dict[str, dict[str, Row]]  # model → question_id as text → row of model_answer
    sides: tuple[str, ...]  # the models that chosen and rejected answers are from; "" for any
    read: int
    left_out: Counter[str]  # prompts that are not asked, by reason
    folder: Path | None = None  # of the answers
    page: str = ""  # the id of their vote page
    verdicts: str = ""  # identifies those that were given

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models] or [*self.answers]

    @property
    def base_model(self) -> str:
        """The root of the lineage of the model that answers; the name of a model whose answers were given."""
        if not self.models:
            return self.names[-1]
        last = self.models[-1]
        folder = None if last.base_url else find_path(last.adapter or last.base)
        return str(read_run(folder).get("base_model") or last.base) if folder else last.base

    @property
    def fingerprint(self) -> str:
        """Identifies the prompts, and answers and verdicts that there are already."""
        texts = [[name, *((i, row["choices"]) for i, row in rows.items())] for name, rows in self.answers.items()]
        return fingerprint(self.questions, texts, self.sides, self.verdicts)

    def open_store(self, folder: Path, settings: Any) -> SampleStore:
        """Where the answers are stored: in a run's folder."""
        return SampleStore(
            folder, self.questions, settings.batch_size, settings.seed, num_samples=settings.num_samples,
            models=self.names, page=self.page,
        )  # fmt: skip

    def __rich__(self) -> str:
        lines = [f"{len(self.questions):,} of {self.read:,} prompts, answered by {', '.join(self.names)}"]
        return "\n".join(lines + [f"  {reason}: {count:,}" for reason, count in self.left_out.items()])


def find_prompts(settings: Any) -> Prompts:
    """The prompts and models, or the existing answers, that the settings of 06_pairs.py name. Raises UserError.

    Prompts that are repeated are left out. So are those of --exclude and, unless their verdicts are asked for, those of
    the runs of 04_vibes.py and its built-in ones: a model is not trained on what evaluates it.
    """
    check_effects(settings)
    sides = [settings.chosen_from, settings.rejected_from]
    if any(sides) and not all(sides):
        raise SettingsError("--chosen_from and --rejected_from belong together. Give both, or --models.")
    folder, page, answers, models = _find_folder(settings), "", dict[str, dict[str, Row]](), list[ModelRef]()
    if folder:
        record = read_run(folder)
        page = str(record.get("page") or "")
        questions, answers = read_answers(folder)
        questions = questions[: settings.rows or None]
        given = max(settings.layer(flag) for flag in ("answers_dir", *VERDICTS))
        known = [name for name in record.get("models", []) if name in answers] or [*answers]
        wanted = settings.models if settings.layer("models") >= given else known
        answers = {name: answers[name] for name in choose_models(sides if any(sides) else wanted, answers)}
        sides = [side and model_name(side, answers) for side in sides]
    else:
        if not (settings.prompts or settings.prompts_file or settings.dataset_id):
            raise SettingsError("no prompts are set. Give --prompts_file FILE, --dataset_id ID, or --answers_dir "
                                "FOLDER with answers.")  # fmt: skip
        questions = read_questions(settings)
        names = list(dict.fromkeys(sides if any(sides) else settings.models))
        models = [resolve_models((name,), settings.output_dir, settings.base_url)[-1] for name in names]
        used = [model.name for model in models]
        used = [f"{n} ({used[: i + 1].count(n)})" if used.count(n) > 1 else n for i, n in enumerate(used)]
        models = [dataclasses.replace(model, name=name) for model, name in zip(models, used, strict=True)]
        sides = [used[names.index(side)] if side else "" for side in sides]
        if len(models) == 1 and settings.num_samples < 2:
            raise SettingsError("--num_samples 1 gives nothing to compare. Use 2 or more.")
        if not settings.temperature:
            raise SettingsError("--temperature 0 gives the same answer every time. Use a value above 0.")
    kept, left_out = _leave_out(questions, settings, folder)
    if not kept:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise UserError(f"None of {len(questions)} prompts is left ({reasons}). Give other prompts.")
    exports = [*read_exports(settings.from_votes, "--from_votes").values()]
    judged = hash_files([find_judgments(settings)]) if settings.from_judgments else ""
    verdicts = fingerprint(exports, judged) if exports or judged else ""
    return Prompts(kept, models, answers, tuple(sides), len(questions), left_out, folder, page, verdicts)


def check_effects(settings: Any) -> None:
    """Raise SettingsError for settings that would have no effect. A recipe and the environment may have some that a
    flag replaces."""
    verdicts = [name for name in VERDICTS if getattr(settings, name)]
    scorers = chosen_scorers(settings)
    if given := [name for name in ("answers_dir", *VERDICTS) if getattr(settings, name)]:
        refuse_without_effect(settings, OF_SAMPLING, *given)
    if verdicts:
        rest = itertools.chain(SCORERS, ("second_scorer", "second_rows"), *OF_SCORERS.values())
        refuse_without_effect(settings, rest, *verdicts)
    elif len(scorers) == 1:
        for scorer, names in OF_SCORERS.items():
            if scorer not in (*scorers, settings.second_scorer):
                refuse_without_effect(settings, names, *scorers)
        if scorers == ["vote_page"]:
            refuse_without_effect(settings, ("pairing", "second_scorer"), *scorers)
    if settings.from_votes:
        refuse_without_effect(settings, ("pairing",), "from_votes")
    if not settings.second_scorer:
        refuse_without_effect(settings, ("second_rows",), *scorers, without="second_scorer")


def chosen_scorers(settings: Any) -> list[str]:
    """The settings of scorers, without the second scorer, in the highest layer that has any: one, if they are right."""
    given = [name for name in SCORERS if getattr(settings, name) and name != settings.second_scorer]
    return [name for name in given if settings.layer(name) == max(map(settings.layer, given))]


def refuse_without_effect(settings: Any, names: Iterable[str], *causes: str, without: str = "") -> None:
    """Raise SettingsError for those of `names` that are set in the layer of the last of `causes`, or above it."""
    rank = max(map(settings.layer, causes), default=0)
    given = [n for n in names if getattr(settings, n) and settings.is_set(n) and settings.layer(n) >= rank]
    if given:
        cause = f"without --{without}" if without else f"with --{max(causes, key=settings.layer)}"
        verb, them = ("has", "it") if len(given) == 1 else ("have", "them")
        raise SettingsError(f"--{' and --'.join(given)} {verb} no effect {cause}. Remove {them}.")


def _leave_out(questions: list[Question], settings: Any, folder: Path | None) -> tuple[list[Question], Counter[str]]:
    evaluated = [question for name in settings.exclude for question in read_question_file("--exclude", name)]
    if not any(getattr(settings, name) for name in VERDICTS):
        files = [run.folder / "question.jsonl" for run in list_runs(settings.output_dir, "vibes")]
        for file in [OUR_QUESTIONS, *(file for file in files if file.is_file() and file.parent != folder)]:
            with contextlib.suppress(UserError):  # a broken file of another run
                evaluated += read_question_file("--exclude", str(file))
    held_out, seen = {_key(question) for question in evaluated}, set[str]()
    kept, left_out = list[Question](), Counter[str]()
    for question in questions:
        own = fingerprint(_key(question), question.get("system") or "", row_template_options(question))
        if _key(question) in held_out:
            left_out["is in an evaluation set"] += 1
        elif own in seen:
            left_out["repeats another prompt"] += 1
        else:
            kept.append(question | {"turns": question["turns"][:1]})
        seen.add(own)
    return kept, left_out


def _key(question: Question) -> str:
    """The same for prompts that differ in case and spaces only."""
    return " ".join(question["turns"][0].split()).casefold()


def _find_folder(settings: Any) -> Path | None:
    """The folder of the answers that are there already; None if models are to be asked."""
    if settings.from_judgments:
        file = find_judgments(settings)
        source = file.parents[1] if file.parent.name == "model_judgment" else file.parent
        record = read_run(source)
        recorded = Path(str(record.get("answers_dir") or "-"))
        places = [place for place in (find_path(str(recorded)), source.parent / recorded.name, source)
                  if place and (place / "model_answer").is_dir()]  # fmt: skip
        places = [answers_folder(settings)] if settings.answers_dir else places
        if not places:
            raise UserError(f"The answers of {short_path(source)} are gone. Name their folder with --answers_dir.")
        if judged := [place for place in places if _were_judged(place, record)]:
            return judged[0].resolve()
        raise UserError(f"{short_path(places[0])} does not have the answers that were judged in {short_path(source)}. "
                        "Judge these, or name the folder with --answers_dir.")  # fmt: skip
    if settings.answers_dir:
        return answers_folder(settings)
    if settings.from_votes:
        page = next(iter(read_exports(settings.from_votes, "--from_votes").values()))["page"]
        runs = [*list_runs(settings.output_dir, "vibes"), *list_runs(settings.output_dir, "pairs")]
        if found := [run.folder for run in runs if run.record.get("page") == page]:
            return found[0].resolve()
        raise UserError(f"No run in {short_path(settings.output_dir)} has the page {page}. Name it with --answers_dir.")
    return None


def _were_judged(place: Path, record: Row) -> bool:
    """Whether a folder has the answers that a run of 05 judged, as far as its record tells."""
    judged = record.get("answers") or {}
    if not judged or (record.get("settings") or {}).get("bench_dir"):  # its questions may be others than the folder's
        return True
    questions, found = read_answers(place)
    ids, names = [str(q["question_id"]) for q in questions], found.keys() & judged.keys()
    answers = {name: {i: answer_turns(found[name][i]) for i in ids if i in found[name]} for name in names}
    return hash_answers(answers) == judged


def find_judgments(settings: Any) -> Path:
    """The file of judgments that --from_judgments names: itself, or that of a run of 05_judge.py or a FastChat folder.
    Raises UserError."""
    flag, path = f"--from_judgments {settings.from_judgments!r}", settings.output_dir / settings.from_judgments
    source = path if path.exists() else find_path(settings.from_judgments)
    if source is None:
        raise UserError(f"{flag} does not exist. Give a run of 05_judge.py.")
    files = sorted((source / "model_judgment").glob("*.jsonl")) if source.is_dir() else [source]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{flag} needs one file of judgments, and has {names}. Name one file.")
    return files[0].resolve()


def find_answering_model(name: str, folder: Path, output_dir: Path) -> tuple[str, bool]:
    """The folder or name of a model whose answers are in `folder`, as its run recorded it, and whether an endpoint
    served it; "" if that is not known."""
    record = read_run(folder)
    given = record.get("settings") or {}
    source = given.get("answers_dir") or "-"
    inner = next((p for p in (output_dir / source, find_path(source)) if p and p.is_dir()), None)
    if record.get("step") == "pairs" and inner and inner.resolve() != folder.resolve():
        return find_answering_model(name, inner, output_dir)  # a page of 06 on the answers there
    asked = [*given.get("models", ()), *(given.get(side) or "" for side in ("chosen_from", "rejected_from"))]
    named = [(w.partition("@http")[0], "@http" in w or bool(given.get("base_url"))) for w in map(str, asked)]
    places = dict.fromkeys([output_dir.resolve(), folder.resolve().parent])
    runs = [run for place in places for step in STEPS for run in list_runs(place, step)]
    runs += [Run(path, read_run(path)) for word, _ in named if (path := find_path(word))]
    weights = (record.get("weights") or {}).get(name)
    same = [run for run in runs if (run.record.get("fingerprint") == weights if weights else run.name == name)]
    if found := sorted(same, key=lambda run: run.name != name):
        return str(found[0].folder), False
    named += [(str(record.get("base_model") or ""), False), (name if is_hub_id(name) else "", True)]
    return next(((w, served) for w, served in named if w and name in (w, model_name(w, [name]))), ("", True))


@dataclasses.dataclass
class SampleStore(AnswerStore):
    """Several answers of each model to the first turn of each question: FastChat's rows, with several `choices`. A
    sample is called like its model, and NAME #2 if the model has several."""

    num_samples: int = 4
    models: list[str] = dataclasses.field(default_factory=list)
    page: str = ""

    @property
    def names(self) -> dict[str, tuple[str, int]]:
        """The model of each sample, and which of its choices the sample is."""
        counts = {m: max((len(r["choices"]) for r in self.file(m).rows.values()), default=0) for m in self.models}
        return {
            f"{model} #{k + 1}" if count > 1 else model: (model, k) for model, count in counts.items()
            for k in range(count)
        }  # fmt: skip

    def answers(self, name: str) -> dict[Any, list[Answer]]:
        """A sample's answers by question_id; those of a model are those of its first sample."""
        model, index = self.names.get(name, (name, 0))
        rows = self.file(model).rows
        asked = [i for q in self.questions if (i := q["question_id"]) in rows and index < len(rows[i]["choices"])]
        return {i: answer_turns(rows[i], index)[:1] for i in asked}

    @property
    def answer_set(self) -> AnswerSet:
        """The samples as answers of that many models: what judges take."""
        return AnswerSet(self.questions, {name: self.answers(name) for name in self.names}, self.folder, self.page)

    def import_answers(self, answers: dict[str, dict[str, Row]]) -> None:
        """Store rows that there are already, by model and by question_id as text."""
        self.write_questions()
        for name, rows in answers.items():
            missing = [i for q in self.missing(name) if str(i := q["question_id"]) in rows]
            self.file(name).add(*(rows[str(i)] | {"question_id": i, "model_id": name} for i in missing))

    def reuse(self, run: Run, settings: Any, generators: Generators) -> None:
        """Take answers from other runs in which the same models were asked the same in the same way."""
        common = self.questions, generators.sampling, self.num_samples, self.seed
        loading, own = generators.loading, generators.fingerprints
        keys = {name: fingerprint(*common, own[name], loading[name]) for name in own}
        if not run.finished:
            run.save(sampling=keys)
        others = list_runs(settings.output_dir, "pairs") if settings.resume != "never" else []
        for other in (other for other in others if other.name != run.name):
            for theirs, key in (other.record.get("sampling") or {}).items():
                if name := next((name for name, own in keys.items() if own == key and self.missing(name)), None):
                    rows = SampleStore(other.folder, []).file(theirs).rows
                    self.import_answers({name: {str(i): row for i, row in rows.items()}})

    def _ask(
        self, batch: list[Question], generator: Generator, seed: int, kwargs: dict[str, Any]
    ) -> list[list[Answer]]:
        """Each answer has its own seed, from the prompt and its number."""
        talks, options = [prompt_messages(q) for q in batch], [row_template_options(q) for q in batch]
        seeds = [[int(fingerprint(self.seed, talk, k), 16) % 2**31 for k in range(self.num_samples)] for talk in talks]
        return generator.sample(talks, seeds, **kwargs, **({"options": options} if any(options) else {}))

    def _choices(self, turns: list[Answer]) -> list[Row]:
        return [super(SampleStore, self)._choices([turn])[0] | {"index": k} for k, turn in enumerate(turns)]


class ExistingVerdicts(Scorer):
    """What a judge or people have decided before: nothing is scored."""

    def __init__(self, settings: Any) -> None:
        """Read the judgments. Raises UserError, or SettingsError for settings that comparisons leave without effect."""
        super().__init__("the verdicts that are given", settings)
        self.judgments: Judgments | None = None
        if settings.from_judgments:
            self.judgments = read_judgments(short_path(find_judgments(settings)), "", flag="--from_judgments")
        self.is_rated = bool(self.judgments and "score" in self.judgments.rows[0])
        if not self.is_rated:
            refuse_without_effect(settings, ("pairing",), *(name for name in VERDICTS if getattr(settings, name)))

    def run(self, samples: SampleStore, run: Run) -> ScoreSet:
        """Ratings of first turns as scores, or comparisons. Verdicts on a model are about its first sample."""
        answers, judgments = samples.answer_set, self.judgments
        firsts = {model: name for name, (model, k) in samples.names.items() if k == 0}
        if judgments is None:
            known = answers.answers | {model: answers.answers[name] for model, name in firsts.items()}
            pairs = [pair for names in (answers.answers, firsts) for pair in itertools.combinations(names, 2)]
            found = dataclasses.replace(answers, answers=known)
            votes = read_votes(self.settings.from_votes, found, [*dict.fromkeys(pairs)], "--from_votes", is_part=True)
            judgments = Judgments("human", votes)
        ids = {str(q["question_id"]): q["question_id"] for q in answers.questions}
        rows = [
            row | {key: firsts.get(row[key], row[key]) for key in ("model", "model_1", "model_2") if key in row}
            | {"question_id": ids.get(str(row["question_id"]))} for row in judgments.rows
        ]  # fmt: skip
        judgments = dataclasses.replace(judgments, rows=rows)
        if self.is_rated:
            return rating_scores(judgments)
        consistency = None if judgments.judge in ONE_ORDER else win_shares(judgments).consistency
        return ScoreSet(judgments.judge, {}, consistency=consistency, verdicts=rows)


def policy_flag(settings: Any, prompts: Prompts) -> tuple[str, str]:
    """How 02 starts from the model that answered (of several, from the last), and what to know if that is not known."""
    name = prompts.names[-1]
    model = prompts.models[-1] if prompts.models else None
    if model:
        place, is_served = model.adapter or model.base, bool(model.base_url)
    else:
        place, is_served = find_answering_model(name, prompts.folder or settings.output_dir, settings.output_dir)
    path = find_path(str(settings.output_dir / place)) or find_path(place)
    if path and read_run(path).get("step") in ("sft", "dpo"):
        return f"--sft_run {shell_quote(path)}", ""
    if (model and model.adapter) or (path and (path / "adapter_config.json").is_file()):
        merge = f"Merge it with `python notebooks/03_merge_push.py --adapter {shell_quote(path or place)}`"
        return "--model_id MODEL", f"{name} is an adapter. {merge}, and replace MODEL by the merged folder."
    if (path and (path / "config.json").is_file()) or (place and not path and (is_hub_id(place) or not is_served)):
        return f"--model_id {shell_quote(path or place)}", ""
    fix = "Replace MODEL by its folder or Hub id, or give --sft_run and the folder of its run"
    return "--model_id MODEL", f"The location of the weights of {name} is unknown. {fix}."
