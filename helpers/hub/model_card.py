"""A model card from a run's lineage: where it comes from, how it was trained, how it did, and how to load it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import UserError, find_path
from helpers.runs.run import STEPS, _is_hub_id, dataset_names, lineage, read_run

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


RELATION = {"adapter": "adapter", "merged": "merge", "full": "finetune"}
# Settings that say where a run was kept, not how it was trained.
OMITTED_SETTINGS = {
    "recipe", "output_dir", "run_name", "resume", "dry_run", "report_to", "wandb_project", "setup_module", "model_id",
    "sft_run", "dataset_id", "dataset_revision", "dataset_split", "revision", "run", "adapter", "base_model_id",
    "merge_adaptors", "push_to_hub", "hub_repo_id", "system_prompt",
}  # fmt: skip
EVALUATED = {"eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin", "eval_loss": "loss"}


def write_card(folder: Path, repo_id: str, licence: str = "") -> str:
    """The card of what is in `folder`: a run's adapter, merged model or model, or an adapter from elsewhere.

    Raises UserError where the Hub's own parser does not take the card.
    """
    from huggingface_hub import ModelCard

    runs = lineage(folder)
    kind = kind_of(folder)
    data = _metadata(folder, runs, kind, repo_id, licence)
    parts = [f"# {repo_id.rpartition('/')[2]}", _what(runs, kind, data), _use(folder, repo_id, kind, data)]
    parts += [_training(run) for run in runs if run["step"] in ("dpo", "sft")]
    parts += [_evaluation(folder, runs), _verdicts(runs), _merge(runs), _made_with(runs)]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"
    try:
        ModelCard(text)
    except ValueError as error:
        raise UserError(f"the card of {repo_id} is not one that the Hub takes: {error}") from None
    return text


def kind_of(folder: Path) -> str:
    """ "adapter", "merged" or "full"."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "merged" if read_run(folder).get("step") == "merge" else "full"


def base_of(folder: Path, runs: list[dict[str, Any]]) -> str:
    """The Hub id of the model at the root, or "" where it is a folder of this machine."""
    file = folder / "adapter_config.json"
    base = str(runs[-1]["base_model"]) if runs else ""
    if not base and file.is_file():
        base = str(json.loads(file.read_text())["base_model_name_or_path"] or "")
    return "" if not base or find_path(base) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else base


def _metadata(folder: Path, runs: list[dict[str, Any]], kind: str, repo_id: str, licence: str) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    base = base_of(folder, runs)
    sets = [name for run in runs for name in dataset_names(run)]
    metrics: dict[str, Any] = next((run["metrics"] for run in runs if run["step"] == "dpo"), {})
    data_name = ", ".join(dataset_names(next((r for r in runs if r["step"] == "dpo"), {}))) or "held-out pairs"
    results = [
        EvalResult(
            task_type="text-generation", task_name="Preference alignment", dataset_type=data_name,
            dataset_name=f"{data_name} (held out)", metric_type=metric, metric_name=name.removeprefix("eval_"),
            metric_value=round(float(metrics[name]), 6),
        )
        for name, metric in EVALUATED.items() if math.isfinite(float(metrics.get(name, math.nan)))
    ]  # fmt: skip
    method = [run["step"] for run in runs if run["step"] in ("dpo", "sft")]
    return ModelCardData(
        base_model=base or None,
        base_model_relation=RELATION[kind] if base else None,
        datasets=list(dict.fromkeys(name for name in sets if _is_hub_id(name))) or None,
        library_name="peft" if kind == "adapter" else "transformers",
        license=licence or None,
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys(["trl", *method])],
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def _what(runs: list[dict[str, Any]], kind: str, data: ModelCardData) -> str:
    base = f"[{data.base_model}](https://huggingface.co/{data.base_model})" if data.base_model else "a local base model"
    revision = runs[-1].get("settings", {}).get("revision") if runs else ""
    base += f" at revision `{revision}`" if revision else ""
    steps = [STEPS[run["step"]] for run in runs[::-1]]
    noun = "An adapter for" if kind == "adapter" else "Made from"
    return f"{noun} {base}" + (f": {', then '.join(steps)}." if steps else ".")


def _use(folder: Path, repo_id: str, kind: str, data: ModelCardData) -> str:
    chat = (folder / "chat_template.jinja").is_file()
    code = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "adapter":
        code = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", ""]
    loader = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
    code += [f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
             f'model = {loader}.from_pretrained("{repo_id}", dtype="auto", device_map="auto")']  # fmt: skip
    if chat:
        code += ['messages = [{"role": "user", "content": "What is the capital of France?"}]',
                 'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",',
                 "                                       return_dict=True).to(model.device)"]  # fmt: skip
    else:
        code += ['inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)']
    code += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))"]
    serve = f"vllm serve {repo_id}"
    if kind == "adapter":
        serve = f"vllm serve {data.base_model or 'BASE'} --enable-lora --lora-modules aligned={repo_id}"
    template = "\n\nThe tokenizer brings the chat template that it was trained with." if chat else ""
    return "## Use\n\n```python\n" + "\n".join(code) + f"\n```\n\n```\n{serve}\n```{template}"


