"""Merging and publishing at the end of 02_dpo.py: 03_merge_push.py in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from helpers.errors import UserError
from helpers.paths import REPO
from helpers.processes import is_main_process

if TYPE_CHECKING:
    from helpers.runs import Run


def merge_and_push(run: Run, settings: Any) -> None:
    """Do for a DPO run what 03_merge_push.py does, in a process of its own: merge, push, or both, as its settings ask.

    What there is to push goes out as it is where merging is not asked for, or where nothing is to be merged.
    Raises UserError where it fails; what it says is on the screen.
    """
    if not is_main_process() or not (settings.merge_adaptors or settings.push_to_hub):
        return
    if settings.merge_adaptors and not run.is_adapter:
        print(f"{run.name} was tuned in full: there is nothing to merge.")
    flags = {
        "run": run.folder,
        "output_dir": settings.output_dir,
        "what": "merged" if settings.merge_adaptors and run.is_adapter else "adapter",
        "push_to_hub": settings.push_to_hub,
        "hub_repo_id": settings.hub_repo_id,
        "trust_remote_code": settings.trust_remote_code,
    }
    if flags["what"] == "adapter" and not settings.push_to_hub:
        return
    words = [sys.executable, str(REPO / "notebooks" / "03_merge_push.py"), *(f"--{k}={v}" for k, v in flags.items())]
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    status = subprocess.run(words, env={k: v for k, v in os.environ.items() if k not in launcher}).returncode
    if status:
        raise UserError(f"03_merge_push.py stopped with status {status}: what it says stands above")
