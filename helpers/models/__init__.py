"""Models: how they are loaded, their chat templates, and the memory that training takes."""

from helpers.core import lazy_door

__all__, __getattr__ = lazy_door(
    __name__,
    {
        "plan": ["plan_model"],
    },
)
