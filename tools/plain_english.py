"""Lint for docstrings and comments: `python tools/plain_english.py [paths]`.

Reports the turns of phrase that CONTRIBUTING.md rules out, as `file:line: rule: text (advice)`, and
counts them by rule and folder. `--messages` also reads the strings passed to logs and exceptions. A
comment `# plain: allow - reason` in the comment block, or behind a docstring's end, exempts it.
Knows nothing of grammar: it matches words, and prefers to miss a breach over a false report.
"""

# ruff: noqa: T201 - findings are printed on the terminal

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = (
    "cache",
    "configs",
    "model",
    "scheduler",
    "server",
    "loadtest",
    "tools",
    "bench",
    "tests",
)
MAX_WORDS = 30

_VERBS = """
    abort accept accumulate acknowledge acquire adapt add adjust admit advance allocate allow
    alternate answer append apply arrange assemble assert assign attach attend await balance batch
    begin bind bisect block bound break bring broadcast buffer build bump bypass cache calculate
    call cancel capture carry cast chain change check choose claim clamp classify clean clear clip
    close coerce collapse collate collect combine commit compact compare compile complete compose
    compress compute concatenate concede configure confirm connect consult consume contain
    continue convert copy correct count cover create cut deal decide declare decode decompress
    decrease decrement defer define defuse delay delegate delete deliver demand demote deny depart
    dequantize derive describe detach detect determine disable discard disconnect dispatch
    displace distribute divide do double download draft drain draw drive drop dump duplicate elide
    embed emit empty emulate enable encode end enforce enqueue ensure enter enumerate erase escape
    estimate evaluate evict exchange exclude execute exempt exit expand expect expire explain
    export expose extend extract fail fake fall feed fetch fill filter finalize find finish fit
    fix flag flatten flush fold follow forbid force forget fork format forward free freeze fuse
    gather generate get give go grant group grow guarantee guard guess halve hand handle hash hide
    hold ignore import impose include increase increment index infer inform initialize inject
    insert inspect install intercept interpret interrupt invoke isolate issue iterate join judge
    keep kick kill land launch lay learn lease leave let limit link list listen load locate lock
    log look lower maintain make map mark mask match measure merge mirror mix modify monitor mount
    move multiply name nest normalize note notify nudge observe obtain offer offload omit open
    order overlap overwrite own pack pad parse partition pass patch pause peek perform permit
    persist pick pin pipe place plan poison poll pop populate post preempt prefer prepare prevent
    print prioritize probe process produce promise promote propagate propose prove provide prune
    publish pull push put quantize query queue quote raise rank reach read rebuild recall receive
    reclaim recognize recompute record recover redirect reduce refresh refuse register reject
    relay release reload remember remove rename render renew reopen repeat replace replay
    replicate reply report request require reserve reset resize resolve respond restart restore
    resume retire retry return reuse reverse revert rewrite roll rotate round route run sample
    sanitize satisfy save scale scan scatter schedule score scrape seal search see seed select
    send separate serialize serve set settle shape share shift ship shorten show shrink shut
    signal simulate skip sleep slice snapshot solve sort spawn spell split stage stamp start step
    stitch stop store stream strip submit subscribe subtract sum supply suppress suspend swap
    switch synchronize tag take tear terminate test tie tile time toggle tokenize touch trace
    track train transform translate transpose trim truncate try tune turn undo unify unload unlock
    unpack unpin unregister unwrap update upgrade upload use validate vary verify visit wait wake
    walk warm warn watch weigh widen wrap write yield zero
"""
#: Words that may begin the docstring of a function.
VERBS = frozenset(_VERBS.split())

#: Subjects for which these verbs are right.
_PERSON = (
    r"\b(?:client|caller|user|operator|person|reader|author|maintainer|people)s?(?: who| that)? $"
)
_BE = r"(?:is|are|was|were|be|been|being)"

#: The verb of a living being, and what to write instead.
PERSONIFICATIONS: tuple[tuple[str, str], ...] = (
    (r"tell(?:s|ing)?\b(?! \w+ (?:apart|from)| apart)", "reports, returns, sends, states"),
    (r"told\b(?! apart)", "reported, sent, given, notified"),
    (r"says?(?!,)|saying", "states, sets, contains, logs, reports"),
    (r"said", "stated, set, logged, reported"),
    (r"owe[sd]?", "has to return, still needs"),
    (r"(?:dies?|died|dying) (?:of|from)", "crashes because of, is ended by"),
    (r"bites?|bitten", "fires, applies, on_timeout"),
    (
        rf"{_BE} shown(?= (?!in|on|only|with|as|beside|by|here|if|when|meanwhile|whole)\w)",
        "receives, contains",
    ),
    (rf"{_BE} asked", "is requested, is queried, is called"),
    (r"speak(?:s|ing)?|spoken", "uses, implements, produces"),
    (r"hears?|heard", "receives, is notified"),
    (r"wants|wanted", "needs, requests, requires"),
    (r"wishes|wished", "requests, needs"),
    (r"believe[sd]?", "assumes"),
    (r"thinks|thought", "assumes, computes"),
    (r"remembers|remembered", "keeps, stores"),
    (rf"(?<!to ){_BE} known (?:of|to(?! (?:be|have)\b))", "is in, is registered with"),
    (r"lives|lived", "is, lasts, is stored, stays alive"),
    (r"looks(?! (?:up|for|like|right|wrong|the same|alike))", "inspects, reads, checks"),
)

