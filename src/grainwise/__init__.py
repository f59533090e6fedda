"""grainwise: learn which compression each layer of a trained PyTorch network takes, at which grain and how hard."""

from importlib import import_module
from typing import Any

# Public names and where they live; resolved on first use, so that the command line starts without torch.
_PUBLIC = {
    "AdaptiveCompression": "adaptive",
    "AdaptiveOptions": "recover.pressure",
    "CompressionProfile": "plan.profile",
    "Data": "evaluate.data",
    "Observer": "api",
    "RecoverOptions": "recover.options",
    "Result": "session",
    "SearchOptions": "api",
    "StudentOptions": "methods.distill",
    "Session": "session",
    "compress": "api",
    "load": "export.artefact",
    "trace": "graph.trace",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"grainwise has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"grainwise.{_PUBLIC[name]}"), name)
