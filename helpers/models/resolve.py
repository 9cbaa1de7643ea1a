"""What a name means: a model or an adapter, in a folder, on the Hub or behind an endpoint, and what it started from."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from helpers.core import UserError, describe_error, find_path, fingerprint
from helpers.runs.run import find_run, read_run
from helpers.settings.credentials import hf_token

BASE_KEEPING_INITS = ("gaussian", "orthogonal", "eva")  # ways to begin an adapter that leave its base as it is
# What must stand beside a configuration, for a folder to be a model or an adapter.
WEIGHT_PATTERNS = {
    "config.json": ("*.safetensors", "pytorch_model*.bin"),
    "adapter_config.json": ("adapter_model.safetensors", "adapter_model.bin"),
}


def resolve_model(model_id: str, revision: str = "", file: str = "config.json") -> str:
    """The path of a local folder as one can open it from here, or the Hub id as it is.

    Raises UserError where neither has `file`, before anything large is fetched. A gated model asks for a token.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    path = find_path(model_id)
    if path and (path / file).is_file():
        if lacking := missing_weights(path, file):
            raise UserError(f"{model_id!r} {lacking}")
        return str(path)
    try:
        if path:
            raise FileNotFoundError(f"the folder has no {file}")
        if not try_to_load_from_cache(model_id, file, revision=revision or None):
            _ask_for_the_hub()
        try:
            hf_hub_download(model_id, file, revision=revision or None)
        except GatedRepoError:
            os.environ["HF_TOKEN"] = hf_token(
                f"{model_id} is gated (its page asks to accept its terms), and reading it"
            )
            hf_hub_download(model_id, file, revision=revision or None)
    except HFValidationError:
        raise UserError(f"{model_id!r} is neither a folder here nor a Hub id") from None
    except GatedRepoError:
        raise UserError(f"{model_id} is gated, and your token may not read it: accept its terms on its page") from None
    except (OSError, HfHubHTTPError) as error:
        raise UserError(f"{model_id!r} cannot be loaded: {describe_error(error)}") from None
    return model_id


def missing_weights(folder: Path, file: str = "config.json") -> str:
    """What of the weights beside `file` is not there, as "has ... and no weights"; "" where nothing is missing."""
    weights = WEIGHT_PATTERNS.get(file, ("*",))
    if not any(True for pattern in weights for _ in folder.glob(pattern)):
        return f"has a {file} and no weights ({' or '.join(weights)})"
    for index in folder.glob("*.index.json"):
        names = set(json.loads(index.read_text()).get("weight_map", {}).values())
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            return f"lacks {', '.join(missing)}, which its {index.name} names"
    return ""


