"""Commands: python -m helpers curves | report | sweep | data. Each prints its own help with --help."""

from __future__ import annotations

import importlib
import sys

from helpers.core import SettingsError, install_error_hook

COMMANDS = {
    "curves": "helpers.runs.curves",
    "report": "helpers.runs.report",
    "sweep": "helpers.runs.sweep",
    "data": "helpers.data.report",
}

if __name__ == "__main__":
    install_error_hook()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in COMMANDS:
        raise SettingsError(f"`python -m helpers {name}` is unknown. Use one of {', '.join(COMMANDS)}.")
    else:
        importlib.import_module(COMMANDS[name]).main(sys.argv[2:])
