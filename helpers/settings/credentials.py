"""Tokens: where they come from. They go to the client that needs them, and nowhere else."""

from __future__ import annotations

import getpass
import os
import sys

from helpers.core import SettingsError, UserError, is_notebook


def hf_token(needed_for: str) -> str:
    """The Hub token, from HF_TOKEN, .env or `hf auth login`; asked for only where someone can answer.

    Raises UserError, in one line, where nobody can.
    """
    from huggingface_hub import get_token

    token = get_token() or _prompt_for("HF_TOKEN")
    if not token:
        raise UserError(
            f"{needed_for} needs a Hub token: set HF_TOKEN in the environment or in .env, or `hf auth login`"
        )
    return token


def prepare_tracker(report_to: str, project: str) -> None:
    """Settle the tracker before a model is loaded for it: raises SettingsError where it is unknown or not installed.

    wandb is settled before its client can stop and ask: with a key online, without one offline, said in one line.
    """
    if report_to == "none":
        return
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()  # looks whether its package is there
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingsError(f"--report_to {report_to}: {' '.join(str(error).split())}") from None
    if report_to not in ("wandb", "all"):
        return
    if project:
        os.environ["WANDB_PROJECT"] = project
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or _has_wandb_key():
        return
    if key := _prompt_for("WANDB_API_KEY"):
        os.environ["WANDB_API_KEY"] = key
        return
    os.environ["WANDB_MODE"] = "offline"
    print(
        "wandb: no WANDB_API_KEY in the environment or .env, so this run is kept offline (wandb sync sends it later)."
    )


def _has_wandb_key() -> bool:
    import netrc
    from urllib.parse import urlparse

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    home = os.path.expanduser("~")
    for file in (os.environ.get("NETRC"), os.path.join(home, ".netrc"), os.path.join(home, "_netrc")):
        try:
            if file and netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _prompt_for(name: str) -> str:
    """The token typed by a person, or "" where there is nobody: no terminal, or a kernel without stdin."""
    if not is_notebook() and not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return ""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return ""
    try:
        return getpass.getpass(f"{name} (not shown; empty to go without): ").strip()
    except (EOFError, RuntimeError, KeyboardInterrupt):  # ipykernel's StdinNotImplementedError is a RuntimeError
        return ""
