"""Who takes part: vLLM's server and llama.cpp, each behind one question: when did which token come?"""

import asyncio
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from .servers import (
    ServerError,
    free_port,
    server_command,
    server_environment,
    start_server,
    stop,
    wait_until_healthy,
)

__all__ = ["Contender", "LlamaCpp", "Vllm", "require_llama_cpp", "running"]

log = logging.getLogger(__name__)

Prompts = Sequence[Sequence[int]]


class Contender(ABC):
    """Something that generates.

    Attributes:
        name: as the table names it.
        description: what runs, once it runs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.description = ""

    @abstractmethod
    def start(self) -> None:
        """Load the model.

        Raises:
            ServerError: it cannot run here.
        """

    @abstractmethod
    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[float]]:
        """Generate greedily for all prompts at once.

        Args:
            prompts: token ids.
            new_tokens: for each prompt, whatever the tokens are; llama.cpp ends at its end-of-text token.

        Returns:
            For each prompt the seconds from the request to each of its tokens.

        Raises:
            ServerError: it went away.
        """

    @abstractmethod
    def stop(self) -> None:
        """Let the model go; allowed at any time."""


class Vllm(Contender):
    """vLLM's OpenAI-compatible server.

    Args:
        name: for the table.
        folder: a model that vLLM loads.
        log: file for the server's output.
        threads: compute threads on a CPU, bound to as many cores from the first one on; None leaves it to vLLM.
        max_model_len, max_num_seqs: tokens of a request, and requests at a time.
        flags: further flags of the server.

    Attributes:
        address: URL of the server's root, once it runs.
        process: the server; the engine and the workers are descendants. None while it does not run.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        log: Path,
        *,
        threads: int | None,
        max_model_len: int,
        max_num_seqs: int,
        flags: Sequence[str] = (),
    ) -> None:
        super().__init__(name)
        self.folder, self.log, self.threads = folder, log, threads
        # every prompt is new, and must be computed even if it is not
        self.flags = ["--no-enable-prefix-caching", "--max-model-len", str(max_model_len)]
        self.flags += ["--max-num-seqs", str(max_num_seqs), *flags]
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self) -> None:
        port = free_port()
        flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.name, *self.flags]
        bound = {} if self.threads is None else {"VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}"}
        command = server_command(str(self.folder), flags)
        self.process = start_server(command, self.log, **server_environment(), **bound)
        wait_until_healthy(self.process, port, self.log)
        self.address = f"http://127.0.0.1:{port}"
        self.description = f"vLLM, {self.folder.name}"

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[float]]:
        from openai import APIError, AsyncOpenAI

        async def together() -> list[list[float]]:
            client = AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=600)
            async with client:
                start = time.perf_counter()
                return await asyncio.gather(*(self._stream(client, prompt, new_tokens, start) for prompt in prompts))

        try:
            return asyncio.run(together())
        except APIError as error:
            raise ServerError(f"{error} See {self.log}") from error

    async def _stream(self, client: Any, prompt: Sequence[int], new_tokens: int, start: float) -> list[float]:
        answer = client.completions.with_streaming_response.create(
            model=self.name,
            prompt=list(prompt),
            max_tokens=new_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        came: list[float] = []
        async with answer as response:
            # the client shares the processor with what it times: to make an object of each line would cost it a
            # noticeable part of a small model's step
            async for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ServerError(f"{self.name}: {chunk['error']} See {self.log}")
                # a server that lags behind its engine sends several at a time
                tokens = chunk["choices"][0].get("token_ids") if chunk["choices"] else None
                came += [time.perf_counter() - start] * len(tokens or ())
        return came

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)
            self.process = None


def require_llama_cpp(node_folder: Path) -> None:
    """Say how to install llama.cpp's Node binding where it is missing.

    Raises:
        FileNotFoundError: it is, or Node.
    """
    if not (node_folder / "node_modules/node-llama-cpp").exists():
        raise FileNotFoundError(
            f"llama.cpp is not in {node_folder}; run `npm install node-llama-cpp` there, "
            "or name with --node-folder where it ran"
        )
    if shutil.which("node") is None:
        raise FileNotFoundError("Node, through which llama.cpp is run, is not installed")


class LlamaCpp(Contender):
    """llama.cpp through its Node binding: prebuilt for every instruction set, without a server in between.

    Args:
        name: for the table.
        file: a GGUF file.
        log: file for what llama.cpp has to say.
        node_folder: where ``npm install node-llama-cpp`` ran.
        threads: compute threads.
        max_model_len, max_num_seqs: tokens of a request, and requests at a time.
    """

    def __init__(
        self,
        name: str,
        file: Path,
        log: Path,
        node_folder: Path,
        *,
        threads: int,
        max_model_len: int,
        max_num_seqs: int,
    ) -> None:
        super().__init__(name)
        script = Path(__file__).with_name("llama_cpp.mjs")
        settings = (threads, max_num_seqs, max_model_len)
        self.log, self.node_folder = log, node_folder
        self._command = ["node", str(script), str(node_folder), str(file), *map(str, settings)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        try:
            require_llama_cpp(self.node_folder)
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log.open("wb"),  # a pipe that nobody reads fills up
                text=True,
            )
        except FileNotFoundError as error:
            raise ServerError(str(error)) from None
        self.description = self._answer()["ready"]

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[float]]:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": [list(p) for p in prompts], "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        times: list[list[float]] = self._answer()
        return times

    def _answer(self) -> Any:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            errors = self.log.read_text(errors="replace").strip().splitlines()
            raise ServerError(f"{self.name}: llama.cpp ended: {' '.join(errors[-5:])}")
        return json.loads(line)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


AnyContender = TypeVar("AnyContender", bound=Contender)


@contextmanager
def running(
    contenders: Sequence[AnyContender], try_out: Callable[[AnyContender], object] = lambda contender: None
) -> Iterator[tuple[list[AnyContender], dict[str, str]]]:
    """Start all, and stop all at the end, whatever ends it.

    Args:
        contenders: the first one must run; of the others those that cannot are reported and left out, and so is
            one for which less memory is free than another took: all are loaded at the same time.
        try_out: asked of each once it has started, so that what is compiled for the first requests is.

    Yields:
        Those that run, and for each other one, by name, why it does not.

    Raises:
        ServerError: the first one does not run.
    """
    ready: list[AnyContender] = []
    left_out: dict[str, str] = {}
    largest = 0  # bytes that one took
    with ExitStack() as stack:
        # servers run in sessions of their own: whoever ends this process by a signal would leave them behind
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        stack.callback(signal.signal, signal.SIGTERM, before)
        for contender in contenders:
            stack.callback(contender.stop)
            log.info("%s: starting", contender.name)
            free = free_memory()
            try:
                if free < largest:
                    from ..offline.resources import size_text

                    had, took = size_text(free), size_text(largest)
                    raise ServerError(f"{had} of memory are free, one before it took {took}")
                contender.start()
                try_out(contender)
            except ServerError as error:
                if contender is contenders[0]:
                    raise
                contender.stop()
                log.warning("%s: left out, %s", contender.name, error)
                left_out[contender.name] = str(error)
            else:
                ready.append(contender)
                largest = max(largest, free - free_memory())
        yield ready, left_out


def free_memory() -> int:
    """Bytes that can be had on this machine without swapping."""
    return int(psutil.virtual_memory().available)
