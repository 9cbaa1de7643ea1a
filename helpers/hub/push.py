"""Publish a model on the Hub: private by default, named files only, in one commit, with a card made from its runs."""

from __future__ import annotations

import contextlib
import difflib
import html
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from httpx2 import TransportError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tenacity import RetryCallState, Retrying, stop_after_attempt

from helpers.core import REPO, SettingsError, UserError, find_path, is_main_process, printable
from helpers.models.adapters import describe_error, hf_token
from helpers.runs.checkpoints import MODEL_PATTERNS, check_model_folder, find_files
from helpers.runs.report import hide_paths
from helpers.runs.run import (
    STEPS,
    Run,
    dataset_names,
    find_parent,
    is_hub_id,
    lineage,
    list_merges,
    list_runs,
    read_run,
    recorded_variables,
    serve_options,
)
from helpers.settings.secrets import find_paths, find_secrets
from helpers.settings.sources import NAMES

# What a model consists of. Checkpoints, optimizer states, logs, run.json and .env are never sent. Neither is TRL's
# README.md, which names local folders: the card is written from the run.
PUBLISHED = (*MODEL_PATTERNS, "*.tiktoken", "tekken.json", "curves.png", "LICEN[SC]E*", "NOTICE*", "USE_POLICY*")
# What loaders read from the top of a repository. A push replaces those of the model that was there before.
ADAPTER_FILE = re.compile(r"adapter_(model|config)[^/]*")
WEIGHTS_FILE = re.compile(
    r"(model|pytorch_model|consolidated|tf_model|flax_model)[^/]*\.(safetensors|bin|pth|pt|h5|msgpack)(\.index[^/]*json)?"
)
TOKENIZER_FILE = re.compile(
    r"(tokenizer(_config)?|special_tokens_map|added_tokens|chat_template|vocab|generation_config|(pre)?processor_config"
    r"|tekken|params)\.json|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)[^/]*\.model[^/]*|vocab\.\w+|merges\.txt"
    r"|[^/]*\.tiktoken|chat_template\.jinja|chat_templates/[^/]+"
)
RECORDS = ("run.json", "*.jsonl", "*.log")  # not sent, but scanned: a secret in them may have leaked elsewhere too
MAX_TRIES, MAX_RETRY_WAIT = 5, 300.0  # the second in seconds
HUB_ERRORS = (HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError)  # of huggingface_hub 2.4
TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"
CARD_METRICS = {"eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin", "eval_loss": "loss"}


def check_push(settings: Any, folder: Path | None = None) -> None:
    """Check before hours of work that the push at their end can succeed: the token, the license, the repositories, and
    the files of `folder`. `settings` are those of 02_dpo.py or 03_merge_push.py. Raises UserError."""
    api = HfApi(token=hf_token("--push_to_hub"))
    if not is_main_process():
        return
    license_metadata(*license_of(settings))
    has_adapter = getattr(settings, "tuning", "") != "full" and not getattr(settings, "merge_adaptors", False)
    push = getattr(settings, "push", "adapter" if has_adapter else "merged")
    name = settings.hub_repo_id or hub_name(getattr(settings, "run_name", "") or "default")
    names = {name: push == "adapter"} | ({f"{name}-adapter": True} if push == "both" else {})
    try:
        user = with_retries(api.whoami)
        for repo_id, is_adapter in names.items():
            validate_repo_id(repo_id)
            full_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
            _check_access(user, full_id)
            if settings.hub_repo_id:
                with contextlib.suppress(RepositoryNotFoundError):
                    _check_visibility(api, full_id, getattr(settings, "private", True))
                    stale_files(api, full_id, getattr(settings, "hub_revision", ""), is_adapter)
    except HFValidationError as error:
        raise SettingsError(f"--hub_repo_id {settings.hub_repo_id!r} is not a repository's name: {error}") from None
    except HUB_ERRORS as error:
        raise UserError(f"--push_to_hub cannot work: {describe_error(error)}") from None
    if folder:
        prepare_push(folder, name, *license_of(settings))


