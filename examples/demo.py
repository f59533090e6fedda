"""What `make demo` compresses: ResNet-20 on CIFAR-10, or a small Fashion-MNIST network where CIFAR-10 cannot be had."""

from __future__ import annotations

import sys
from functools import cache

from torch import nn

from examples import cifar10, fashion, resnet20
from examples.cache import Unavailable
from grainwise import Data


@cache
def _cifar10_is_here() -> bool:
    try:
        cifar10.load()
    except Unavailable as error:
        print(f"{error}\nGoing on with the small Fashion-MNIST network that ships here.", file=sys.stderr)
        return False
    return True


def model() -> nn.Module:
    return resnet20.pretrained() if _cifar10_is_here() else fashion.pretrained()


def data() -> Data:
    return cifar10.splits() if _cifar10_is_here() else fashion.splits()
