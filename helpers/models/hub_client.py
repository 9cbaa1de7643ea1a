"""The Hub: whether it can be reached, what its errors mean, and the token."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import re
import sys
from typing import Any

from helpers.core import UserError, is_notebook

HUB_STATUS = {
    401: "the Hub does not accept your token (401). Set a valid HF_TOKEN, or unset it for public repositories",
    403: "your token may not do that (403). Set HF_TOKEN to a token with this permission",
    404: "it is not on the Hub, or your token may not see it (404)",
    429: "the Hub asks to slow down (429). Run the same command again in a few minutes",
}


@functools.cache
def check_hub() -> None:
    """Ask the Hub once whether it can be reached; if not, use its cache only, and say so.

    Its clients would retry for every file, 24 seconds each in huggingface_hub 2.4.
    """
    import httpx2 as httpx  # the HTTP client of huggingface_hub
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError):
        constants.HF_HUB_OFFLINE = True
        if datasets := sys.modules.get("datasets"):
            datasets.config.HF_HUB_OFFLINE = True
        print("The Hub cannot be reached: only its cache is used. HF_HUB_OFFLINE=1 skips this check.", file=sys.stderr)
    except httpx.HTTPError:  # slow or busy: the retries of huggingface_hub handle it
        pass


def describe_error(error: BaseException) -> str:
    """One line on an error of the Hub's client and its fix. For other errors, their own message."""
    from huggingface_hub import errors

    chain: list[Any] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {kind for e in chain for kind in type(e).__mro__}
    message = " ".join(str(error).split())[:300]
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), 0)
    lines = [line for e in chain for line in str(getattr(e, "server_message", "") or e).splitlines()]
    quota = next((line for line in lines if re.search(r"storage|quota", line, re.IGNORECASE)), "")
    if errors.RepositoryNotFoundError in kinds:
        return HUB_STATUS[404]  # without a token, the Hub answers 401 for a repository that does not exist
    if kinds & {errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError}:
        return message
    if status in (402, 403, 413) and quota:
        return f"the account's storage is full ({' '.join(quota.split())[:200]}). Free some, or use another account"
    if status >= 500:
        return f"the Hub fails ({status}). Run the same command again later"
    if status in HUB_STATUS:
        return HUB_STATUS[status]
    if kinds & {errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled}:
        if os.environ.get("HF_HUB_OFFLINE"):
            return "it is not in the cache, and HF_HUB_OFFLINE is set. Unset it once, or use a local folder"
        return "it is not in the cache, and the Hub cannot be reached. Connect, or use a local folder"
    return message


def hf_token(purpose: str) -> str:
    """The Hub token from HF_TOKEN, .env or `hf auth login`, or typed by the user if there is a terminal.

    Raises UserError if there is none. `purpose` begins the message, as in "pushing to me/model".
    """
    from huggingface_hub import get_token

    token = get_token() or ""
    is_interactive = is_notebook() or (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty())
    if not token and is_interactive and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with contextlib.suppress(EOFError, RuntimeError, KeyboardInterrupt):  # RuntimeError: a kernel without stdin
            token = getpass.getpass("HF_TOKEN (not shown; press Enter to continue without): ").strip()
    if not token:
        raise UserError(f"{purpose} needs a Hub token. Set HF_TOKEN in the environment or in .env, or `hf auth login`")
    return token
