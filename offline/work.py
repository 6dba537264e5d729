"""The folder in which a conversion keeps what it has done: a run that stops anywhere goes on from there.

It holds the arguments that the conversion was begun with, a lock, and a file for every result (:mod:`.cache`). It goes
when the checkpoint is complete.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import vllm_requant
from vllm_requant.format.durable import json_text, write_bytes
from vllm_requant.format.writer import check_folder

from .cache import TensorCache
from .objections import ObjectionError, Objections
from .ranks import current_ranks
from .recipe import Recipe

__all__ = ["WorkError", "WorkFolder", "arguments_of", "default_folder"]

_ARGUMENTS, _LOCK, _RESULTS = "arguments.json", "lock", "results"


class WorkError(ObjectionError):
    """A work folder cannot be used: it is another conversion's, or is in use, or what was converted has changed."""


def default_folder(output: Path) -> Path:
    """Where the work of a conversion lies if nobody names a place: beside the checkpoint."""
    return output.absolute().with_name(f"{output.name}.work")


def arguments_of(recipe: Recipe, **others: object) -> dict[str, object]:
    """What has to be the same when a conversion goes on, by the flag that sets it."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in recipe.describe().items()}
    return flags | others


class WorkFolder:
    """One conversion's folder; see :meth:`open`.

    Attributes:
        path: the folder.
        cache: keeps results there.
    """

    def __init__(self, path: Path, cache: TensorCache, arguments: dict[str, Any]) -> None:
        self.path, self.cache, self._arguments = path, cache, arguments

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Path,
        arguments: Mapping[str, object],
        *,
        resume: bool,
        overwrite: bool = False,
        cache: TensorCache,
    ) -> Iterator["WorkFolder"]:
        """A folder for the time of a block, which nobody else can have meanwhile.

        Args:
            path: made if it is not there.
            arguments: JSON values by the name that a user gives them.
            resume: go on with what is there.
            overwrite: throw away what is there, if not resuming.
            cache: where results are kept; without a folder of its own, it is given one inside this one.

        Raises:
            WorkError: the folder holds unfinished work and ``resume`` is not set, or there is nothing to resume, or
                it was begun with other arguments or by another version, or another process uses it.
            OSError: it cannot be written.
        """
        content = _content(arguments)
        if resume:
            _refuse(path, content, resume=resume, overwrite=overwrite)  # before a folder is made
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path, "a+") as lock:
            _refuse(path, content, resume=resume, overwrite=overwrite)
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            if not resume:
                shutil.rmtree(path / _RESULTS, ignore_errors=True)
                write_bytes(path / _ARGUMENTS, json_text(content).encode())
            yield cls._of(path, cache)

    @classmethod
    def check(cls, path: Path, arguments: Mapping[str, object], *, resume: bool, overwrite: bool = False) -> None:
        """Refuse what :meth:`open` would, and touch nothing; arguments as there.

        Raises:
            WorkError: for all reasons that there are.
            OSError: the folder cannot be written.
        """
        objections = Objections()
        with objections.collecting():
            _refuse(path, _content(arguments), resume=resume, overwrite=overwrite)
        if (path / _LOCK).exists():
            with objections.collecting(), _locked(path, "r"):
                pass
        with objections.collecting():
            check_folder(path, "--work-dir")
        objections.raise_any()

    @classmethod
    @contextmanager
    def open_together(cls, path: Path, arguments: Mapping[str, object], **settings: Any) -> Iterator["WorkFolder"]:
        """The same for all processes of a conversion, on a file system that all can read; the first one opens it."""
        ranks = current_ranks()
        if ranks.first:
            with cls.open(path, arguments, **settings) as work:
                ranks.wait()
                yield work
        else:
            ranks.wait()
            yield cls._of(path, settings["cache"])

    @classmethod
    def _of(cls, path: Path, cache: TensorCache) -> "WorkFolder":
        """A folder that was begun."""
        if not cache.enabled:
            cache = TensorCache(path / _RESULTS, snapshot_every=cache.snapshot_every)
        return cls(path, cache, json.loads((path / _ARGUMENTS).read_text(encoding="utf-8")))

    def agree(self, what: str, value: str) -> None:
        """Hold on to a fact that is known later than the arguments; it has to be the same when the work goes on.

        Raises:
            WorkError: it is not.
        """
        facts = self._arguments.setdefault("facts", {})
        if what in facts and facts[what] != value:
            raise WorkError(f"{self.path}: {what} is not the one that the conversion was begun with; {_ANEW}")
        if what not in facts and current_ranks().first:
            facts[what] = value
            write_bytes(self.path / _ARGUMENTS, json_text(self._arguments).encode())

    def remove(self) -> None:
        """The conversion is complete. The arguments go first: what is left without them is nobody's work."""
        if current_ranks().first:
            (self.path / _ARGUMENTS).unlink()
            shutil.rmtree(self.path)


_ANEW = "begin anew with --overwrite, or name another --work-dir"


def _content(arguments: Mapping[str, object]) -> dict[str, Any]:
    """What is kept of arguments, as JSON has it."""
    return {"version": vllm_requant.__version__, "arguments": json.loads(json.dumps(dict(arguments)))}


def _refuse(path: Path, content: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Raises:
    WorkError: what lies in the folder, or does not, forbids to begin there or to go on.
    """
    begun = path / _ARGUMENTS
    if not resume:
        if begun.exists() and not overwrite:
            raise WorkError(
                f"{path} holds an unfinished conversion; pass --resume to go on with it, or --overwrite to begin anew"
            )
        return
    if not begun.exists():
        raise WorkError(f"{path} holds no conversion to resume; leave --resume out to begin one")
    kept = json.loads(begun.read_text(encoding="utf-8"))
    if kept["version"] != content["version"]:
        raise WorkError(f"{path} was begun by version {kept['version']}, this is {content['version']}; {_ANEW}")
    before, now = kept["arguments"], content["arguments"]
    other = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    if other:
        raise WorkError(
            *(
                f"{path}: {name} is {now.get(name)} now, the conversion was begun with {before.get(name)}; "
                f"give the same again, or {_ANEW}"
                for name in other
            )
        )


@contextmanager
def _locked(path: Path, mode: str) -> Iterator[IO[str]]:
    """The folder's lock, opened in that mode, which holds the number of the process that has it."""
    with (path / _LOCK).open(mode) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise WorkError(
                f"{path} is in use by process {file.read().strip() or 'unknown'}; wait for it, or name another "
                "--work-dir and -o"
            ) from None
        yield file
