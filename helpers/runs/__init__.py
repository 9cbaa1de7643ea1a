"""Run folders: settings, row report, checkpoints, curves and reports of each run."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "run": ["Run", "find_run"],
        "start": ["resumable", "start_run"],
        "checkpoints": ["read_run", "shell_quote"],
        "curves": ["Curves", "final_metrics", "plot_runs"],
        "report": ["show_report"],
    },
)
