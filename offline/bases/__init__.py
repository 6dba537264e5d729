"""Dense quantizers behind one interface: :class:`~.base.Base` says what one needs and what it returns."""

from .awq import Awq
from .base import Base, DenseLayer, LayerData, Need, relative_error
from .gptq import Gptq
from .qtip import Qtip
from .rtn import Rtn
from .squeezellm import SqueezeLLM

__all__ = [
    "BASES",
    "Awq",
    "Base",
    "DenseLayer",
    "Gptq",
    "LayerData",
    "Need",
    "Qtip",
    "Rtn",
    "SqueezeLLM",
    "relative_error",
]

BASES: dict[str, type[Base]] = {base.name: base for base in (Rtn, Gptq, Awq, SqueezeLLM, Qtip)}
