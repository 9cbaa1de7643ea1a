"""Commands of this package. Each prints its own help with --help.

python -m helpers curves RUN ...        curves of one or several runs in one figure
python -m helpers report RUN ...        write report.html of a run
python -m helpers sweep NOTEBOOK ...    run a notebook once for each value of a setting
python -m helpers data ...              what a dataset will teach, without training on it
python -m helpers accept RUN            use files of a finished run that were changed on purpose
"""

from __future__ import annotations

import importlib
import inspect
import sys

from helpers.core import SettingsError, install_error_hook
from helpers.settings.secrets import refuse_secrets
from helpers.settings.sources import read_dotenv

COMMANDS = {
    "curves": "helpers.runs.curves",
    "report": "helpers.runs.report",
    "sweep": "helpers.runs.start",
    "data": "helpers.data.report",
    "accept": "helpers.runs.checkpoints",
}

if __name__ == "__main__":
    install_error_hook()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in COMMANDS:
        raise SettingsError(f"`python -m helpers {name}` is not a command. Use one of {', '.join(COMMANDS)}.")
    else:
        refuse_secrets("the command line", sys.argv[2:])
        asks_help = bool({"-h", "--help"} & set(sys.argv[2:]))
        if not asks_help:
            read_dotenv()  # before libraries are imported, which read its HF_ENDPOINT
        command = importlib.import_module(COMMANDS[name]).main
        if asks_help and name != "data":  # which lists its settings itself
            print(inspect.cleandoc(command.__doc__))
        else:
            command(sys.argv[2:])
