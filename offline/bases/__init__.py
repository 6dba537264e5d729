"""Dense quantizers behind one interface: :class:`~.base.Base` says what one needs and what it returns."""

from .base import Base, DenseLayer
from .rtn import Rtn
from .squeezellm import SqueezeLLM

__all__ = ["BASES", "Base", "DenseLayer", "Rtn", "SqueezeLLM"]

BASES: dict[str, type[Base]] = {"rtn": Rtn, "squeezellm": SqueezeLLM}
