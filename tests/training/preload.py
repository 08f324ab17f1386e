"""What every process of a test's world imports: forked, they find it imported."""

from model import megatron_on_cpu

megatron_on_cpu.install()

import deepspeed  # noqa: E402, F401
import transformers  # noqa: E402, F401

import model.gpt  # noqa: E402, F401
import pipeline.training.loop  # noqa: E402, F401
import tests.tiny  # noqa: E402, F401
