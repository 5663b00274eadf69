"""Chat templates that an operator may choose by name if a model has none or a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

NAMED_TEMPLATES: Mapping[str, str] = {
    path.stem: path.read_text(encoding="utf-8").removesuffix("\n")
    for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))
}


def chosen_template(chosen: str) -> str:
    """Return the source of the template in a file or of a built-in name. Raises `ValueError`."""
    if chosen in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[chosen]
    names = ", ".join(NAMED_TEMPLATES)
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"is neither a file nor the name of a built-in template ({names})"
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {error}"
    raise ValueError(f"chat_template: {chosen!r} {message}")
