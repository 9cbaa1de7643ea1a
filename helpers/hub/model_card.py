"""Write a model card from a run and the runs that it started from."""

from __future__ import annotations

import difflib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from helpers.core import SettingsError, UserError, find_path
from helpers.runs.report import hide_paths
from helpers.runs.run import (
    STEPS,
    dataset_names,
    is_hub_id,
    lineage,
    list_runs,
    read_run,
    recorded_variables,
    serve_options,
)

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"
RELATION_TO_BASE = {"adapter": "adapter", "merged": "merge", "full": "finetune"}  # the Hub's `base_model_relation`
# Settings that name a place or another section of the card, not how the model was trained.
OMITTED_SETTINGS = {
    "recipe", "output_dir", "run_name", "resume", "dry_run", "report_to", "wandb_project", "setup_module", "model_id",
    "sft_run", "dataset_id", "dataset_revision", "dataset_split", "revision", "run", "adapter", "base_model_id",
    "merge_adaptors", "push_to_hub", "hub_repo_id", "system_prompt",
}  # fmt: skip
CARD_METRICS = {"eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin", "eval_loss": "loss"}


def license_options(settings: Any) -> dict[str, str]:
    """The settings about the license, which 02_dpo.py does not have."""
    return {
        "license_id": getattr(settings, "license", ""),
        "license_name": getattr(settings, "license_name", ""),
        "license_link": getattr(settings, "license_link", ""),
    }


def license_metadata(license_id: str, license_name: str = "", license_link: str = "") -> dict[str, str]:
    """The fields of a card about a license, with the Hub's id for it: apache-2.0 for "Apache 2.0".

    Raises SettingsError for a license that is not among https://huggingface.co/docs/hub/repositories-licenses.
    """
    if not license_id:
        return {}
    ids = TEMPLATE.with_name("licenses.txt").read_text().split()
    key, keys = _license_key(license_id), {_license_key(each): each for each in ids}
    starts = [each for each in keys if key and each.startswith(key)]
    known = keys.get(key) or (keys[starts[0]] if len(starts) == 1 else "")
    if not known:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
        fix = f"Use the nearest, {keys[near]}, or other with --license_name and --license_link"
        raise SettingsError(f"--license {license_id!r} is not a license that the Hub knows. {fix}.")
    if known != "other":
        return {"license": known}
    name = re.sub(r"[^a-z0-9.]+", "-", license_name.lower()).strip("-.")
    if not name or not re.fullmatch(r"https?://[^\s@]+|[\w.-]+", license_link):
        raise SettingsError("--license other needs --license_name and --license_link. Give its name and its address.")
    return {"license": known, "license_name": name, "license_link": license_link}


def _license_key(name: str) -> str:
    """A license's name without the words, signs and zeros in which its spellings differ: "apache2"."""
    words = re.sub(r"[\s_,()-]+", " ", re.sub(r"v(?=\d)|version", "", name.lower()))
    words = re.sub(r"\b(the|licen[cs]e|community|agreement|public|clause|only|or later|gnu|terms of use)\b", "", words)
    return re.sub(r"\.0\b|[^a-z0-9.+]", "", words).removesuffix("license") or name.lower()


def complete_license(card: Any, base: str) -> tuple[str, str, str]:
    """The license in the card of a base model, with its name and link. One that the Hub does not know is "other"."""
    stated = card.get("license") or ""
    license_id = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    name, link = str(card.get("license_name") or f"license of {base}"), str(card.get("license_link") or "")
    link = link if re.match("https?://", link) else f"https://huggingface.co/{base}"  # or a file of its repository
    try:
        return license_metadata(str(license_id), name, link).get("license", ""), name, link
    except SettingsError:
        return "other", str(license_id), link


def markdown(value: Any) -> str:
    """A name or a text of others for a card: one line, without folders of this machine, that shows as it is."""
    text = re.sub(r"\b[A-Za-z]:[\\/](?:[^\\/|<>]+[\\/])*", "", hide_paths(" ".join(str(value).split())))
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(text, quote=False))


