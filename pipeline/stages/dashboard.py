"""dashboard: the project's W&B workspace as code: `python pipeline/run.py stage=dashboard`.

wandb-workspaces, which writes it, is optional. Online the workspace is saved and its address said;
else, and beside that, its description is dashboard.json.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from typing import Any

from pipeline.manifest import StageContext, StageError
from pipeline.schema import Config
from pipeline.wandb_run import resolve_mode

INPUTS = ()
# A workspace may have been changed by hand: asked for, it is written again.
ALWAYS = True
# Later ones want wandb 0.28.2, which pulls opentelemetry.
PACKAGE = "wandb-workspaces==0.4.5"
# Of each section: lines over steps (title, metrics), and pictures of the report.
SECTIONS = {
    "Training": (
        [
            ("Loss", ["train/loss", "validation/loss"]),
            ("Gradient norm", ["train/grad_norm"]),
            ("Learning rate", ["train/lr"]),
            ("Tokens per second", ["train/tokens_per_second"]),
            ("Model FLOPs utilisation", ["train/mfu"]),
        ],
        ["training_loss", "loss_by_position"],
    ),
    "Evaluation": (
        [],
        ["perplexity_by_position", "niah", "ruler", "babilong", "short", "comparison"],
    ),
    "Memory and speed": ([], ["kv_bytes", "speed_kernels_h100"]),
    "Model": ([], ["schedule", "patterns"]),
}
TABLES = ("ruler", "babilong", "niah", "short", "comparison", "kv_bytes")


def depends_on(config: Config) -> dict[str, Any]:
    """Whose workspace it is."""
    return {"wandb": asdict(config.wandb)}


def workspace(entity: str, project: str) -> Any:
    """The workspace: sections of lines over steps, of the report's pictures and of its tables."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[
                *(panels.LinePlot(title=title, x="Step", y=metrics) for title, metrics in lines),
                *(
                    panels.MediaBrowser(title=picture, media_keys=[f"report/{picture}"])
                    for picture in pictures
                ),
            ],
        )
        for name, (lines, pictures) in SECTIONS.items()
    ]
    tables = [panels.WeavePanelSummaryTable(table_name=f"report/{name}_table") for name in TABLES]
    sections.append(workspaces.Section(name="Tables", panels=tables))
    return workspaces.Workspace(entity=entity, project=project, name="LongGen", sections=sections)


def run(context: StageContext) -> dict[str, Any]:
    """Write dashboard.json and, online, the workspace itself.

    Raises:
        StageError: without wandb-workspaces, or where W&B refuses.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise StageError(
            f"stage=dashboard: wandb-workspaces is not installed; pip install {PACKAGE}"
        )
    section = context.config.wandb
    made = workspace(section.entity or "", section.project)
    described = json.loads(made._to_model().model_dump_json(by_alias=True))
    (context.out / "dashboard.json").write_text(json.dumps(described, indent=2) + "\n")
    counts = {"sections": len(made.sections), "address": None}
    mode = resolve_mode(section)
    if mode != "online":
        context.log.info("W&B is %s: only dashboard.json was written", mode)
        return counts
    try:
        made.save()
    # The client raises errors of several libraries: whichever it is, the remedy is the same.
    except Exception as error:
        raise StageError(
            f"wandb.project={section.project!r}, wandb.entity={section.entity!r}: W&B did not take "
            f"the workspace ({type(error).__name__}: {str(error).splitlines()[0]}); log in with "
            "`wandb login`, set wandb.entity, and train a run there first"
        ) from error
    context.log.info("workspace: %s", made.url)
    return counts | {"address": made.url}
