"""evaluate: tasks on models, one record after another, on as many processes as there are GPUs.

Every process takes its share of each model's samples and appends to a file of its own; what is
there is never done again. Rank 0 gathers them. With eval.shard the stage does one part of several,
in a folder of its own, and stage=evaluate without it takes over the parts it finds.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_prep.shards import HeldOutDocuments
from data_prep.sources import DataError
from data_prep.tokenizer_folder import open_tokenizer
from model.engine_weights import ServingError, Shard
from pipeline import packages
from pipeline.evaluated_model import FINAL, OWN, Evaluated, needs_export, open_model
from pipeline.manifest import StageContext, StageError, read_manifest
from pipeline.progress import track_work
from pipeline.prompts import encode_prompt
from pipeline.records import Journal, Record, read_records
from pipeline.schema import Config
from pipeline.schema_of_eval import EvalSection, task_packages
from pipeline.scores import Cell, averages, cells, write_csv
from pipeline.serving import join_ranks
from pipeline.shared_model import open_shared
from pipeline.tasks import babilong, kv_bytes, niah, perplexity, ruler, short
from pipeline.tasks.material import Material
from pipeline.tasks.sample import Prompt, Sample

RESUMABLE = True
DISTRIBUTED = True
# What was evaluated stands in its manifest and records: stage=report needs no eval key again.
AS_RECORDED = True
ANOTHER = "eval.name=NAME, which evaluates into a folder of its own and trains nothing again,"
# Asked a prompt and graded by its answer; measured on what the model computes.
ASKED: dict[str, ModuleType] = {"niah": niah, "ruler": ruler, "babilong": babilong}
MEASURED: dict[str, ModuleType] = {
    "perplexity": perplexity,
    "short": short,
    "kv_bytes": kv_bytes,
}
RECORDS = "records.jsonl"
# A prompt of more tokens has room for any task's question.
TIGHT = 4096


def inputs(config: Config) -> tuple[str, ...]:
    """The export only where a model is made of it, packages of tasks only where they are named."""
    export = ("export",) if needs_export(config) else ()
    tasks = ("fetch_tasks",) if task_packages(config.eval) else ()
    return ("fetch", *tasks, "data_prep", *export)


INPUTS = inputs


def processes(config: Config) -> int:
    """As many as one machine of the recipe has GPUs, or as are left of them here: a recipe that
    trains on many nodes is evaluated on one."""
    here = config.parallel.gpus_per_node
    return max(1, min(here, torch.cuda.device_count())) if config.device == "cuda" else here


def depends_on(config: Config) -> dict[str, Any]:
    """Of the eval section what decides a record: its models, and the sections of its tasks."""
    values = asdict(config.eval)
    kept = ("tasks", "models", "folders", "prose", "prefill_chunk", "shard", *config.eval.tasks)
    return {"eval": {key: value for key, value in values.items() if key in kept}}


def folder_name(config: Config) -> str:
    """`evaluate`, `evaluate_NAME` of a suite, and of a part with `_1of4`."""
    parts = ("evaluate", config.eval.name, (config.eval.shard or "").replace("/", "of"))
    return "_".join(filter(None, parts))


class Retokenized(Sequence):
    """Documents in another tokenizer's ids, <bos> first, made when they are asked for."""

    def __init__(self, documents: Sequence[np.ndarray], old: Any, new: Any) -> None:
        self.documents, self.old, self.new = documents, old, new
        self._made: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        if index not in self._made:
            text = self.old.decode(self.documents[index][1:])
            self._made[index] = encode_prompt(self.new, text)
        return self._made[index]


@dataclass(frozen=True)
class Batch:
    """Samples of one task that a model takes together; of a measured task one."""

    task: str
    samples: list[Any]

    @property
    def tokens(self) -> int:
        """Of all its prompts, about."""
        return max(1, sum(map(size, self.samples)))