_IS_NO = re.compile(
    r"(?<!\bthere )\b(?:is|are|was|were) no "
    r"(?!longer|more|less|further|later|earlier|different|other|one\b)",
    re.IGNORECASE,
)
_REPORTING = "explain|describe|show|see|decide|determine|check|report|state|record|specify"
#: A pronoun in place of a noun, and a pattern for the words after which it is allowed.
NOUN_CLAUSES: tuple[tuple[str, str], ...] = (
    (r"whoever|whomever|nobody|somebody|everybody|anybody", r"(?!)"),
    (r"those (?:who|that|which|whose)", r"(?!)"),
    (
        r"what(?! (?:to|if|kind|is wrong|is missing|happens)\b)",
        rf"\b(?:no matter|(?:{_REPORTING})(?:e?s|ed|ing)?) $",
    ),
    (r"whatever", r"(?:, |\bfor )$"),
    (
        r"whom?(?! else\b)",
        r"(?<!\band)(?<!\bor)(?<!\bof)(?<!\bto)(?<!\bby)(?<!\bfor)(?<!\bwith)(?<!\bknown) $",
    ),
)


@dataclass(frozen=True, slots=True)
class Text:
    """A docstring, a block of comments or a message, without its marks."""

    line: int
    prose: str
    #: Of a function whose first line must be a verb.
    is_command: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A breach of one rule."""

    line: int
    rule: str
    text: str
    advice: str


# ---- reading a file --------------------------------------------------------------------------


_ALLOW = re.compile(r"#\s*plain: allow\b[\s:,-]*(.*)")
#: Instructions to tools; a reason may follow them.
_PRAGMA = re.compile(
    r"^(?:ruff: |flake8: )?noqa(?::\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*)?\s*-?\s*|^type: ignore\S*\s*|"
    r"^pragma: .*|^mypy: .*|^fmt: \w+|^!.*"
)


def texts(source: str, *, is_test: bool, has_messages: bool = False) -> Iterator[Text | Finding]:
    """Yield the prose of a file, and a finding for each exemption without a reason."""
    allowed: set[int] = set()
    comments: list[tuple[int, int, str, bool]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        if exemption := _ALLOW.search(token.string):
            allowed.add(line)
            if not exemption[1].strip():
                yield Finding(line, "allow", token.string, "give the reason")
        else:
            is_own_line = not token.line[:column].strip()
            comments.append((line, column, token.string.lstrip("#:").strip(), is_own_line))
    tree = ast.parse(source)
    found = [*_blocks(comments), *_docstrings(tree, is_test=is_test)]
    if has_messages:
        found += _messages(tree)
    for text, last_line in found:
        if allowed.isdisjoint(range(text.line, last_line + 1)):
            yield text


def _blocks(comments: list[tuple[int, int, str, bool]]) -> Iterator[tuple[Text, int]]:
    """Join comments on consecutive lines in the same column."""
    block: list[str] = []
    first = last = last_column = 0
    for line, column, words, is_own_line in [*comments, (-1, -1, "", False)]:
        follows = is_own_line and line == last + 1 and column == last_column
        if block and not follows:
            yield Text(first, "\n".join(block)), last
            block = []
        if not block:
            first = line
        block.append("" if words.startswith(("---", "===")) else _PRAGMA.sub("", words))
        last, last_column = line, column


def _docstrings(tree: ast.AST, *, is_test: bool) -> Iterator[tuple[Text, int]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        place = node.body[0]
        is_command = not isinstance(node, ast.Module | ast.ClassDef) and _is_command(
            node, is_test=is_test
        )
        yield Text(place.lineno, docstring, is_command), place.end_lineno or place.lineno


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_test: bool) -> bool:
    """Return whether a docstring must begin with a verb; properties and fixtures are nouns."""
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    is_special = node.name.startswith("__") and node.name.endswith("__")
    if is_test and (node.name.startswith("test_") or "fixture" in decorators):
        return False
    return not is_special and "property" not in decorators


def _messages(tree: ast.AST) -> Iterator[tuple[Text, int]]:
    """Yield the strings passed to logs and to exceptions."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        is_log = isinstance(call.func, ast.Attribute) and "log" in ast.unparse(call.func.value)
        if not (isinstance(node, ast.Raise) or is_log):
            continue
        for argument in call.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Text(argument.lineno, argument.value), argument.lineno
            elif isinstance(argument, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else "`x`"
                    for part in argument.values
                )
                yield Text(argument.lineno, "".join(parts)), argument.lineno


# ---- rules -----------------------------------------------------------------------------------


def check(text: Text) -> Iterator[Finding]:
    """Yield the breaches in a text."""
    if text.is_command and (finding := _check_first_word(text)):
        yield finding
    for sentence in sentences(text):
        yield from _breaches(sentence)