def _check_access(user: dict[str, Any], repo_id: str) -> None:
    """Raise UserError if the token may not write to `repo_id`, as far as the Hub's answer to whoami says that."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    roles = {user["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in user.get("orgs") or ()}
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    names = {(s.get("entity") or {}).get("name") for s in scopes if "repo.write" in (s.get("permissions") or ())}
    owner, is_limited = repo_id.partition("/")[0], token.get("role") == "fineGrained"
    if token.get("role") == "read" or (is_limited and not names & {owner, repo_id, None}):
        raise UserError(f"Your token may not write to {repo_id}. Set HF_TOKEN to a token with write access to it.")
    if not is_limited and roles.get(owner, "read") == "read":
        mine = " or ".join(name for name, role in roles.items() if role != "read")
        raise UserError(f"Your token cannot write to {repo_id}: it belongs to {mine}. Use another --hub_repo_id.")


def _check_visibility(api: HfApi, repo_id: str, private: bool) -> bool:
    """Whether the repository is private. Raises UserError if it is not, but has to be."""
    is_private = bool(with_retries(lambda: api.model_info(repo_id)).private)
    if private and not is_private:
        raise UserError(f"{repo_id} exists and is public. Use --no_private, or another --hub_repo_id.")
    return is_private


def stale_files(api: HfApi, repo_id: str, revision: str, is_adapter: bool, new: Iterable[str] = ()) -> list[str]:
    """The files of another model in the repository, which loaders would read: weights, indexes and files of a tokenizer
    that are not among the `new` ones. All other files stay, such as those that you added. Raises UserError if a full
    model is pushed to a repository with an adapter, which loaders would apply to it, or the other way round."""
    try:
        names = with_retries(lambda: api.list_repo_files(repo_id, revision=revision or None))
    except RevisionNotFoundError:  # a new branch begins with the files of main
        names = with_retries(lambda: api.list_repo_files(repo_id))
    adapters, weights = filter(ADAPTER_FILE.fullmatch, names), filter(WEIGHTS_FILE.fullmatch, names)
    if any(weights if is_adapter else adapters):
        there, pushed = ("a full model", "an adapter") if is_adapter else ("an adapter", "a full model")
        raise UserError(f"{repo_id} has {there}. Use another --hub_repo_id for {pushed}.")
    stale = (ADAPTER_FILE, WEIGHTS_FILE, TOKENIZER_FILE)
    return [name for name in names if name not in new and any(pattern.fullmatch(name) for pattern in stale)]


def push_before_merge(settings: Any, folder: Path) -> bool:
    """Before a merge: preview the push (`--dry_run`), or publish the adapter in `folder` (`--push adapter`), or check
    that the later push can work. Returns whether the adapter was published, so that there is nothing to merge."""
    if settings.push_to_hub and settings.dry_run:
        preview_push(settings, folder)
    elif settings.push_to_hub and settings.push == "adapter":
        push_model(folder, settings)
        return True
    elif settings.push_to_hub:
        check_push(settings, folder if settings.push == "both" else None)
    return False


def push_model(folder: Path, settings: Any) -> None:
    """Publish a folder as the settings of 03_merge_push.py ask. `--push both` also publishes the adapter that a merge
    started from, as `<hub_repo_id>-adapter`. Raises UserError."""
    name, adapter = settings.hub_repo_id or hub_name(folder.name), find_parent(folder, read_run(folder))
    repositories = {name: folder} | ({f"{name}-adapter": adapter} if settings.push == "both" and adapter else {})
    for repo_id, source in repositories.items():
        branch = {"revision": settings.hub_revision, "tag": settings.hub_tag}
        push_folder(source, repo_id, settings.private, *license_of(settings), **branch)


def preview_push(settings: Any, folder: Path) -> None:
    """Print the files and the card that a push of the run in `folder` would send."""
    folders = [folder] if settings.push != "merged" else []
    if settings.push != "adapter":
        merges = [run.folder for run in list_merges(folder, settings.output_dir) if run.finished]
        folders += merges[:1]
        if not merges:
            print(f"{folder.name} is not merged yet. Run the same command without --push_to_hub and --dry_run first.")
    for source in folders:
        suffix = "-adapter" if settings.push == "both" and source == folder else ""
        repo_id = (settings.hub_repo_id or hub_name(folders[-1].name)) + suffix  # both are named after the merge
        print(f"Would push {source.name} to {repo_id}:")
        print(printable(f"\n{prepare_push(source, repo_id, *license_of(settings))[1]}"))


def merge_and_push(run: Run, settings: Any) -> None:
    """Run 03_merge_push.py in a new process for a finished DPO run, if the settings of 02_dpo.py ask for it. An adapter
    is pushed unmerged without `--merge_adaptors`; a fully tuned model is pushed as it is. Raises UserError."""
    is_merged = settings.merge_adaptors and run.is_adapter
    if settings.merge_adaptors and not is_merged and is_main_process():
        print(f"{run.name} was fully tuned: there is no adapter to merge.")
    if not is_main_process() or not (is_merged or settings.push_to_hub):
        return
    flags = {"run": run.folder, "push": "merged" if is_merged else "adapter"}
    flags |= {n: getattr(settings, n) for n in ("output_dir", "push_to_hub")}
    flags |= {n: value for n in ("hub_repo_id", "trust_remote_code", "recipe") if (value := getattr(settings, n))}
    command = [sys.executable, str(REPO / "notebooks" / "03_merge_push.py"), *(f"--{k}={v}" for k, v in flags.items())]
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if status := subprocess.run(command, env={k: v for k, v in os.environ.items() if k not in launcher}).returncode:
        raise UserError(f"03_merge_push.py failed with status {status}. See its messages above.")


def prepare_push(folder: Path, repo_id: str, *license: str) -> tuple[list[Path], str]:
    """Return the files that a push would send and the text of the card; print each file with its size. `license` is as
    for `license_metadata`; without one, it is the base model's. Raises UserError if there are no weights, a finished
    run's files have changed, the base is a local folder, or a file contains a secret or a local path."""
    if read_run(folder) or not (folder / "run.json").is_file():  # a broken run.json is only scanned
        check_model_folder(folder)
    files, local = find_files(folder, PUBLISHED), _base_of_adapter(folder)
    if Path(local).is_absolute() or find_path(local):
        base = f"The base model of {folder.name} is a local folder, which others do not have."
        raise UserError(f"{base} Push the merged model (`--push merged`).")
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{folder.name} has no weights to push.")
    card = write_card(folder, repo_id, *(license if any(license[:1]) else _base_license(folder)))
    if secrets := find_secrets([*files, *find_files(folder, RECORDS)], card):
        raise UserError(f"Nothing was pushed: {'; '.join(secrets)}. Remove it, revoke it, and create a new one.")
    if paths := find_paths(files, card):
        raise UserError(f"Nothing was pushed: {', '.join(paths)} contains a local path. Remove it.")
    sizes = {file.name: file.stat().st_size for file in files} | {"README.md": len(card.encode())}
    for name, size in sizes.items():
        print(f"{size / 1e6:10,.3f} MB  {name}")
    return files, card


