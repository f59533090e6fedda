"""Putting a realised layer in the place of the user's."""

from __future__ import annotations

from torch import nn

_SHAPE = (
    "in_channels",
    "out_channels",
    "in_features",
    "out_features",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
)


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the layer at path `name`; raises AttributeError when there is none.

    A chain or a ghost has no shape of its own. Some networks read a layer's (MobileNetV2 of transformers computes its
    padding from `stride` and `kernel_size`), so they find the replaced layer's on what took its place.
    """
    replaced = model.get_submodule(name)
    for attribute in _SHAPE:
        if hasattr(replaced, attribute) and not hasattr(module, attribute):
            setattr(module, attribute, getattr(replaced, attribute))
    model.set_submodule(name, module)