def _ask_for_the_hub() -> None:
    """Raise LocalEntryNotFoundError where the Hub cannot be reached: huggingface_hub 2.4 asks for a file six times,
    for 24 seconds, before it says so."""
    import httpx2 as httpx  # what huggingface_hub speaks through
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise LocalEntryNotFoundError("the Hub cannot be reached") from error
    except httpx.HTTPError:  # it is there, and slow or busy: huggingface_hub asks it again
        pass


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """A model that answers: a whole one, an adapter on its base, or the model `base` behind an endpoint.

    `revision` is the base's; "" means main. `changes_base`: the adapter takes a part of the base into itself when it is
    loaded, so that the base is another once it is taken off.
    """

    name: str
    base: str
    adapter: str | None = None
    revision: str = ""
    changes_base: bool = False
    base_url: str = ""

    @property
    def fingerprint(self) -> str:
        """Another one for other weights, of a run (wherever it is kept) or a folder; a Hub id and an endpoint's model
        are what they are."""
        parts: list[object] = [self.revision]  # a server may have another address tomorrow
        for name in (self.base, self.adapter or ""):
            folder = None if self.base_url else find_path(name)
            files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) if folder else []
            known = folder and read_run(folder).get("fingerprint")
            parts.append(known or [name, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)])
        return fingerprint(parts)

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer is: an adapter from elsewhere may have come without one."""
        folder = find_path(self.adapter or "")
        return self.adapter if self.adapter and folder and (folder / "tokenizer_config.json").is_file() else self.base


def find_adapter(name: str, base_model_id: str | None = None) -> ModelRef:
    """An adapter, in a folder or on the Hub, and the base that it names. Raises UserError where it is none.

    `base_model_id` is the setting that names another base, which may be ""; None where there is no such setting.
    """
    from peft import PeftConfig

    try:
        adapter = resolve_model(name, file="adapter_config.json")
    except UserError as error:
        raise UserError(f"there is no adapter to merge: {error}") from None
    config = PeftConfig.from_pretrained(adapter)
    revision = "" if base_model_id else config.revision or ""
    start = getattr(config, "init_lora_weights", True)
    try:
        base = resolve_model(base_model_id or str(config.base_model_name_or_path), revision)
    except UserError as error:
        mend = "bring it back, or make that run again" if base_model_id is None else "--base_model_id names another"
        raise UserError(f"the base of the adapter in {name!r}: {error}; {mend}") from None
    return ModelRef(
        Path(name).name, base, adapter, revision, not isinstance(start, bool) and start not in BASE_KEEPING_INITS
    )


def resolve_models(names: tuple[str, ...], output_dir: Path, base_url: str = "") -> list[ModelRef]:
    """What each of `names` means: a run, an adapter, a model, "latest"; what it started from stands before it.

    NAME@http://... is the model NAME behind that endpoint; with `base_url` every name is one behind it.
    """
    found: list[ModelRef] = []
    for name in names:
        model, at, url = (name, "@", base_url) if base_url else name.partition("@http")
        if at:
            url = base_url or f"http{url}"
            found.append(ModelRef(Path(model).name, model, base_url=url))
            continue
        folder = find_run(output_dir, "latest", "dpo").folder if name == "latest" else find_path(name)
        folder = folder or find_path(str(output_dir / name))
        if folder is None:
            if _is_adapter_on_hub(name):
                me = find_adapter(name)
                found += [dataclasses.replace(me, name=Path(me.base).name, adapter=None, changes_base=False), me]
            else:
                found.append(ModelRef(Path(name).name, name))
            continue
        parent = Path(read_run(folder).get("parent_folder") or "")
        if (folder / "adapter_config.json").is_file():
            me = dataclasses.replace(find_adapter(str(folder)), name=folder.name)
            if (parent / "adapter_config.json").is_file():
                found.append(dataclasses.replace(me, name=parent.name, adapter=str(parent), changes_base=False))
            else:
                found.append(dataclasses.replace(me, name=Path(me.base).name, adapter=None, changes_base=False))
            found.append(me)
        elif parent.name and (parent / "config.json").is_file():
            found += [ModelRef(parent.name, str(parent)), ModelRef(folder.name, str(folder))]
        else:
            found.append(ModelRef(folder.name, str(folder)))
    found = _once(found)
    names_so_far = [c.name for c in found]
    if "tie" in names_so_far:
        raise UserError("a model called 'tie' cannot win: give its folder another name")
    return [  # two models of one name are told apart
        dataclasses.replace(c, name=f"{c.name} ({names_so_far[: i + 1].count(c.name)})")
        if names_so_far.count(c.name) > 1
        else c
        for i, c in enumerate(found)
    ]


def _once(found: list[ModelRef]) -> list[ModelRef]:
    """Each model once, under the first name that it has."""
    seen: dict[tuple[str, str | None, str, str], ModelRef] = {}
    for candidate in found:
        seen.setdefault((candidate.base, candidate.adapter, candidate.revision, candidate.base_url), candidate)
    return list(seen.values())


def _is_adapter_on_hub(name: str) -> bool:
    """Whether a Hub id is an adapter's; where that cannot be found out, loading it will say why."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if cached := try_to_load_from_cache(name, "adapter_config.json"):
            return isinstance(cached, str)
        return any(file.rfilename == "adapter_config.json" for file in HfApi().model_info(name).siblings or ())
    except Exception:  # whatever it is: no such repository, no network, not a Hub id
        return False
