"""What tasks are made of, small and made up: prose, questions in the published formats, words."""

import json
import random

from transformers import AutoTokenizer

from pipeline.tasks.material import Material
from tests.data_prep.helpers import save_model_folder

PROSE = "Llamas eat grass. The quick brown fox jumps over lazy dogs! Do they live in the mountains?"


def write_files(folder):
    """A folder with squad.json, hotpotqa.json, essays and lists of words."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    topics = [f"topic{i}" for i in range(60)]

    def text(topic):
        return f"{topic} " + " ".join(rng.choice(PROSE.split()) for _ in range(rng.randint(3, 30)))

    articles = []
    for topic in topics:
        paragraphs = [
            {
                "context": text(topic) + f" number {i} is q{topic}{i}.",
                "qas": [
                    {
                        "question": f"What is {topic} number {i}?",
                        "answers": [{"text": f"q{topic}{i}"}, {"text": f"the q{topic}{i}"}],
                        "is_impossible": False,
                    },
                    {"question": "Unanswerable?", "answers": [], "is_impossible": True},
                ],
            }
            for i in range(5)
        ]
        articles.append({"paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Where is {topic}?",
            "answer": f"in {topic}land",
            "context": [[f"{topic} {i}", [text(topic), text(topic)]] for i in range(3)],
        }
        for topic in topics
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": PROSE * 40}))
    for name in ("adjective", "noun", "verb"):
        lines = "".join(f"{name[:2]}{i}\n" for i in range(300))
        (folder / f"{name}list.txt").write_text(lines)
    return folder


def material(root, documents=(), words=True):
    """A Material over such a folder, with a small byte-level tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(save_model_folder(root / "tokenizer"))
    files = write_files(root / "files")
    return Material(tokenizer, documents, files, files, files if words else None)
