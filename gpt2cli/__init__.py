"""gpt2: one command from a text file to a trained GPT-2 that every other tool can load.

>>> from gpt2cli import GPT, GPTConfig, DataLoaderLite

Names load on first use, so that `import gpt2cli` and `gpt2 --help` do not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2cli.complete import complete
    from gpt2cli.config import GPTConfig, SamplingConfig, TrainConfig
    from gpt2cli.convert import convert
    from gpt2cli.data import DataLoaderLite
    from gpt2cli.errors import UserError
    from gpt2cli.generate import generate
    from gpt2cli.linear import prepare
    from gpt2cli.model import GPT
    from gpt2cli.plan import make_plan
    from gpt2cli.tokenizer import Encoding
    from gpt2cli.train import train

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "DataLoaderLite",
    "Encoding",
    "GPTConfig",
    "SamplingConfig",
    "TrainConfig",
    "UserError",
    "complete",
    "convert",
    "generate",
    "make_plan",
    "prepare",
    "train",
]

_ROOM_OF = {
    "GPT": "model",
    "DataLoaderLite": "data",
    "Encoding": "tokenizer",
    "GPTConfig": "config",
    "SamplingConfig": "config",
    "TrainConfig": "config",
    "UserError": "errors",
    "complete": "complete",
    "convert": "convert",
    "generate": "generate",
    "prepare": "linear",
    "make_plan": "plan",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'gpt2cli' has no attribute {name!r}")
    value = getattr(import_module(f"gpt2cli.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing the room `gpt2cli.train` would bind the module here and hide the function `train` named after it.
        if not (name in _ROOM_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