def write_card(
    folder: Path, repo_id: str, license_id: str = "", license_name: str = "", license_link: str = ""
) -> str:  # fmt: skip
    """Return the card of a run's folder, or of an adapter from elsewhere. Raises UserError if the Hub rejects it."""
    runs = lineage(folder)
    if runs and (gone := runs[-1]["parent_gone"]):
        print(f"note: {gone}, which {Path(runs[-1]['folder']).name} started from, is gone. The card does not show it.")
    is_adapter = (folder / "adapter_config.json").is_file()
    kind = "adapter" if is_adapter else "merged" if read_run(folder).get("step") == "merge" else "full"
    dpo: dict[str, Any] = next((run for run in runs if run["step"] == "dpo"), {})
    variables = recorded_variables(runs)
    files = {file.name for file in folder.iterdir()}
    try:
        card = ModelCard.from_template(
            _metadata(base_on_hub(folder, runs), runs, dpo, kind, repo_id,
                      license_metadata(license_id, license_name, license_link)),
            template_path=str(TEMPLATE), repo_id=repo_id, kind=kind, runs=runs, dpo=dpo, files=files, step_names=STEPS,
            comparison=_newest_comparison(runs), dataset_names=dataset_names, settings_table=_settings_table,
            md=markdown, variables=variables, serve_options=serve_options(variables),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"The card of {repo_id} is not valid for the Hub: {error}") from None
    return f"{card}\n"


def base_on_hub(folder: Path, runs: list[dict[str, Any]]) -> str:
    """Hub id of the model at the root of the lineage; "" for a local folder."""
    file = folder / "adapter_config.json"
    base = str(runs[-1]["base_model"]) if runs else ""
    if not base and file.is_file():
        base = str(json.loads(file.read_text())["base_model_name_or_path"] or "")
    is_local = bool(runs and runs[-1].get("base_folder")) or find_path(base)
    return "" if not base or is_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else base


def _metadata(
    base: str, runs: list[dict[str, Any]], dpo: dict[str, Any], kind: str, repo_id: str, license_fields: dict[str, Any]
) -> ModelCardData:
    name = ", ".join(dataset_names(dpo)) or "held-out pairs"
    metrics = {n: float(dpo.get("metrics", {}).get(n, math.nan)) for n in CARD_METRICS}
    results = [
        EvalResult(
            task_type="text-generation", task_name="Preference alignment",
            dataset_type=name, dataset_name=f"{name} (held out)",
            metric_type=CARD_METRICS[n], metric_name=n.removeprefix("eval_"), metric_value=round(value, 6),
        )
        for n, value in metrics.items() if math.isfinite(value)
    ]  # fmt: skip
    datasets = [name for run in runs for name in dataset_names(run) if is_hub_id(name)]
    methods = [run["step"] for run in runs if run["step"] in ("dpo", "sft")]
    return ModelCardData(
        base_model=base or None,
        base_model_relation=RELATION_TO_BASE[kind] if base else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="peft" if kind == "adapter" else "transformers",
        **license_fields,
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys(["trl", *methods])],
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def _settings_table(run: dict[str, Any]) -> dict[str, str]:
    """Four settings of a run and those that differ from the defaults, each on one line."""
    settings, sources = run["settings"], run.get("sources", {})
    names = [name for name in ("tuning", "learning_rate", "num_train_epochs", "seed") if name in settings]
    names += [n for n in settings if sources.get(n, "default") != "default" and n not in {*OMITTED_SETTINGS, *names}]
    cells = {}
    for name in names:
        value = settings[name]
        words = [str(word) for word in (value if isinstance(value, list | tuple) else [value])]
        text = " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
        cells[name] = " ".join(text.split())[:200]
    return cells


def _newest_comparison(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Result of the newest finished pairwise run of 05_judge.py with one of these models as the candidate."""
    names = {Path(run["folder"]).name for run in runs if run["step"] != "sft"}
    judged = list_runs(Path(runs[0]["folder"]).parent, "judge") if runs else []
    metrics = [run.record["metrics"] | {"loading": run.loading} for run in judged if run.finished]
    pairs = [pair | {n: each[n] for n in ("judge", "loading")} for each in metrics for pair in each.get("pairs", [])]
    comparison = next((pair for pair in pairs if pair["candidate"] in names), None)
    texts = {n: hide_paths(str(comparison[n])) for n in ("judge", "baseline", "candidate")} if comparison else {}
    return comparison and comparison | texts | {"notes": [hide_paths(note) for note in comparison.get("notes", [])]}
