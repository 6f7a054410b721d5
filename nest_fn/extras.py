"""Optional packages, imported where they are needed; an error of one line names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any

EXTRAS: dict[str, dict[str, tuple[str, ...]]] = {  # extra of pyproject.toml: package: names that must exist in it
    "audio": {"soundfile": ("SoundFile", "SoundFileError")},
    "analysis": {"matplotlib": ("__version__",)},
    "parquet": {"pyarrow.parquet": ("ParquetFile",), "pyarrow.ipc": ("open_stream",)},
    "remote": {"fsspec": ("filesystem",), "fsspec.core": ("url_to_fs",)},
    "log": {"tensorboard": ("__version__",)},
    "wandb": {"wandb": ("init",)},
    "text": {"sentencepiece": ("SentencePieceProcessor",)},
    "tokenizers": {"tokenizers": ("Tokenizer",)},
    "beam": {"flashlight.lib.text.decoder": ("LexiconFreeDecoder",)},
    "completion": {"shtab": ("complete",)},
    "report": {"matplotlib": ("rc_context",), "matplotlib.figure": ("Figure",)},
    "export": {"safetensors": ("safe_open",), "onnx": ("ModelProto",), "onnxscript": ("ir",)},
}


def load_extra(package: str) -> Any:
    """Import and return a package. Raises ``ImportError``, one line, if it is missing, broken or lacks the names."""
    extra = next(name for name, packages in EXTRAS.items() if package in packages)
    install = f"pip install 'nest-fn[{extra}]'"
    try:
        module = importlib.import_module(package)
    except Exception as error:  # a package built for other versions fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]:
            raise ImportError(f"the package {package} is not installed: {install}") from error
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise ImportError(f"the package {package} does not load ({reason}); install it anew: {install}") from error
    missing = [name for name in EXTRAS[extra][package] if not hasattr(module, name)]
    if missing:
        version = getattr(module, "__version__", "of unknown version")
        raise ImportError(
            f"the package {package} {version} has no {missing[0]}; install another version: {install} --upgrade"
        )
    return module


def has_extra(package: str) -> bool:
    """Whether ``load_extra`` can import the package."""
    try:
        load_extra(package)
    except ImportError:
        return False
    return True