def _training(run: dict[str, Any]) -> str:
    settings, sources, account = run["settings"], run.get("sources", {}), run.get("data", {})
    changed = {
        n: v for n, v in settings.items() if sources.get(n, "default") != "default" and n not in OMITTED_SETTINGS
    }
    revision = settings.get("dataset_revision")
    sets = ", ".join(dataset_names(run)) + (f" at revision `{revision}`" if revision else "")
    title = {"sft": "## Instruction tuning", "dpo": "## Alignment"}[run["step"]]
    lines = [title, ""]
    if run["step"] == "dpo":
        losses = "+".join(settings["loss_type"])
        lines += [f"[DPO](https://arxiv.org/abs/2305.18290) with β = {settings['dpo_beta']} and the {losses} loss."]
    lines += [f"Data: {sets}; {account.get('read', 0):,} rows were read, {account.get('kept', 0):,} kept and "
              f"{account.get('dropped', 0):,} dropped; {account.get('train', 0):,} were trained on and "
              f"{account.get('eval', 0):,} held out."]  # fmt: skip
    plan = run.get("plan", {})
    if plan:
        lines += [f"Base weights: {plan['weights']}, quantization {plan['quantization']}, computed in "
                  f"{plan['computed in']}."]  # fmt: skip
    always = {n: settings[n] for n in ("tuning", "learning_rate", "num_train_epochs", "seed") if n in settings}
    lines += ["", "| setting | value |", "| --- | --- |"]
    lines += [f"| {name} | {_plain(value)} |" for name, value in (always | changed).items()]
    return "\n".join(lines)


def _evaluation(folder: Path, runs: list[dict[str, Any]]) -> str:
    run = next((run for run in runs if run["step"] == "dpo"), {})
    metrics = {n.removeprefix("eval_"): v for n, v in run.get("metrics", {}).items() if n.startswith("eval_")}
    metrics = {n: v for n, v in metrics.items() if n not in ("runtime", "num_tokens") and "per_second" not in n}
    if not metrics:
        return ""
    lines = ["## On held-out pairs", "", "| metric | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    if (folder / "curves.png").is_file():
        lines += ["", "![Training curves](curves.png)"]
    return "\n".join(lines)


def _merge(runs: list[dict[str, Any]]) -> str:
    if not runs or runs[0]["step"] != "merge":
        return ""
    proof, into = runs[0].get("metrics", {}), runs[0].get("merge_base", "original")
    if "kl" not in proof:
        apart = f"{proof.get('layers')} layers differ by {proof.get('relative', 0.0):.1e} at most"
        return f"## Merge\n\nInto the {into} weights; {apart}."
    return (
        f"## Merge\n\nInto the {into} weights. Against the policy as it was trained, on held-out prompts: KL "
        f"{proof['kl']:.2e} nats, same top token {proof['top1']:.2%}, logits differ by {proof['max_abs']:.2e} at most "
        f"and by {proof['mean_abs']:.2e} in the mean."
    )


def _verdicts(runs: list[dict[str, Any]]) -> str:
    """The newest comparison of one of these models with another, where one was made beside the runs."""
    names = {Path(run["folder"]).name for run in runs if run["step"] != "sft"}
    places = {Path(run["folder"]).parent for run in runs}
    records = [read_run(file.parent) for place in places for file in place.glob("[!.]*/run.json")]
    judged = [r for r in records if r.get("step") == "judge" and r.get("status") == "finished"]
    judged.sort(key=lambda record: str(record.get("finished", "")), reverse=True)
    pairs = [(p, r["metrics"]["judge"]) for r in judged for p in r.get("metrics", {}).get("pairs", [])]
    none: dict[str, Any] = {}
    newest, judge = next(((p, judge) for p, judge in pairs if p["candidate"] in names), (none, ""))
    if not newest:
        return ""
    low, high = newest["interval"]
    lines = [
        "## Side by side",
        "",
        f"Against {newest['baseline']}, on the same prompts, judged by {judge}:",
        "",
    ]
    lines += [
        "| win | loss | tie | win rate, a tie being half a win | 95% interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {newest['win']} | {newest['loss']} | {newest['tie']} | {newest['win_rate_adjusted']:.1%} | "
              f"{low:.1%} to {high:.1%} |"]  # fmt: skip
    return "\n".join(lines + (["", *(f"- {note}" for note in newest["notes"])] if newest["notes"] else []))


def _made_with(runs: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items()) if runs else ""
    return f"## Made with\n\n{versions}" if versions else ""


def _plain(value: Any) -> str:
    words = [str(word) for word in (value if isinstance(value, list | tuple) else [value])]
    text = " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
    return " ".join(text.replace("|", "\\|").split())[:200]
