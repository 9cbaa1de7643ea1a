"""python -m recipes.demo [FOLDER]: write the demo's model, data and questions."""

import sys
from pathlib import Path

from helpers.core import short_path, writable_output
from recipes.demo import write_demo

if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else writable_output("outputs/demo")
    if write_demo(target):
        print(f"Wrote a random tiny Mistral, its data and held-out questions to {short_path(target)}.")
