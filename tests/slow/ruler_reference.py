"""NVIDIA's own RULER (PyPI nvidia-long-context-eval), fetched and run as it is, beside ours."""

import importlib.util
import json
import os
import re
import subprocess
import sys

from pipeline import packages

PACKAGE = "pypi:nvidia-long-context-eval==26.3"
WORDS = "pypi:wonderwords==3.0.1"
# What the generators import and these tests have no use for: sentences are split where ours are.
STUBS = {
    "nltk/__init__.py": "",
    "nltk/tokenize.py": (
        "import re\n\ndef sent_tokenize(text):\n    return re.split(r'(?<=[.!?]) ', text)\n"
    ),
    "tenacity.py": (
        "def retry(**_):\n    return lambda f: f\n\n"
        "stop_after_attempt = wait_fixed = wait_random = lambda *_: 0\n"
    ),
}
# Its coded words are drawn by scipy's zeta function, here the sum's first terms and the integral.
ZETA = (
    "def zeta(a, n=10**4):\n"
    "    return sum(k**-a for k in range(1, n)) + n ** (1 - a) / (a - 1) + n**-a / 2\n"
)
if importlib.util.find_spec("scipy") is None:
    STUBS |= {"scipy/__init__.py": "", "scipy/special.py": ZETA}


class Reference:
    """The packages below `root`, their generators and metrics."""

    def __init__(self, root):
        for spec in (PACKAGE, WORDS):
            packages.unpack(spec, root / packages.folder_name(spec))
        for name, text in STUBS.items():
            path = root / "stubs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.root = root
        self.package = root / packages.folder_name(PACKAGE)
        self.words = root / packages.folder_name(WORDS)

    def prompts(self, task, length, samples, model_folder):
        """Its samples: {"input", "outputs", "length"} each."""
        out = self.root / "made" / str(length)
        paths = [str(p) for p in (self.root / "stubs", self.package, self.words)]
        command = [sys.executable, "prepare.py", "--benchmark", "synthetic", "--task", task]
        command += ["--tokenizer_path", str(model_folder), "--tokenizer_type", "hf"]
        command += ["--save_dir", str(out), "--num_samples", str(samples)]
        # Its generators are started as `python`.
        found = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        subprocess.run(
            [*command, "--max_seq_length", str(length)],
            cwd=self.package / "long_context_eval" / "data",
            env={**os.environ, "PYTHONPATH": ":".join(paths), "PATH": found},
            check=True,
            capture_output=True,
        )
        lines = (out / task / "validation.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def score(self, kind, answers, expected):
        """Each answer's score by its metric of a kind of tasks, after its postprocessing."""
        path = self.package / "long_context_eval" / "eval" / "synthetic" / "constants.py"
        spec = importlib.util.spec_from_file_location("ruler_metrics", path)
        metrics = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(metrics)
        # As its evaluate.py does before scoring.
        cleaned = [re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip() for answer in answers]
        return metrics.TASKS[kind]["metric_fn_per_sample"](cleaned, expected)


def skeleton(task, prompt):
    """A prompt with all that is drawn by chance replaced by what it is, and repeats made one."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID", prompt)
    if task.startswith("qa"):
        text = re.sub(
            r"Document \d+:\n.*?(?=\n\nDocument \d+:\n|\n\nAnswer the)", "DOC", text, flags=re.S
        )
        text = re.sub(r"(?<=Question: ).*(?= Answer:)", "QUESTION", text)
        return re.sub(r"(DOC\n\n)+", "DOCS ", text)
    if task == "fwe":
        text = re.sub(r"(?<=coded words\. ).*(?=\nQuestion)", _coded, text)
    if task == "cwe":
        text = re.sub(r"\d+\. [\w' -]+?(?= \d+\. |\n|$)", "N. WORD", text)
        return re.sub(r"(N\. WORD ?)+", "LIST ", text)
    if task == "vt":
        text = re.sub(r"VAR [A-Z]{3}\b(?= =)|(?<== )VAR [A-Z]{3}\b", "VAR ABC", text)
        text = re.sub(r"VAR [A-Z]{5}\b", "VAR ABCDE", text)
        text = re.sub(r"\d{5}", "12345", text)
        text = re.sub(r"(?<=are:  )[A-Z]{3}( [A-Z]{3}){4}", "NAMES", text)
    text = re.sub(r"\d{7}", "1234567", text)
    # An adjective, a hyphen and a noun, of which either may have hyphens or spaces of its own.
    word = r"[\w'.]+(?: [\w'.]+)?-[\w'. -]+?"
    text = re.sub(rf"(?<=magic numbers for ){word}(?= is: )", "KEY", text)
    text = re.sub(rf"(?<=magic uuids for ){word}(?= is: )", "KEY", text)
    listed = re.search(
        rf" for ({word}(?:, (?:and )?{word})*) mentioned in the provided text\?", text
    )
    if listed:
        text = text.replace(listed[1], ", ".join(["KEY"] * len(listed[1].split(", "))))
    needle = r"One of the special magic (?:numbers|uuids) for (?:KEY|UUID) is: (?:1234567|UUID)\."
    if task in ("niah_multikey_2", "niah_multikey_3"):
        return re.sub(rf"({needle}\n)+", "NEEDLES\n", text)
    noise = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    if task in ("vt", "niah_single_1"):
        return re.sub(
            rf"((?:{re.escape(noise)}|{needle}|VAR ABC(?:DE)? = (?:12345|VAR ABC(?:DE)? ))\s+)+",
            "NOISE ",
            text,
        )
    body = re.search(r"afterwards\.\n(.*)\nWhat", text, re.S)
    if body and task.startswith("niah"):
        needles = len(re.findall(needle, body[1]))
        text = text.replace(body[1], f"ESSAY WITH {needles}")
    return text


def _coded(match):
    words = set(match[0].split(" "))
    dots = "..." in words
    coded = all(re.fullmatch("[a-z]{6}", word) for word in words - {"..."})
    return f"CODED {dots} {coded}"