def _check_first_word(text: Text) -> Finding | None:
    first_line = text.prose.partition("\n")[0]
    word = re.match(r"[A-Za-z]+(?=[\s,.:]|$)", first_line)
    if word is None or word[0].lower() not in VERBS:
        return Finding(text.line, "verb-first", first_line, "begin with a verb: Return, Check, ..")
    return None


@dataclass(frozen=True, slots=True)
class Sentence:
    """Part of a paragraph: as it is shown, and with its quotations blanked (of the same length)."""

    plain: str
    shown: str
    #: Where each of its lines begins, and the line's number.
    starts: list[tuple[int, int]]

    def finding(self, rule: str, match: re.Match[str], advice: str) -> Finding:
        """Return a finding with the words around a match of `plain`."""
        line = max((start, line) for start, line in self.starts if start <= match.start())[1]
        begin = max(0, match.start() - 30)
        around = self.shown[begin : match.end() + 30].strip()
        return Finding(line, rule, ("..." if begin else "") + around, advice)


def sentences(text: Text) -> Iterator[Sentence]:
    """Split at full stops, empty lines and the items of lists; skip indented code and drawings."""
    paragraph: list[tuple[int, str]] = []
    for line, words in enumerate([*text.prose.split("\n"), ""], start=text.line):
        item = re.match(r"\s*(?:[-*|+]|\d+\.)\s", words)
        is_code = words.startswith("    ") or any(mark in words for mark in "│─▼└┌")
        if not words.strip() or item or is_code:
            yield from _split(paragraph)
            paragraph = []
        if words.strip() and not is_code:
            paragraph.append((line, words[item.end() if item else 0 :].strip()))


def _split(paragraph: list[tuple[int, str]]) -> Iterator[Sentence]:
    shown, starts = "", []
    for line, words in paragraph:
        starts.append((len(shown), line))
        shown += words + " "
    plain = re.sub(r"`[^`]*`|\"[^\"]{1,60}\"", lambda quoted: "x" * len(quoted[0]), shown)
    begin = 0
    for end in [*(match.end() for match in re.finditer(r"[.?!][)']?\s", plain)), len(plain)]:
        if plain[begin:end].strip():
            from_here = [(max(0, start - begin), line) for start, line in starts if start < end]
            yield Sentence(plain[begin:end].rstrip(), shown[begin:end].rstrip(), from_here)
        begin = end


def _breaches(sentence: Sentence) -> Iterator[Finding]:
    plain = sentence.plain
    num_words = len(plain.split())
    if num_words > MAX_WORDS and (match := re.match(r"\W*\w+", plain)):
        yield sentence.finding("long", match, f"{num_words} words: split the sentence")
    for match in _IS_NO.finditer(plain):
        yield sentence.finding("is-no", match, "is not a .., does not ..")
    if plain.endswith("?") or re.match(r"Knows? nothing", plain):
        return
    advice = "name the thing: the tokens that .., the requests that .., the caller"
    for pattern, exception in NOUN_CLAUSES:
        for match in _matches(pattern, plain, unless_after=exception):
            yield sentence.finding("noun-clause", match, advice)
    for pattern, advice in PERSONIFICATIONS:
        for match in _matches(pattern, plain, unless_after=_PERSON):
            yield sentence.finding("personification", match, advice)


def _matches(pattern: str, plain: str, *, unless_after: str) -> Iterator[re.Match[str]]:
    for match in re.finditer(rf"(?<![-\w])(?:{pattern})(?![-\w])", plain, re.IGNORECASE):
        if not re.search(unless_after, plain[: match.start()], re.IGNORECASE):
            yield match


# ---- the command -----------------------------------------------------------------------------


def findings_of(source: str, *, is_test: bool, has_messages: bool = False) -> list[Finding]:
    """Return the breaches in a file's source, in order."""
    found: list[Finding] = []
    for text in texts(source, is_test=is_test, has_messages=has_messages):
        found += [text] if isinstance(text, Finding) else check(text)
    return sorted(found, key=lambda finding: finding.line)


def python_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files among the paths and in their folders."""
    for path in paths:
        if path.is_file():
            yield path
        else:
            yield from sorted(
                file for file in path.rglob("*.py") if "node_modules" not in file.parts
            )


def main(arguments: list[str] | None = None) -> int:
    """Print all findings; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--messages", action="store_true", help="also read logs and exceptions")
    options = parser.parse_args(arguments)
    paths = options.paths or [path for path in map(Path, FOLDERS) if path.is_dir()]
    counts: Counter[tuple[str, str]] = Counter()
    for path in python_files(paths):
        is_test = "tests" in path.parts
        for finding in findings_of(
            path.read_text(), is_test=is_test, has_messages=options.messages
        ):
            print(f"{path}:{finding.line}: {finding.rule}: {finding.text} ({finding.advice})")
            counts[finding.rule, path.parts[0] if len(path.parts) > 1 else "."] += 1
    for (rule, folder), count in sorted(counts.items()):
        print(f"{count:6}  {rule}  {folder}")
    print(f"{counts.total():6}  in all")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
