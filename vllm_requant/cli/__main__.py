"""``python -m vllm_requant.cli``."""

from . import main

main()
