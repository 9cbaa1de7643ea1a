"""Models: how they are loaded, their chat templates, and the memory that training takes."""

from helpers.core import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "adapters": ["load_adapter", "save_model"],
        "plan": ["lora_module_args", "plan_model", "prepare_model"],
        "chat": ["read_template", "set_chat_template"],
        "memory": ["estimate_memory"],
        "resolve": ["load_tokenizer", "resolve_adapter", "resolve_models", "resolve_start"],
    },
)