def _base_license(folder: Path) -> tuple[str, ...]:
    """The license in the card of the base model on the Hub, with its name and link; one that the Hub does not know is
    "other". () if there is none."""
    base = base_on_hub(folder, lineage(folder))
    card: Any = None
    with contextlib.suppress(*HUB_ERRORS):
        card = HfApi().model_info(base).card_data if base else None
    stated = card.get("license") if card else None
    if not stated:
        return ()
    license_id = str(stated[0] if isinstance(stated, list) and len(stated) == 1 else stated)
    name, link = str(card.get("license_name") or f"license of {base}"), str(card.get("license_link") or "")
    link = link if re.match("https?://", link) else f"https://huggingface.co/{base}"  # or a file of its repository
    try:
        license_metadata(license_id, name, link)
    except SettingsError:
        return "other", license_id, link
    return license_id, name, link


def push_folder(folder: Path, repo_id: str, private: bool, *license: str, revision: str = "", tag: str = "") -> None:
    """Upload the files of a model and its card in one commit, which deletes those of the model that was there before.
    Files that the Hub already has are not sent again. `license` is as for `prepare_push`; `repo_id` defaults to the
    folder's name. An existing repository keeps its visibility; a public one is refused if `private`. `revision` is a
    branch, created if needed; `tag` names the commit. Raises UserError."""
    repo_id = repo_id or hub_name(folder.name)
    api = HfApi(token=hf_token(f"pushing to {repo_id}"))
    files, card = prepare_push(folder, repo_id, *license)
    try:
        repo_id = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        is_private = _check_visibility(api, repo_id, private)
        is_adapter = (folder / "adapter_config.json").is_file()
        stale = stale_files(api, repo_id, revision, is_adapter, {file.name for file in files})
        if revision:
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        print(f"Pushing {len(files) + 1} files to {repo_id} ({'private' if is_private else 'public'}).")
        if stale:
            print(printable(f"Deleting {len(stale)} files of the model that was there: {', '.join(stale)}."))
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(file.name, file) for file in files]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        options: dict[str, Any] = dict(commit_message=f"Upload {folder.name}", revision=revision or None)
        commit = with_retries(lambda: api.create_commit(repo_id, operations, **options))
        if tag:
            with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True))
    except HUB_ERRORS as error:
        raise UserError(f"pushing to {repo_id} failed: {describe_error(error)}") from None
    print(f"Pushed: {api.endpoint}/{repo_id} is {'private' if is_private else 'public'}.")
    if is_private and not private:
        print("The repository existed and stays private. Change its visibility on its settings page on the Hub.")


