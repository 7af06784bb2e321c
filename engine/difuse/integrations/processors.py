"""diffusers' attention processors: which one a module has, and whether the user chose another attention."""
import sys


def other_processor(attn, expected):
    """Why this attention is not the default one, computed by the processor class `expected`, or None."""
    processor = attn.processor
    if type(processor).__name__ != expected or not type(processor).__module__.startswith("diffusers."):
        return f"its processor is {type(processor).__name__}, not {expected}"
    if getattr(processor, "_attention_backend", None) is not None:
        return f"the attention backend {processor._attention_backend} was set on it"
    if getattr(processor, "_parallel_config", None) is not None:
        return "it runs in parallel over several devices"
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:  # nothing that chooses between backends was imported
        return None
    active = dispatch._AttentionBackendRegistry._active_backend
    if active != dispatch.AttentionBackendName.NATIVE:
        return f"diffusers' active attention backend is {active}"
    return None
