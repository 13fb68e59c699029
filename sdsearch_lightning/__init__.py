"""SD-Search (arXiv 2605.18299) as PyTorch Lightning components: train a language model to search while it reasons.

One question is followed from file to loss through seven files: `datamodules/questions.py`,
`callbacks/rollout_grouping.py`, `rollout/window.py`, `callbacks/hindsight_construction.py`, `step/collate.py`,
`module.py` and `losses/terms.py`; `types.py` is the glossary.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["Asker", "SDSearchModule", "SupervisedModule", "__version__"]


class _Checkout:
    """Finds callbacks/ and datamodules/ beside this folder, as a source checkout has them."""

    names = ("sdsearch_lightning.callbacks", "sdsearch_lightning.datamodules")
    root = Path(__file__).resolve().parent.parent

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        init = cls.root / name.rpartition(".")[2] / "__init__.py"
        if name in cls.names and init.is_file():
            return spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
        return None


sys.meta_path.append(_Checkout)  # last: a wheel's own folders and an editable install come first


def __getattr__(name: str) -> Any:
    # Lazy: `import sdsearch_lightning` (and so --help) must not pay for torch, lightning and transformers.
    homes = {"Asker": "inference.asker", "SDSearchModule": "module", "SupervisedModule": "supervised"}
    home = homes.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sdsearch_lightning.{home}"), name)