def hub_name(name: str) -> str:
    """A folder's name as the Hub accepts names of repositories."""
    return re.sub(r"[^A-Za-z0-9._]+|\.{2,}", "-", name)[:80].strip("-.") or "model"


def with_retries(call: Callable[[], Any]) -> Any:
    """Call the Hub, up to 5 times if it is busy (429), fails (5xx) or hangs up. A longer Retry-After is an error."""
    return Retrying(
        retry=lambda state: _retry_wait(state) <= MAX_RETRY_WAIT,
        wait=_retry_wait,
        stop=stop_after_attempt(MAX_TRIES),
        before_sleep=lambda state: print(f"The Hub is busy or unreachable. Retrying in {_retry_wait(state):.0f} s."),
        reraise=True,
    )(call)


def _retry_wait(state: RetryCallState) -> float:
    """Seconds until the next try; infinite if another try cannot help."""
    error = state.outcome.exception() if state.outcome else None
    error = error.__cause__ if isinstance(error, RuntimeError) else error  # how an upload fails
    response = error.response if isinstance(error, HfHubHTTPError) else None
    is_busy = response is not None and (response.status_code == 429 or response.status_code >= 500)
    if not is_busy and not isinstance(error, TransportError):
        return math.inf
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else 2.0 ** (state.attempt_number - 1)


def license_of(settings: Any) -> list[str]:
    """The settings about the license, which 02_dpo.py does not have."""
    return [getattr(settings, name, "") for name in ("license", "license_name", "license_link")]


def license_metadata(license_id: str = "", license_name: str = "", license_link: str = "") -> dict[str, Any]:
    """The fields of a card about a license, with the Hub's id for it: apache-2.0 for "Apache 2.0". Raises SettingsError
    for a license that is not among https://huggingface.co/docs/hub/repositories-licenses."""
    if not license_id:
        return {}
    ids = TEMPLATE.with_name("licenses.txt").read_text().split()
    key, keys = _license_key(license_id), {_license_key(each): each for each in ids}
    starts = [keys[each] for each in keys if key and each.startswith(key)]
    known = keys.get(key) or (starts[0] if len(starts) == 1 else "")
    if not known:
        near = keys[difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]]
        fix = f"Use the nearest, {near}, or other with --license_name and --license_link"
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


