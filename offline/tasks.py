"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness): found before a model is loaded, run, and reduced to scores."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .card import STDERR
from .objections import ObjectionError

__all__ = ["TaskError", "Tasks", "lm_eval_version"]

_SEED = 1234  # of lm-eval's own command


class TaskError(ObjectionError):
    """A task cannot be run, or not with this model."""


def lm_eval_version() -> str:
    """Of the installed package.

    Raises:
        TaskError: there is none.
    """
    try:
        import lm_eval
    except ImportError:
        raise TaskError("--tasks needs the package lm-eval; install vllm-requant with the extra 'eval'") from None
    return str(lm_eval.__version__)


@dataclass(frozen=True)
class Tasks:
    """Tasks whose documents are at hand.

    Attributes:
        loaded: what lm-eval's task manager made of them.
        asked: of these, groups and tasks that are in none of them.
    """

    loaded: Mapping[str, Any]
    asked: Sequence[Any]

    @classmethod
    def load(cls, names: Sequence[str], include_path: Path | None = None) -> "Tasks":
        """Find tasks and read their documents.

        Args:
            names: of tasks, groups or tags, or patterns such as ``minerva_math_*``.
            include_path: folder of further tasks. Their files may name Python functions, which run.

        Raises:
            TaskError: there is no such task, it runs code that the model writes, or its documents cannot be read.
        """
        version = lm_eval_version()
        from lm_eval.tasks import TaskManager

        if include_path is not None and not include_path.is_dir():
            raise TaskError(f"--include-path {include_path}: no such folder")
        manager = TaskManager(include_path=include_path)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if unknown:
            raise TaskError(
                *(
                    f"--tasks {name}: lm-eval {version} has no such task; `lm-eval ls tasks` lists those it has, "
                    "--include-path DIR adds yours (files that are not valid YAML are passed over)"
                    for name in unknown
                )
            )
        matched = manager.match_tasks(list(names))
        try:
            loaded = manager.load(matched)
        except Exception as error:  # of a task's files, of its Python code, of the package datasets
            raise TaskError(f"--tasks {','.join(names)}: cannot be loaded: {error}") from error
        unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe:
            raise TaskError(
                *(
                    f"--tasks {name}: runs code that the model writes; use lm-eval itself, in a sandbox, on an endpoint"
                    for name in unsafe
                )
            )
        groups = [loaded["groups"][name] for name in matched if name in loaded["groups"]]
        in_groups = {task.task_name for group in groups for task in group.get_all_tasks()}
        return cls(loaded, [*groups, *(task for name, task in loaded["tasks"].items() if name not in in_groups)])

    def run(self, model: Any, *, num_fewshot: int | None, limit: int | None) -> Iterator[dict[str, Any]]:
        """Score a model.

        Args:
            model: an ``LM`` of lm-eval.
            num_fewshot: examples in a prompt; None leaves each task its own number, as does a task that says 0.
            limit: documents of each task, the first ones; None takes all.

        Returns:
            For each task, or group that has a score of its own: ``dataset``, its name; ``scores``, of which that of a
            filter is named ``metric,filter`` and standard errors end in ``_stderr``; ``conditions``.
        """
        from lm_eval.evaluator import evaluate

        # what its simple_evaluate() does, which also looks through the machine and for a git repository
        torch.manual_seed(_SEED)
        for task in self.loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
            task.set_fewshot_seed(seed=_SEED)
        results = evaluate(model, self.loaded, limit=limit, log_samples=False)
        for asked in self.asked:
            for name in _scored(asked, results["results"]):
                conditions = {
                    "num_fewshot": results["n-shot"].get(name),
                    "limit": limit,
                    "documents": _documents(asked, name, results["n-samples"]),
                    "task_version": results["versions"].get(name),
                    "lm_eval": lm_eval_version(),
                }
                yield {"dataset": name, "scores": _scores(results["results"][name]), "conditions": conditions}


def _scored(asked: Any, results: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Names under which there are scores: of a group itself if it averages, else of its tasks."""
    tasks = getattr(asked, "get_all_tasks", None)
    if tasks is None:
        return [asked.task_name]
    return [asked.name] if _scores(results.get(asked.name, {})) else [task.task_name for task in tasks()]


def _documents(asked: Any, name: str, counts: Mapping[str, Mapping[str, int]]) -> int:
    names = [name] if name in counts else [task.task_name for task in asked.get_all_tasks()]
    return sum(counts[each]["effective"] for each in names)


def _scores(measured: Mapping[str, Any]) -> dict[str, float]:
    """From ``metric,filter`` and ``metric_stderr,filter``, with "none" for no filter and "N/A" for no value."""
    scores = {}
    for key, value in measured.items():
        metric, _, chosen = key.partition(",")
        if not chosen or not isinstance(value, int | float):
            continue
        suffix = STDERR if metric.endswith(STDERR) else ""
        scores[metric.removesuffix(STDERR) + ("" if chosen == "none" else f",{chosen}") + suffix] = float(value)
    return scores
