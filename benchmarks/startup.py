"""Measure how fast the command line answers, compared with `trl dpo`: CPU seconds, median of alternating starts.

python benchmarks/startup.py [ROUNDS]
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
NOTEBOOK = str(REPO / "notebooks" / "02_dpo.py")
TRL = "import sys; from trl.cli import main; sys.argv[0] = 'trl'; main()"
COMMANDS = {
    "02_dpo.py --help": ([NOTEBOOK, "--help"], 0),
    "02_dpo.py --dpo_bata 0.1": ([NOTEBOOK, "--dpo_bata", "0.1"], 2),
    "02_dpo.py --max_grad_nrom 1 (a TRL field)": ([NOTEBOOK, "--max_grad_nrom", "1"], 2),
    "trl dpo --help": (["-c", TRL, "dpo", "--help"], 0),
}


def cpu_seconds(words: list[str], status: int) -> float:
    """User and system time of one start, including child processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, env=os.environ | {"COLUMNS": "120"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        raise SystemExit(f"{words} exited with {done.returncode}: {done.stderr.decode()[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, (words, status) in COMMANDS.items():
            times[name].append(cpu_seconds(words, status))
    slowest = statistics.median(times["trl dpo --help"])
    print(f"CPU seconds, median of {rounds}, Python {platform.python_version()}, {os.cpu_count()} cores")
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:44} {middle:6.2f}   ({min(values):.2f} to {max(values):.2f})   {slowest / middle:5.1f}x")
    results = REPO / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "startup.json").write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
