"""What the notebooks share, in eight subpackages. Import from these: `from helpers.data import load_preferences`."""

import importlib.util

if importlib.util.find_spec("tyro") is None:  # the first cell of every notebook needs it
    raise SystemExit(
        "error: the requirements are not installed for this Python. Use .venv/bin/python, or run "
        "`source .venv/bin/activate` first (README, Install)."
    )
