"""Run folders: settings, data account, checkpoints, curves and reports of each run."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {
        "run": ["Run", "find_run"],
        "start": ["resumable", "start_run"],
        "checkpoints": ["quoted", "read_run"],
        "curves": ["Curves", "final_metrics", "plot_runs"],
        "report": ["show_report"],
    },
)