def _same(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids."""
    if one is other:
        return True
    told = [getattr(each, "backend_tokenizer", None) for each in (one, other)]
    specials = [(each.bos_token_id, each.eos_token_id) for each in (one, other)]
    return None not in told and specials[0] == specials[1] and told[0].to_str() == told[1].to_str()


def size(sample: Any) -> int:
    """Tokens of a sample, the answer's among them."""
    return sample.length if isinstance(sample, Sample) else len(sample.tokens)


def batches(samples: list[tuple[str, Any]], batch_tokens: int) -> list[Batch]:
    """Neighbours of one task, answer and about one length together, to at most `batch_tokens`."""
    found: list[Batch] = []
    for task, sample in samples:
        last = found[-1] if found else None
        if last and task in ASKED and last.task == task:
            first, count = last.samples[0], len(last.samples) + 1
            # A row is padded to the longest, which is the first.
            alike = sample.answer_tokens == first.answer_tokens and 2 * size(sample) > size(first)
            if alike and count * size(first) <= batch_tokens:
                last.samples.append(sample)
                continue
        found.append(Batch(task, [sample]))
    return found


def teams_of(context: StageContext) -> tuple[Shard, dist.ProcessGroup | None, int]:
    """(where this process stands among those that share a model, their group, how many teams).

    Raises:
        StageError: where the processes cannot be divided so.
    """
    tensor = context.config.eval.tensor
    if tensor == 1:
        return Shard(), None, context.size
    if context.size % tensor:
        raise StageError(
            f"eval.tensor={tensor}: must divide the {context.size} processes that evaluate here; "
            f"set it, or parallel.gpus_per_node={tensor} on a machine of that many GPUs"
        )
    join_ranks(torch.device(context.config.device))
    starts = range(0, context.size, tensor)
    # Every process makes every group.
    groups = [dist.new_group(list(range(start, start + tensor))) for start in starts]
    team = context.rank // tensor
    return Shard(context.rank % tensor, tensor), groups[team], len(groups)


class Evaluation:
    """One process's part of the stage."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.section: EvalSection = context.config.eval
        self.base_tokenizer = open_tokenizer(context.folder("fetch") / "model")
        documents = HeldOutDocuments(context.folder("data_prep") / "held_out_documents")
        self.own_material = self._material(self.base_tokenizer, documents)
        self._samples: dict[str, list[tuple[str, Any]]] = {}
        self._tokenizers: dict[str, Any] = {}
        part, parts = map(int, (self.section.shard or "1/1").split("/"))
        self.shard, self.group, teams = teams_of(context)
        team = context.rank // self.shard.size
        self.share = (part - 1) * teams + team, parts * teams

    def _material(self, tokenizer: Any, documents: Sequence[np.ndarray]) -> Material:
        wanted = self.section
        return Material(
            tokenizer,
            documents,
            self._folder("eval.prose", wanted.prose),
            self._folder("eval.ruler.data", wanted.ruler.data),
            self._folder("eval.ruler.words", wanted.ruler.words),
        )

    def _folder(self, key: str, source: str | None) -> Path | None:
        """Where a package was unpacked, or the folder itself."""
        if source is None:
            return None
        if source in task_packages(self.section):
            return self.context.folder("fetch_tasks") / packages.folder_name(source)
        folder = Path(source)
        needed = {"ruler"} | ({"babilong"} if key == "eval.prose" else set())
        if needed & set(self.section.tasks) and not folder.is_dir():
            raise StageError(
                f"{key}={source!r}: is no folder; set it to one, to pypi:NAME==VERSION or to null"
            )
        return folder

    def samples(self, name: str) -> list[tuple[str, Any]]:
        """(task, sample) of everything that a model is asked, longest first within a task.

        In the base model's ids, so that all models of one run see the same; a model of another
        folder is asked in those of its own tokenizer, if that is another one.
        """
        whose = "" if _same(self.tokenizer(name), self.base_tokenizer) else name
        if whose not in self._samples:
            material = self.own_material
            if whose:
                new = self.tokenizer(name)
                documents = Retokenized(material.documents, self.base_tokenizer, new)
                material = self._material(new, documents)
            self._samples[whose] = self._build(material)
        # A cache is what this project makes smaller; every layer of the base is full.
        return [pair for pair in self._samples[whose] if pair[0] != "kv_bytes" or name == FINAL]

    def tokenizer(self, name: str) -> Any:
        """The one that a model is asked in."""
        if name in OWN:
            return self.base_tokenizer
        if name not in self._tokenizers:
            folder = self.section.folders[name]
            try:
                found = open_tokenizer(Path(folder))
            except DataError as error:
                raise StageError(
                    f"eval.folders.{name}={folder!r}: holds no tokenizer that can be loaded "
                    f"({str(error).splitlines()[0]}); put the model's tokenizer there, or leave it "
                    "out of eval.models"
                ) from error
            self._tokenizers[name] = found
        return self._tokenizers[name]

    def _build(self, material: Material) -> list[tuple[str, Any]]:
        found = []
        for task in (*self.section.tasks, "kv_bytes"):
            module = ASKED.get(task) or MEASURED[task]
            built = module.build(self.section, material)
            if task == "perplexity":
                self._tell_documents(len(built))
            if task in ASKED:
                _try_shortest(built)
            built.sort(key=lambda s: (-size(s), -getattr(s, "answer_tokens", 0)))
            found += [(task, sample) for sample in built]
        return found

    def _tell_documents(self, found: int) -> None:
        wanted = self.section.perplexity
        if found < wanted.documents:
            self.context.log.warning(
                "perplexity: only %d of %d documents: no more held-out ones have %d tokens",
                *(found, wanted.documents, wanted.min_length),
            )

    def run(self, name: str, journal: Journal) -> None:
        """This process's samples of one model that are not in the journal yet."""
        index, parts = self.share
        mine = [
            (task, sample)
            for task, sample in self.samples(name)[index::parts]
            if (name, task, sample.key) not in journal.done
        ]
        if not mine:
            return
        model = self._open(name)
        self._tell_lengths(name, model, mine)
        described = self.context.out / f"model_{model.id}.json"
        described.write_text(json.dumps(model.described, indent=2) + "\n")
        work = batches(mine, self.section.batch_tokens)
        seconds: Counter[str] = Counter()
        label = name if parts == 1 else f"{name}, part {index + 1} of {parts}"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # Prompts are made beside the model's work, which most of that time holds no lock.
            made = {id(sample): pool.submit(sample.make) for task, sample in mine if task in ASKED}
            try:
                tokens = [batch.tokens for batch in work]
                told = track_work(work, tokens, label, self.context.log)
                for batch in work if self.shard.rank else told:
                    started = time.monotonic()
                    for sample, records in self._records(name, model, batch, made):
                        journal.append(name, batch.task, sample.key, records)
                    seconds[batch.task] += time.monotonic() - started
            finally:
                pool.shutdown(cancel_futures=True)
        for task, taken in seconds.items() if self.shard.rank == 0 else ():
            self.context.log.info("%s: %s took %.1f s", label, task, taken)

    def _open(self, name: str) -> Evaluated:
        tokenizer = self.tokenizer(name)
        if self.shard.size == 1 and not self.section.engine:
            return open_model(name, self.context, tokenizer)
        return open_shared(name, self.context, tokenizer, self.shard, self.group)

    def _records(
        self, name: str, model: Evaluated, batch: Batch, made: dict[int, Future]
    ) -> Iterator[tuple[Any, list[Record]]]:
        if batch.task in MEASURED:
            (sample,) = batch.samples
            records = MEASURED[batch.task].measure(sample, model, self.section)
            yield sample, [{**record, "manifest": model.id} for record in records]
            return
        prompts: list[Prompt] = [made.pop(id(sample)).result() for sample in batch.samples]
        answers = model.answers([p.tokens for p in prompts], prompts[0].answer_tokens)
        tokenizer, grade = self.tokenizer(name), ASKED[batch.task].score
        for sample, prompt, ids in zip(batch.samples, prompts, answers, strict=True):
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            yield sample, [record_of(sample, prompt, answer, grade, model)]

    def _tell_lengths(self, name: str, model: Evaluated, mine: list[tuple[str, Any]]) -> None:
        beyond = sorted({size(sample) for _, sample in mine if is_beyond(size(sample), model)})
        if beyond:
            self.context.log.warning(
                "%s: %s tokens are beyond the %d that it was trained on: evaluated, and marked "
                "beyond_context",
                *(name, ", ".join(map(str, beyond[-4:])), model.context),
            )


def _try_shortest(samples: list[Sample]) -> None:
    """Make one prompt of each subtask's least length: too short a one is said before any work."""
    least: dict[str, Sample] = {}
    for sample in samples:
        if sample.length < least.get(sample.subtask, sample).length or sample.subtask not in least:
            least[sample.subtask] = sample
    for sample in least.values():
        if sample.length <= TIGHT:
            sample.make()


def is_beyond(length: int, model: Evaluated) -> bool:
    """Whether a length is above the context that the model was trained on."""
    return model.context is not None and length > model.context


def record_of(sample: Sample, prompt: Prompt, answer: str, grade: Any, model: Evaluated) -> Record:
    """A sample's record: all that says what was asked, of whom, what came and what it is worth."""
    return {
        "subtask": sample.subtask,
        "seed": sample.seed,
        "length": sample.length,
        "depth": prompt.depth,
        "template": prompt.template,
        "prompt_tokens": len(prompt.tokens),
        "prompt_sha256": prompt.sha256(),
        **prompt.fields,
        "expected": list(prompt.expected),
        "answer": answer,
        "score": grade(sample.subtask, prompt, answer),
        "beyond_context": is_beyond(sample.length, model),
        "manifest": model.id,
    }


def parts_of(context: StageContext) -> list[Path]:
    """Records of finished parts (eval.shard) of this very evaluation."""
    if context.config.eval.shard is not None:
        return []
    wanted = json.loads(json.dumps(depends_on(context.config)["eval"], default=str))
    found = []
    for folder in sorted(context.out.parent.glob(f"{folder_name(context.config)}_*of*")):
        manifest = read_manifest(folder)
        if manifest and {**manifest["config"]["eval"], "shard": None} == wanted:
            found.append(folder / RECORDS)
    return found


def run(context: StageContext) -> dict[str, Any]:
    """Write records.jsonl, and of each model a model_ID.json; what was finished before is kept.

    Raises:
        StageError: where the held-out documents or files do not suffice for a task (see the
            tasks), or a model cannot be loaded.
    """
    if context.config.device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    evaluation = Evaluation(context)
    skipped = {"short": short.missing()} if "short" in context.config.eval.tasks else {}
    skipped = {task: reason for task, reason in skipped.items() if reason}
    for task, reason in skipped.items():
        context.log.warning("eval.tasks: %s is skipped: %s", task, reason)
    for name in context.config.eval.models:
        # Whatever a task lacks is said before any model is loaded.
        evaluation.samples(name)
    finished = parts_of(context)
    # Of those that share a model, the first one writes.
    first = context.rank - evaluation.shard.rank
    own = context.out / (f"records.{first}.jsonl" if first else RECORDS)
    others = [*finished, *_files_of_ranks(context.out, own)]
    journal = Journal(own, others, writes=evaluation.shard.rank == 0)
    # Nobody adds to what others still read: all of them must leave out the same.
    context.meet("journals")
    if journal.done:
        context.log.info("%d samples were finished before and are kept", len(journal.done))
    for name in context.config.eval.models:
        try:
            evaluation.run(name, journal)
        except ServingError as error:
            raise StageError(f"{name}: {error}; or lower eval.batch_tokens") from error
    context.meet("evaluated")
    if context.rank:
        return {}
    others = _files_of_ranks(context.out, own)
    journal.gather([*finished, *others])
    for path in others:
        path.unlink()
    for part in finished:
        for path in part.parent.glob("model_*.json"):
            shutil.copyfile(path, context.out / path.name)
    records = read_records(own)
    scores = cells(records)
    if scores:
        write_csv(context.out / "scores.csv", scores)
    written = Counter(f"{r['model']} {r['task']}" for r in records)
    return {"records": dict(written), "scores": summary(scores), "skipped": skipped}


def summary(scores: list[Cell]) -> dict[str, str]:
    """ "final ruler at 4096": mean of the subtasks and its standard error."""
    kinds = dict.fromkeys((cell.model, cell.task) for cell in scores)
    return {
        f"{model} {task} at {length}": str(mean)
        for model, task in kinds
        for length, mean in averages(scores, model, task).items()
    }


def _files_of_ranks(folder: Path, own: Path) -> list[Path]:
    return sorted(path for path in folder.glob("records*.jsonl") if path != own)
