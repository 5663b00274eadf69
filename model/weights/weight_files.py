"""Which files of a folder hold a model's weights. Free of torch; knows nothing of the weights."""

from __future__ import annotations

from pathlib import Path

from model.formats.gguf import model_stem

#: Files beside or instead of readable weights: the beginning of the name and a description.
_OTHERS = {
    "consolidated": "Mistral's own format: use the model*.safetensors of the same model",
    "adapter_model": "an adapter without its base model: merge the two",
}


def safetensors_files(folder: Path) -> list[Path]:
    """Return the files that may be parts of one model.

    Hidden files are left out (macOS writes a `._model.safetensors` beside each copied file), and
    so are adapters and the same model in another format.
    """
    return [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if not path.name.startswith((".", *_OTHERS))
    ]


def gguf_files(folder: Path) -> list[Path]:
    """Return a file of each model in GGUF, of a split one its first part.

    Projectors of images (`mmproj-*.gguf`) are left out.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        if not path.name.startswith((".", "mmproj")):
            found.setdefault(model_stem(path), path)
    return [*found.values()]


def other_files(folder: Path) -> str:
    """Describe weights that cannot be read, with the reason; empty if there are none."""
    for path in sorted(folder.glob("*.safetensors")):
        for begin, reason in _OTHERS.items():
            if path.name.startswith(begin):
                return f"{path.name}, which is {reason}"
    pickles = sorted(path.name for path in folder.glob("*.bin") if not path.name.startswith("."))
    return f"{pickles[0]}, which is a pickle: convert it" if pickles else ""
