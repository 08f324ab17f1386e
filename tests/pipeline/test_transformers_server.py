"""The export under transformers' own server, asked by the openai client."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer

from model.modeling_longgen import LongGenForCausalLM
from pipeline import transformers_server
from pipeline.stages import export
from tests.pipeline.running import ROOT, alone
from tests.pipeline.test_export import make  # noqa: F401

START_SECONDS = 120
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture
def served(make, tmp_path):  # noqa: F811
    """(address, export folder) of a running server."""
    for needed in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (transformers[serving])")
    context = make()
    fetched = context.folder("fetch") / "model"
    tokenizer = AutoTokenizer.from_pretrained(fetched)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(fetched)
    export.run(context)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.transformers_server", str(context.out)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    said = (tmp_path / "said").open("w")
    server = subprocess.Popen(command, env=alone() | own, stdout=said, stderr=said, cwd=ROOT)
    try:
        for _ in range(START_SECONDS * 4):
            assert server.poll() is None, (tmp_path / "said").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1", context.out
    finally:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        said.close()


@pytest.mark.slow
def test_the_openai_client_gets_what_generate_says(served):
    from openai import OpenAI

    address, folder = served
    client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
    prompt = " ".join(f"w{5 + i}" for i in range(40))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    model = LongGenForCausalLM.from_pretrained(folder)
    wanted = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    wanted = tokenizer.decode(wanted, skip_special_tokens=True)
    ask = dict(model=str(folder), max_tokens=9, temperature=0)
    ask["messages"] = [{"role": "user", "content": prompt}]
    for _ in range(2):
        answer = client.chat.completions.create(**ask)
        assert answer.choices[0].message.content.split() == wanted.split()
        assert answer.usage.prompt_tokens == 40
    parts = [
        part.choices[0].delta.content
        for part in client.chat.completions.create(**ask, stream=True)
        if part.choices
    ]
    assert "".join(part or "" for part in parts).split() == wanted.split()


def test_what_the_server_cannot_do_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="'' is no export folder; name one"):
        transformers_server.main([])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="cannot hold sparse layers' caches; leave it out"):
        transformers_server.main([str(Path(tmp_path)), "--continuous-batching"])
