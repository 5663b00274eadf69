"""Which files of a folder hold a model's weights. Free of torch; knows nothing of the weights."""

from __future__ import annotations

from pathlib import Path

from model.formats.gguf import model_stem

#: What lies beside or instead of weights that can be read: how it begins, and what it is.
_OTHERS = {
    "consolidated": "Mistral's own format: use the model*.safetensors of the same model",
    "adapter_model": "an adapter without its base model: merge the two",
}


def safetensors_files(folder: Path) -> list[Path]:
    """Return what may be parts of one model.

    Hidden files are left out (macOS writes a `._model.safetensors` beside each file that it
    copies), and so is the same model in another format, and adapters to it.
    """
    return [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if not path.name.startswith((".", *_OTHERS))
    ]


def gguf_files(folder: Path) -> list[Path]:
    """Return a file of each model in GGUF, of a split one its first part.

    What is for pictures (`mmproj-*.gguf`) is left out.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        if not path.name.startswith((".", "mmproj")):
            found.setdefault(model_stem(path), path)
    return [*found.values()]


def other_files(folder: Path) -> str:
    """Say what else of weights there is, and why it cannot be read; nothing where there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        for begin, reason in _OTHERS.items():
            if path.name.startswith(begin):
                return f"{path.name}, which is {reason}"
    pickles = sorted(path.name for path in folder.glob("*.bin") if not path.name.startswith("."))
    return f"{pickles[0]}, which is a pickle: convert it" if pickles else ""
