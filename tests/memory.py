"""What a call holds of host memory, and model folders of any size that take no disk."""

import ctypes
import json
import multiprocessing
import os
import time
import traceback
from math import prod
from pathlib import Path

from model.config import ModelConfig
from model.mapping import hf_shapes

BYTES = {"BF16": 2, "F16": 2, "F32": 4}
ROOT = Path(__file__).resolve().parent.parent
# mallopt's number of it: see mallopt(3).
M_MMAP_THRESHOLD = -3
FIELDS = {"VmRSS": "total", "RssAnon": "anonymous", "RssFile": "mapped_files", "VmHWM": "peak"}


def resident(process="self") -> dict[str, int]:
    """Resident bytes of a process: now, of which anonymous and of mapped files; and the peak."""
    found = {}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in FIELDS:
            found[FIELDS[key]] = int(value.split()[0]) * 1024
    return found


def read_from_files() -> int:
    """Bytes that this process has had from read calls so far; mapped pages do not count."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


def forget_peak() -> None:
    """Begin this process's peak anew (see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _child(pipe, prepare, call, arguments):
    try:
        # glibc keeps what is freed of pieces below 32 MB, which would count as held.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
        if prepare:
            prepare()
        before = resident()
        forget_peak()
        pipe.send(before)
        started = time.monotonic()
        result = call(*arguments)
        pipe.send((resident(), time.monotonic() - started, result))
    except BaseException:
        pipe.send(traceback.format_exc())


def measure(call, *arguments, prepare=None, timeout=3600) -> dict:
    """Run `call(*arguments)` in a process of its own; what its memory grew by, in bytes.

    {"peak": the most of all resident memory, as the kernel counts it; "anonymous" and
    "mapped_files": the most of each that was seen, looking every 2 ms; "seconds"; "result"}

    Args:
        prepare: called first, in the new process, and not measured.

    Raises:
        AssertionError: with the process's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload(["tests.training.preload", "pipeline.stages.export"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, prepare, call, arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        before = ours.recv() if ours.poll(timeout) else "it did not begin"
        assert isinstance(before, dict), before
        most = dict(before)
        until = time.monotonic() + timeout
        while not ours.poll(0.002):
            assert time.monotonic() < until, f"not done in {timeout} s"
            for key, value in resident(child.pid).items():
                most[key] = max(most.get(key, 0), value)
        after = ours.recv()
        assert isinstance(after, tuple), after
    finally:
        child.kill()
        child.join()
    end, seconds, result = after
    return {
        "peak": end["peak"] - before["total"],
        "anonymous": most["anonymous"] - before["anonymous"],
        "mapped_files": most["mapped_files"] - before["mapped_files"],
        "seconds": round(seconds, 1),
        "result": result,
    }


def sparse_llama(folder: Path, model: ModelConfig, shard_bytes: int, dtype: str = "BF16") -> None:
    """A Hugging Face Llama folder of this shape, whose tensors are holes: all zeros, on no disk."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope["rope_theta"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(values))
    shards, held = [{}], 0
    for name, shape in hf_shapes(model).items():
        size = prod(shape) * BYTES[dtype]
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [held, held + size],
        }
        held += size
    weight_map = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            end = max(entry["data_offsets"][1] for entry in entries.values())
            stream.truncate(8 + len(header) + end)
        weight_map |= dict.fromkeys(entries, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
