"""The lint for prose: sentences that it reports, and sentences that it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.plain_english import Finding, findings_of, main

BAD = [
    ("noun-clause", "Hold what the model reads."),
    ("noun-clause", "What a step brought."),
    ("noun-clause", "Nobody reads it."),
    ("noun-clause", "Lines that nobody got to read."),
    ("noun-clause", "Note the tokens of those that matter."),
    ("noun-clause", "Whoever held the lock has built it."),
    ("noun-clause", "Which page holds which tokens, and for whom."),
    ("noun-clause", "It is known who may be the reason."),
    ("noun-clause", "Return whatever they are given."),
    ("personification", "The config says so."),
    ("personification", "Each event tells the usage."),
    ("personification", "Its end is told once."),
    ("personification", "The copies that the runner owes."),
    ("personification", "The engine died of it."),
    ("personification", "The timeout bites."),
    ("personification", "The model is shown the tools."),
    ("personification", "The system is asked for pages."),
    ("personification", "A kernel wants two planes."),
    ("personification", "The class speaks HTTP."),
    ("personification", "A lease lives for one step."),
    ("personification", "Nothing is known of the namespace."),
    ("is-no", "A missing key is no error."),
    ("is-no", "Special tokens are no text."),
    ("long", " ".join(["word"] * 31) + "."),
]

GOOD = [
    "Knows nothing of what a tensor means nor of who reads it.",
    "Where did it go, and who took it?",
    "Decides what to do next.",
    "Checks what is missing.",
    "A client that wants to wait; a caller who asks.",
    "The client, who pays, and a person who reads.",
    "Applies to all, whatever their length.",
    "Cannot tell one from the other: they are told apart by name.",
    "There is no page left, and it is no longer used.",
    "Tokens of those pages, and those of others.",
    "The text is shown on the terminal.",
    "Looks up a name.",
    'Matches `what` and "who says so".',
    "One sentence. " + " ".join(["word"] * 30) + ". Another one.",
    " ".join(["word"] * 20) + "\n\n- " + " ".join(["word"] * 20),
    "Text:\n\n    code that says what nobody reads\n",
]


def found(source: str, *, is_test: bool = False) -> list[tuple[int, str]]:
    return [(one.line, one.rule) for one in findings_of(source, is_test=is_test)]


@pytest.mark.parametrize(("rule", "sentence"), BAD)
def test_a_breach_is_found(rule: str, sentence: str) -> None:
    assert found(f"# {sentence}\n") == [(1, rule)]
    assert found(f'"""Title.\n\n{sentence}\n"""\n') == [(3, rule)]


@pytest.mark.parametrize("sentence", GOOD)
def test_plain_words_are_not_reported(sentence: str) -> None:
    assert found(f"'''Title.\n\n{sentence}\n'''\n") == []


@pytest.mark.parametrize("line", ["Whether it fits.", "The page.", "`size`: of a page.", "Fits."])
def test_a_function_begins_with_a_verb(line: str) -> None:
    source = f'def fits():\n    """{line}"""\n'
    assert found(source) == [(2, "verb-first")]
    assert found(source, is_test=True) == [(2, "verb-first")]
    assert found(source.replace("fits", "test_fits"), is_test=True) == []
    assert found("@pytest.fixture\n" + source, is_test=True) == []
    assert found("@property\n" + source) == []
    assert found(source.replace("def fits()", "class Fits")) == []
    assert found(source.replace("fits", "__init__")) == []


@pytest.mark.parametrize("line", ["Return a page.", "See `Protocol`.", "Read, then write."])
def test_verbs_are_known(line: str) -> None:
    assert found(f'def read():\n    """{line}"""\n') == []


def test_comments_on_consecutive_lines_are_read_as_one() -> None:
    words = " ".join(["word"] * 20)
    assert found(f"# {words}\n# {words}.\n") == [(1, "long")]
    assert found(f"# {words}.\n# {words}.\nx = 1  # {words}\n") == []
    assert found("x = 1\n# Good and\n# nobody knows.\n") == [(3, "noun-clause")]


def test_instructions_to_tools_are_not_prose() -> None:
    assert found("import os  # noqa: F401, E402 - nobody\n") == [(1, "noun-clause")]
    assert found("x = 1  # type: ignore[what]\n") == []


def test_an_exemption_needs_a_reason() -> None:
    assert found("# Nobody.\n# plain: allow - a quotation\n") == [(1, "noun-clause")]
    assert found("# Nobody.  # plain: allow - a quotation\n") == []
    assert found("# Nobody.  # plain: allow\n") == [(1, "allow")]
    assert found('"""Nobody.\n\nMore.\n"""  # plain: allow - a quotation\n') == []


def test_messages_are_read_on_request() -> None:
    source = 'raise ValueError(f"{name} is no number")\nlog.info("nobody reads")\n'
    assert found(source) == []
    findings = findings_of(source, is_test=False, has_messages=True)
    assert [(one.line, one.rule) for one in findings] == [(1, "is-no"), (2, "noun-clause")]


def test_the_words_around_are_shown_with_quotations() -> None:
    (finding,) = findings_of("# Rows: `num_rows` of what is read.\n", is_test=False)
    assert isinstance(finding, Finding)
    assert finding.text == "Rows: `num_rows` of what is read."


def test_the_command_prints_findings_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text("# Good.\n")
    assert main([str(tmp_path)]) == 0
    (tmp_path / "bad.py").write_text("# It says so.\n")
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "bad.py:1: personification: It says so. (" in printed
    assert "     1  in all" in printed
