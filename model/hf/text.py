"""The text decoder of a multimodal model, loaded without the model's other parts.

Such a model of `transformers` is a text decoder beside towers and projectors. Text alone does not
use these, so they are not loaded, and calling one is an error. Knows nothing of pages or of
architectures: it leaves out every part beside the decoder, except for the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import transformers
from torch import nn

from configs.sizes import format_size
from model.architectures.arch import ArchError


class _LeftOut(nn.Module):
    """Replaces a part that text does not need."""

    def __init__(self, name: str, part: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.num_bytes = sum(one.nbytes for one in (*part.parameters(), *part.buffers()))

    def forward(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise ArchError(f"its text goes through {self.name}, which is not for text")


def decoder_of(model: Any) -> Any:  # noqa: ANN401 - transformers' classes
    """Return the layers of a model: the module from tokens to hidden states."""
    body = model.get_decoder()
    # In some models `get_decoder` returns the last linear layer.
    return body if isinstance(body, transformers.PreTrainedModel) else model.base_model


def text_class(model_class: Any) -> Any:  # noqa: ANN401 - as above
    """Return `model_class` without the parts that are not for text.

    `from_pretrained` makes a model on the meta device, then loads the tensors of its modules: the
    other parts are never allocated.
    """

    def init(self: Any, *args: object, **kwargs: object) -> None:  # noqa: ANN401 - as above
        model_class.__init__(self, *args, **kwargs)
        _leave_out(self)

    # transformers reads the name and the file of a class.
    attributes = {"__init__": init, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), attributes)


def _leave_out(model: Any) -> None:  # noqa: ANN401 - as above
    """Replace the siblings of the decoder and of its parents, and other models within it."""
    body, head = decoder_of(model), model.get_output_embeddings()
    above = {id(one) for one in model.modules() if one is not body and body in one.modules()}
    within = {id(one) for one in body.modules()} - {id(body)}
    names = {id(module): name for name, module in model.named_modules()}
    for parent in list(model.modules()):
        for part in list(parent.children()):
            is_beside = id(parent) in above and id(part) not in above and part is not body
            is_model = id(part) in within and _is_another(part, body)
            has_weights = any(True for _ in part.parameters())
            if (is_beside or is_model) and has_weights and head not in part.modules():
                model.set_submodule(names[id(part)], _LeftOut(names[id(part)], part))


def _is_another(part: nn.Module, body: Any) -> bool:  # noqa: ANN401 - as above
    """Return whether a part is a model with another config than the decoder's."""
    return isinstance(part, transformers.PreTrainedModel) and part.config is not body.config


def left_out(model: nn.Module) -> dict[str, int]:
    """Return the parts that were left out: name to size in bytes."""
    parts = (part for part in model.modules() if isinstance(part, _LeftOut))
    return {part.name: part.num_bytes for part in parts}


def notes_on_parts(model: nn.Module) -> Iterator[str]:
    """Yield a note on the parts left out and their size."""
    if parts := left_out(model):
        size = format_size(sum(parts.values()))
        yield f"text alone is served; not loaded: {', '.join(parts)} ({size})"
