"""Short tasks through lm-eval: from local files, or its own from the hub where there is a network.

A task of eval.short.folder is a file: NAME.jsonl with query, choices and gold (the index of the
right one) a line, or NAME.json or NAME/task.json as BIG-bench has multiple-choice tasks (input,
target_scores). Other names are lm-eval's. The package is optional: without it the tasks are
skipped, and that is said.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.evaluated_model import Evaluated
from pipeline.manifest import StageError
from pipeline.schema_of_eval import EvalSection
from pipeline.tasks.material import Material

PACKAGE = "lm-eval==0.4.13"
# What stands for a task in records where it has several measures.
FIRST = ("acc", "exact_match", "acc_norm")


@dataclass(frozen=True)
class TaskSample:
    """A whole task: lm-eval is asked for one at a time, so that a killed run keeps the others."""

    key: str
    tokenizer: Any
    path: Path | None
    tokens: tuple[int, ...] = ()


def missing() -> str | None:
    """Why short tasks are skipped; None where they run."""
    if importlib.util.find_spec("lm_eval") is None:
        return f"lm-eval is not installed; pip install {PACKAGE}"
    return None


def build(section: EvalSection, material: Material) -> list[TaskSample]:
    """One sample per task; none without lm-eval.

    Raises:
        StageError: where the folder is none, or a file in it is of another format.
    """
    if missing():
        return []
    wanted = section.short
    folder = Path(wanted.folder) if wanted.folder else None
    if folder is not None and not folder.is_dir():
        raise StageError(
            f"eval.short.folder={wanted.folder!r}: is no folder; set it to one of task files, or "
            "to null for lm-eval's own tasks"
        )
    found = []
    for name in wanted.tasks:
        path = _file(folder, name)
        if path is not None:
            read_rows(path)
        found.append(TaskSample(name, material.tokenizer, path))
    return found


def _file(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    places = (f"{name}.jsonl", f"{name}.json", f"{name}/task.json")
    found = [folder / place for place in places if (folder / place).is_file()]
    # As they lie in BIG-bench's archive, some folders down.
    found += sorted(folder.rglob(f"{name}/task.json"))[:1]
    return found[0] if found else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """[{"query", "choices", "gold"}] of a task's file.

    Raises:
        StageError: on another format, or a row without exactly one right choice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            rows = [{key: row[key] for key in ("query", "choices", "gold")} for row in rows]
        else:
            rows = _bigbench(json.loads(text))
        if not all(0 <= row["gold"] < len(row["choices"]) for row in rows) or not rows:
            raise ValueError(f"{len(rows)} rows, or a gold that is no index of its choices")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{path}: is no task of one right choice ({type(error).__name__}: {error}); must be "
            "lines of query, choices and gold, or BIG-bench's task.json with target_scores; leave "
            "it out of eval.short.tasks"
        ) from error
    return rows


def _bigbench(task: dict[str, Any]) -> list[dict[str, Any]]:
    """BIG-bench's zero-shot prompts, with the choices listed where the task says so."""
    listed = task.get("append_choices_to_input", True)
    mark = task.get("choice_prefix", "\n  choice: ")
    before = task.get("example_input_prefix", "\nQ: ")
    after = task.get("example_output_prefix", "\nA: ")
    rows = []
    for example in task["examples"]:
        scores = example["target_scores"]
        best = [place for place, score in enumerate(scores.values()) if score > 0]
        if len(best) == 1:
            choices = "".join(mark + choice for choice in scores) if listed else ""
            query = task.get("task_prefix", "") + before + example["input"] + choices + after
            rows.append({"query": query.rstrip(), "choices": list(scores), "gold": best[0]})
    return rows


def measure(sample: TaskSample, model: Evaluated, section: EvalSection) -> list[dict[str, Any]]:
    """One record per document of the task, its score the first measure, times 100.

    Raises:
        StageError: where lm-eval has no such task, or cannot reach its data.
    """
    from lm_eval import simple_evaluate

    from pipeline.tasks.lm_eval_adapter import EvaluatedLM

    wanted = section.short
    with tempfile.TemporaryDirectory() as folder:
        task: Any = sample.key
        if sample.path is not None:
            task = _local_task(sample, Path(folder))
        try:
            result = simple_evaluate(
                EvaluatedLM(model, sample.tokenizer, section.batch_tokens),
                tasks=[task],
                num_fewshot=wanted.shots,
                limit=wanted.limit,
                bootstrap_iters=0,
                task_manager=_task_manager(own=sample.path is None),
            )
        # Its loaders raise errors of several libraries: whichever it is, the remedy is the same.
        except Exception as error:
            raise StageError(
                f"eval.short.tasks: {sample.key}: lm-eval could not run it "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                "name tasks that lm-eval has and whose data this machine can reach, or files of "
                "eval.short.folder"
            ) from error
    return [
        _record(name, document)
        for name, documents in result["samples"].items()
        for document in documents
    ]


@cache
def _task_manager(own: bool) -> Any:
    """lm-eval's list of tasks; without its own, which takes most of a minute to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def _local_task(sample: TaskSample, folder: Path) -> dict[str, Any]:
    """lm-eval's description of a task whose rows lie in a file."""
    lines = folder / "rows.jsonl"
    rows = read_rows(sample.path)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "task": sample.key,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(lines)}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _record(task: str, document: dict[str, Any]) -> dict[str, Any]:
    metrics = {name: document[name] for name in document["metrics"] if name in document}
    first = next((name for name in FIRST if name in metrics), next(iter(metrics)))
    answers = [response[0] for response in document["filtered_resps"]]
    return {
        "subtask": task,
        "document": document["doc_id"],
        "length": 0,
        "template": f"lm-eval/{task}",
        "prompt_sha256": document["prompt_hash"],
        "expected": document["target"],
        "answer": answers,
        "metric": first,
        "score": 100.0 * float(metrics[first]),
        "metrics": metrics,
    }
