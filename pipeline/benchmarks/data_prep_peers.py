"""What stage data_prep is measured beside; run as a program, by the Python that has the peers.

`python data_prep_peers.py PEER CORPUS MODEL OUT`: tokenizes the .jsonl files of a folder into a new
folder, and prints {"tokens", "version"}. Imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path


def datatrove(corpus: Path, model: Path, out: Path) -> int:
    """datatrove's Megatron tokenizer with its own settings; the number of tokens."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    config = json.loads((model / "tokenizer_config.json").read_text())
    steps = [
        JsonlReader(str(corpus)),
        MegatronDocumentTokenizer(
            output_folder=str(out / "tokens"),
            tokenizer_name_or_path=str(model / "tokenizer.json"),
            eos_token=config["eos_token"],
        ),
    ]
    LocalPipelineExecutor(steps, tasks=1, logging_dir=str(out / "logs")).run()
    (bin_file,) = (out / "tokens").glob("*.bin")
    index = bin_file.with_suffix(".idx").read_bytes()
    code = index[17]
    return bin_file.stat().st_size // {4: 4, 8: 2}[code]


def datasets_map(corpus: Path, model: Path, out: Path) -> int:
    """datasets.map over batches with transformers' tokenizer; the number of tokens."""
    os.environ["HF_HOME"] = str(out)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    files = sorted(map(str, corpus.glob("*.jsonl")))
    rows = load_dataset("json", data_files=files, split="train", cache_dir=str(out))
    done = rows.map(
        lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
        batched=True,
        remove_columns=rows.column_names,
    )
    return sum(len(chunk.values) for chunk in done.data.column("input_ids").chunks)


PEERS = {"datatrove": datatrove, "datasets": datasets_map}


def main() -> None:
    """See the module's docstring."""
    peer, *folders = sys.argv[1:]
    corpus, model, out = map(Path, folders)
    out.mkdir(parents=True)
    tokens = PEERS[peer](corpus, model, out)
    named = {peer, "datasets", "transformers"} if peer == "datasets" else {peer}
    versions = [f"{name} {metadata.version(name)}" for name in sorted(named | {"tokenizers"})]
    print(json.dumps({"tokens": tokens, "version": ", ".join(versions)}))


if __name__ == "__main__":
    main()
