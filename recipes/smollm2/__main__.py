"""python -m recipes.smollm2 [FOLDER]: write SmolLM2-135M-Instruct, unless it is there already."""

import sys
from pathlib import Path

from helpers.core import REPO, install_error_hook, short_path
from recipes.smollm2 import FOLDER, write_real_model

if __name__ == "__main__":
    install_error_hook()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / FOLDER
    done = "Wrote" if write_real_model(target) else "Nothing to do: there is"
    print(f"{done} {short_path(target)}.")
