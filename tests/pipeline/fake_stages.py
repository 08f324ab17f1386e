"""Stages that take no time, for tests of what runs them."""

from types import SimpleNamespace

from pipeline.stage_folders import stage_inputs

INPUTS = {
    "fetch": (),
    "fetch_tasks": (),
    "data_prep": ("fetch",),
    "convert": ("fetch",),
    "finetune": ("data_prep", "convert"),
    "export": lambda config: ("convert", "finetune"),
    "evaluate": ("export",),
    "report": ("evaluate",),
    "generate": ("export",),
}
SECTIONS = {
    "fetch": lambda c: {"source": c.model.source},
    "data_prep": lambda c: {"seq_length": c.data.seq_length},
    "finetune": lambda c: {"train": {"clip": c.train.clip, "seed": c.train.seed}},
}


class FakeStages:
    """Modules of stages that write one file, `calls` of them, and `act` for what one shall do."""

    def __init__(self):
        self.calls, self.acts = [], {}
        self.modules = {name: self._module(name) for name in INPUTS}

    def _module(self, name):
        def stage(context):
            self.calls.append(name)
            told = [context.folder(n).name for n in stage_inputs(name, context.config)]
            with (context.out / "work").open("a") as file:
                file.write(f"{name} {told}\n")
            return self.acts.get(name, lambda context: {"number": len(self.calls)})(context)

        return SimpleNamespace(
            INPUTS=INPUTS[name],
            RESUMABLE=name == "finetune",
            DISTRIBUTED=name == "finetune",
            ALWAYS=name == "generate",
            depends_on=SECTIONS.get(name, lambda config: {}),
            run=stage,
        )


def raising(error):
    """What a stage does that fails so."""

    def act(context):
        raise error

    return act