def markdown(value: Any) -> str:
    """A name or a text of others for a card: one line, without folders of this machine, that shows as it is."""
    text = re.sub(r"\b[A-Za-z]:[\\/](?:[^\\/|<>]+[\\/])*", "", hide_paths(" ".join(str(value).split())))
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(text, quote=False))


def write_card(folder: Path, repo_id: str, *license: str) -> str:
    """Return the card of a run's folder, or of an adapter from elsewhere. Raises UserError if the Hub rejects it."""
    runs = lineage(folder)
    if runs and (gone := runs[-1]["parent_gone"]):
        print(f"note: {gone}, which {Path(runs[-1]['folder']).name} started from, is gone. The card does not show it.")
    kind = "merge" if read_run(folder).get("step") == "merge" else "finetune"  # the Hub's `base_model_relation`
    kind = "adapter" if (folder / "adapter_config.json").is_file() else kind
    dpo: dict[str, Any] = next((run for run in runs if run["step"] == "dpo"), {})
    variables = recorded_variables(runs)
    base = base_on_hub(folder, runs)
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
    data = ModelCardData(
        base_model=base or None, base_model_relation=kind if base else None,
        datasets=list(dict.fromkeys(datasets)) or None, library_name="peft" if kind == "adapter" else "transformers",
        **license_metadata(*license), pipeline_tag="text-generation", tags=[*dict.fromkeys(["trl", *methods])],
        model_name=repo_id.rpartition("/")[2], eval_results=results or None,
    )  # fmt: skip
    try:
        card = ModelCard.from_template(
            data, template_path=str(TEMPLATE), repo_id=repo_id, kind=kind, runs=runs, dpo=dpo, step_names=STEPS,
            files={file.name for file in folder.iterdir()}, comparison=_newest_comparison(runs), md=markdown,
            dataset_names=dataset_names, settings_table=_settings_table,
            variables=variables, serve_options=serve_options(variables),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"The card of {repo_id} is not valid for the Hub: {error}") from None
    return f"{card}\n"


def _base_of_adapter(folder: Path) -> str:
    """The base that an adapter's config names; "" without one."""
    file = folder / "adapter_config.json"
    return str(json.loads(file.read_text())["base_model_name_or_path"] or "") if file.is_file() else ""


def base_on_hub(folder: Path, runs: list[dict[str, Any]]) -> str:
    """Hub id of the model at the root of the lineage; "" for a local folder."""
    base = str(runs[-1]["base_model"] if runs else "") or _base_of_adapter(folder)
    is_local = bool(runs and runs[-1].get("base_folder")) or find_path(base)
    return "" if not base or is_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else base


def _settings_table(run: dict[str, Any]) -> dict[str, str]:
    """Four settings of a run and those that differ from the defaults."""
    settings, sources, omitted = run["settings"], run.get("sources", {}), str(NAMES["not_on_card"]).split()
    names = [name for name in ("tuning", "learning_rate", "num_train_epochs", "seed") if name in settings]
    names += [n for n in settings if sources.get(n, "default") != "default" and n not in {*omitted, *names}]
    values = {name: settings[name] if isinstance(settings[name], list | tuple) else [settings[name]] for name in names}
    return {name: " ".join(map(str, value))[:200] for name, value in values.items()}


def _newest_comparison(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Result of the newest finished pairwise run of 05_judge.py with the first run, or what it merges, as candidate."""
    published = runs[: 1 + (runs[0]["step"] == "merge")] if runs else []
    own = [Run(Path(run["folder"]), run) for run in published if run["step"] != "sft"]
    judged = [run for run in list_runs(Path(runs[0]["folder"]).parent, "judge") if run.finished] if runs else []
    pairs = [(run, pair) for run in judged for pair in run.record["metrics"].get("pairs", [])]
    found = next(((run, pair) for run, pair in pairs if run.matches_model(pair["candidate"], own)), None)
    if found is None:
        return None
    run, pair = found
    return {"notes": [], **pair, "judge": run.record["metrics"]["judge"], "loading": run.loading}
