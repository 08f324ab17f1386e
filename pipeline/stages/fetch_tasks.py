"""fetch_tasks: packages whose files evaluation's tasks read: questions, essays, lists of words.

Apart from stage=fetch, which training depends on: another task then leaves a trained model alone.
"""

from __future__ import annotations

from typing import Any

from pipeline import packages
from pipeline.manifest import StageContext
from pipeline.schema import Config
from pipeline.schema_of_eval import task_packages

INPUTS = ()


def depends_on(config: Config) -> dict[str, Any]:
    """The packages that the tasks of eval name."""
    for spec in task_packages(config.eval):
        packages.check_spec(spec)
    return {"packages": task_packages(config.eval)}


def run(context: StageContext) -> dict[str, Any]:
    """Unpack every package into a folder of its name; none of their code runs.

    Raises:
        StageError: without a network, or on an unknown package.
    """
    counts = {}
    for spec in task_packages(context.config.eval):
        context.log.info("fetch_tasks: package %s", spec)
        counts[spec] = packages.unpack(spec, context.out / packages.folder_name(spec))
    return {"packages": counts}
