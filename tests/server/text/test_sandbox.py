"""Templates that never end, or write without end, are given up, whatever they do it with."""

from __future__ import annotations

import resource
from datetime import UTC, datetime

import pytest

from server.text.sandbox import MAX_CHARS
from server.text.template import ChatTemplate, SlowTemplateError, TemplateError

USER = [{"role": "user", "content": "x"}]
LONG = [{"role": "user", "content": "x" * 1_000_000}]

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}"
    "{% endfor %}{% endfor %}",
    "loops over a kept list": "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}"
    "{% for c in l %}{% endfor %}{% endfor %}{% endfor %}",
    "loop with its length": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% set c = loop.length %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "calls with a body": "{% macro f(n) %}{% if n %}{{ caller() }}{% call f(n - 1) %}{% endcall %}"
    "{% call f(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call f(60) %}{% endcall %}",
    "recursive loop": "{% for a in range(50) recursive %}{% if loop.depth < 20 %}"
    "{{ loop(range(50)) }}{% endif %}{% endfor %}",
    "filters in a loop": "{% for a in range(99999) %}{{ (range(99999) | list | length) }}"
    "{% set b = range(99999) | map('string') | list %}{% endfor %}",
    "loops over messages": "{% for a in range(99999) %}{% for m in messages * 1000 %}"
    "{% set c = m.content | upper %}{% endfor %}{% endfor %}",
}

LARGE = {
    "repeated": "{{ 'a' * 10 ** 9 }}",
    "repeated list": "{{ ([0] * 10 ** 9) | length }}",
    "multiplied by a list": "{{ (10 ** 9 * [0]) | length }}",
    "power": "{{ 10 ** 100000 }}",
    "power of powers": "{% set ns = namespace(n=10) %}{% for i in range(99) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "centred": "{{ 'a' | center(10 ** 9) }}",
    "method": "{{ 'a'.center(10 ** 9) }}",
    "filled": "{{ 'a'.zfill(10 ** 9) }}",
    "tabs": "{{ '\\t'.expandtabs(10 ** 9) }}",
    "indented": "{{ 'a\\nb' | indent(10 ** 9) }}",
    "indented by a text": "{% set w = 'a' * 100000 %}{{ ('\\n' * 100000) | indent(w) }}",
    "indented JSON": "{{ [1] | tojson(indent=10 ** 9) }}",
    "wide field": "{{ '%1000000000d' % 1 }}",
    "wide field by argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format by argument": "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "map": "{{ ['a'] | map('center', 10 ** 9) | list | length }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list | length }}",
    "doubled by +": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubled by a block": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set c %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = c %}{% endfor %}",
    "doubled by a macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}"
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = d(ns.s) %}{% endfor %}",
    "doubled by join": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "doubled by a method": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}",
    "doubled by replace": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s | replace('b', 'bb') | replace('b', 'ab') %}{% endfor %}",
    "replaced by much": "{% set w = 'a' * 100000 %}{{ w.replace('a', w) }}",
    "replaced between": "{% set w = 'a' * 100000 %}{{ w | replace('', w) }}",
    "doubled by a list": "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}"
    "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "nested lists written": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nested lists as JSON": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "nested lists as text": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ (ns.l | string) ~ 'a' }}",
    "nested lists in a format": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ '%s' % ns.l }}",
    "output": "{% for i in range(99999) %}{{ messages[0].content * 30 }}{% endfor %}",
    "range": "{{ range(10 ** 9) | list | length }}",
    "lorem": "{{ lipsum(n=10 ** 6) }}",
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(
        {
            "default": "{{ messages[0].content[:0] }}{% if messages[0].role == 'user' %}"
            + source
            + "{% endif %}"
        },
        special_tokens={},
        now=lambda: datetime.now(tz=UTC),
    )


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_does_not_end_is_given_up(source: str) -> None:
    with pytest.raises(SlowTemplateError, match="takes too long"):
        template(source).render(USER, limit_s=0.05)


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_what_would_write_too_much_is_refused_before_it_does(source: str) -> None:
    made = template(source)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError):
        made.render(LONG, limit_s=30)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 10 * MAX_CHARS


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% endfor %}", "1True"),
        ("{% for a in [1, 2, 3] if a != 2 %}{{ a }}{{ loop.nextitem }}{% endfor %}", "133"),
        ("{% for a in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ none }}{% endfor %}", "a1None"),
        ("{% for a in nothing %}x{% endfor %}", ""),
        ("{% for a in [[[], []]] recursive %}x{{ loop(a) }}{% endfor %}", "xxx"),
        ("{{ 2 ** 10 * 3 + 1 }} {{ 'ab' * 2 + 'c' }} {{ '%5.1f%%' % 2 }}", "3073 ababc   2.0%"),
        ("{{ [1] + [2] }} {{ '{:>3}|{}'.format(1, 'x') }}", "[1, 2]   1|x"),
        ("{{ ['a'] | join(', ') }} {{ messages | map(attribute='role') | join }}", "a user"),
        ("{{ 'a-b' | replace('-', '+') }} {{ 'x'.replace('x', 'yy') }}", "a+b yy"),
        ("{{ 1767225600000 }} {{ 1767225600 | string }} {{ {'t': 1767225600} | tojson }}",
         '1767225600000 1767225600 {"t": 1767225600}'),
    ],
)  # fmt: skip
def test_what_templates_do_they_may_still_do(source: str, expected: str) -> None:
    assert template(source).render(USER) == expected


def test_a_thread_has_its_own_time() -> None:
    short, long_one = template(ENDLESS["loops"]), template("{{ messages | length }}")
    with pytest.raises(SlowTemplateError):
        short.render(USER, limit_s=0.01)
    assert long_one.render(USER, limit_s=0.01) == "1"
