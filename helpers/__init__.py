"""What the notebooks share."""

import importlib.util

if importlib.util.find_spec("tyro") is None:  # which the first cell of every notebook needs
    raise SystemExit(
        "error: the requirements are not installed for this Python: use .venv/bin/python, or "
        "`source .venv/bin/activate` first (README, Install)"
    )
