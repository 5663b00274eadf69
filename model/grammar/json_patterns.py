"""Patterns of JSON Schema (ECMA-262) translated to the grammar library's syntax (Rust's).

In a JSON string, a class with all control characters wrongly includes the quote and the backslash
in the library. So every class here leaves out U+0000.
"""

from __future__ import annotations

import re

_ESCAPE = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|[pP]\{[^}]{0,40}\}|.)"
_TOKEN = re.compile(
    rf"\[(?P<negation>\^?)(?P<body>(?:\\.|[^\\\]])*)(?P<end>\]?)|(?P<escape>{_ESCAPE})"
    r"|(?P<group>\(\?(?:P?<\w+>|i?:|i\)|<?[=!])?)"
    r"|(?P<quantifier>[*+?]|\{\d+(?:,\d*)?\})(?P<mode>[?+]?)|(?P<other>\{,\d*\}|.)",
    re.DOTALL,
)
_IN_CLASS = re.compile(rf"(?P<set>-?\\[dDwWsS]-?)|(?P<escape>{_ESCAPE})|(?P<other>--|.)", re.DOTALL)
_DOT = r"[^\n\r\x{2028}\x{2029}\x00]"
#: By letter the characters in every reading of it, and in any: ECMA-262's, and Python's of Unicode.
_NARROW = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}
_WIDE = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}\p{M}_", "s": r"\s\x{1c}-\x{1f}\x{85}\x{feff}"}
_SPACES = r"\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_ECMA = {**_NARROW, "s": _NARROW["s"] + _SPACES}


def translated(pattern: str, *, is_exact: bool = False) -> str:
    r"""Translate a pattern to Rust's syntax; of two readings, take the one that matches less.

    `is_exact`: as ECMA-262 reads it, not narrower. Raises `ValueError` for constructs without a
    translation; look-arounds and `\b` are left for the library to refuse.
    """
    narrow, wide = (_ECMA, _ECMA) if is_exact else (_NARROW, _WIDE)
    return "".join(_translated(found, narrow, wide) for found in _TOKEN.finditer(pattern))


def _translated(found: re.Match[str], narrow: dict[str, str], wide: dict[str, str]) -> str:
    escape, group = found["escape"], found["group"]
    if found["body"] is not None:
        return _class(found, narrow, wide)
    if escape is not None:
        text = _escaped(escape, narrow, wide)
        if text == r"\x{0}":
            raise ValueError("has U+0000")
        return rf"[{text}&&[^\x00]]" if escape[1] in "dDwWsSpP" else text
    if group is not None:
        if group == "(?":
            raise ValueError("has a group of a kind that is not known")
        return "(?:" if group[-1] == ">" else group
    if found["quantifier"] is not None:
        if found["mode"] == "+":
            raise ValueError("has a possessive quantifier")
        # A lazy quantifier matches the same texts.
        return found["quantifier"]
    other = found["other"]
    if other == "\0" or len(other) > 1:
        raise ValueError(f"has {other!r}")
    return {".": _DOT, "{": r"\{", "}": r"\}", "]": r"\]"}.get(other, other)


def _class(found: re.Match[str], narrow: dict[str, str], wide: dict[str, str]) -> str:
    if not found["body"] or not found["end"]:
        raise ValueError("has an empty class, or one that is not closed")
    if found["negation"]:
        return rf"[^{_class_body(found['body'], wide, narrow)}\x00]"
    return rf"[[{_class_body(found['body'], narrow, wide)}]&&[^\x00]]"


def _class_body(body: str, narrow: dict[str, str], wide: dict[str, str]) -> str:
    parts: list[str] = []
    for found in _IN_CLASS.finditer(body):
        text = found.group()
        if found["set"]:
            # A hyphen beside a set is not a range.
            dashes = [r"\-" if text[0] == "-" else "", r"\-" if text[-1] == "-" else ""]
            parts += [dashes[0], _escaped(text.strip("-"), narrow, wide), dashes[1]]
        elif found["escape"]:
            parts.append(r"\x08" if text == r"\b" else _escaped(text, narrow, wide))
        elif text == "--":
            raise ValueError("has -- in a class")
        else:
            # Rust has classes in classes, and operators between them.
            parts.append(text if text.isalnum() or text == "-" else rf"\x{{{ord(text):x}}}")
    return "".join(parts)


def _escaped(escape: str, narrow: dict[str, str], wide: dict[str, str]) -> str:
    kind, rest = escape[1], escape[2:].strip("{}")
    if kind in narrow:
        return f"[{narrow[kind]}]"
    if kind.lower() in narrow:
        return f"[^{wide[kind.lower()]}]"
    if kind in "xu" and rest:
        return rf"\x{{{int(rest, 16):x}}}"
    if kind in "tnrfvb" or (kind in "pP" and rest):
        return escape
    if kind.isalnum():
        raise ValueError(f"has {escape}, which is not known")
    return rf"\x{{{ord(kind):x}}}"
