"""The separation of API keys: cached prefixes and stored responses have owners."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from configs.schema import ServerSection
from model.fake import FakeRunner
from scheduler.client import FinishReason, GenerateRequest, TokenOutput
from server.http.keys import load_keys

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
PAGE = 4
#: (name, cache_namespace) by secret; None: not given.
KEYS: dict[str, tuple[str | None, str | None]] = {
    "sk-alice": ("alice", None),
    "sk-alice-new": ("alice", None),
    "sk-bob": ("bob", None),
    "sk-unnamed": (None, None),
    "sk-unnamed-2": ("", None),
    "sk-named-shared": ("shared", None),
    "sk-named-digest": (hashlib.sha256(b"sk-unnamed").hexdigest(), None),
    "sk-common-1": ("carol", "shared"),
    "sk-common-2": (None, "shared"),
    "sk-team-1": ("dave", "team"),
    "sk-team-2": ("erin", "team"),
    "sk-odd": ('0:=; #"\\ ~', None),
}
#: Groups that share prefixes: all other keys have a namespace of their own.
SHARING = [
    {"sk-alice", "sk-alice-new"},
    {"sk-common-1", "sk-common-2"},
    {"sk-team-1", "sk-team-2"},
]
#: Salts that try to look like a key's namespace, as well as honest ones.
SALTS = ["", "a", "0:", "5:alice", "6:=alice", "=alice", "6:=alicea", "shared", "7:=shared", "\0"]


def tenants_file(path: Path, keys: dict[str, tuple[str | None, str | None]]) -> Path:
    lines = []
    for secret, (name, namespace) in keys.items():
        lines += ["[[key]]", f"key = '{secret}'"]
        lines += [] if name is None else [f"name = '{name}'"]
        lines += [] if namespace is None else [f"cache_namespace = '{namespace}'"]
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return path


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def group_of(secret: str) -> str:
    """Return the namespace's first key."""
    return next((min(sharing) for sharing in SHARING if secret in sharing), secret)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tenants_file(tmp_path_factory.mktemp("keys") / "keys.toml", KEYS)


@pytest.fixture(scope="module")
def tenants(start_shared: Callable[..., Any], file: Path) -> Any:
    # So many pages that nothing is evicted, and so many tokens that each run begins with its own.
    runner = FakeRunner(vocab_size=60_000, num_pages=50_000)
    return start_shared(runner=runner, api_key_file=file)


def cached(live: Any, secret: str, prompt: list[int], salt: str) -> tuple[int, str]:
    """Request one token; return the number of reused tokens, and the whole report of the cache."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "ignore_eos": True}
    if salt:
        body["cache_salt"] = salt
    answer = live.http.post(COMPLETIONS, json=body, headers=bearer(secret))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    reused = told["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert told["octavo"]["cache"]["reused_tokens"] == reused
    report = json.dumps(told["octavo"]["cache"])
    # The text of the first token, by which runs differ.
    return reused, report.replace(f" {prompt[0]}", "")


_HEADS = itertools.count(1000)

Ask = tuple[str, list[int], str]


@settings(max_examples=40)
@given(
    asks=st.lists(
        st.tuples(
            st.sampled_from(sorted(KEYS)),
            st.lists(st.sampled_from([[7] * PAGE, [8] * PAGE, [9]]), min_size=1, max_size=4),
            st.sampled_from(SALTS),
        ),
        min_size=2,
        max_size=12,
    )
)
def test_what_a_key_is_told_of_the_cache_depends_on_its_namespace_alone(
    tenants: Any, asks: list[tuple[str, list[list[int]], str]]
) -> None:
    def run(some: list[Ask]) -> list[tuple[int, str]]:
        # Nothing asked before begins like this.
        head = next(_HEADS)
        return [cached(tenants, secret, [head, *prompt], salt) for secret, prompt, salt in some]

    together: list[Ask] = [(key, [*itertools.chain(*parts)], salt) for key, parts, salt in asks]
    told = run(together)
    for group in {group_of(secret) for secret, _, _ in together}:
        own = [index for index, ask in enumerate(together) if group_of(ask[0]) == group]
        # The same requests without all others get equal reports.
        assert run([together[index] for index in own]) == [told[index] for index in own]


@pytest.mark.parametrize("sharing", SHARING, ids=min)
def test_those_that_share_find_what_the_others_left(tenants: Any, sharing: set[str]) -> None:
    first, second = sorted(sharing)
    prompt = [next(_HEADS), *b"two pages"[: 2 * PAGE]]
    assert cached(tenants, first, prompt, "")[0] == 0
    assert cached(tenants, second, prompt, "")[0] == len(prompt) - 1
    assert cached(tenants, second, prompt, "salt")[0] == 0


async def answer(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    yield TokenOutput((72,) if request.prompt_token_ids else (), finish_reason=FinishReason.STOP)


def test_no_salt_leads_into_another_namespace(scripted: Callable[..., Any], file: Path) -> None:
    live = scripted(answer, api_key_file=file)

    def namespace(secret: str, salt: str | None = None) -> str:
        body = {"prompt": "x"} | ({} if salt is None else {"cache_salt": salt})
        told = live.http.post(COMPLETIONS, json=body, headers=bearer(secret))
        assert told.status_code == 200, told.text
        found: str = live.client.requests[-1].namespace
        return found

    own = {secret: namespace(secret) for secret in KEYS}
    assert len(set(own.values())) == len({group_of(secret) for secret in KEYS})
    for secret, other in itertools.permutations(sorted(KEYS), 2):
        if group_of(secret) != group_of(other):
            # The whole namespace, and its parts behind the length and behind the mark of a name.
            for start in {0, own[other].index(":") + 1, own[other].index(":") + 2}:
                assert namespace(secret, own[other][start:] or None) != own[other]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": ["x", "y"], "n": 2}),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}),
        (RESPONSES, {"input": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_every_way_to_ask_keeps_to_the_keys_namespace(
    speaking: Callable[..., Any], file: Path, path: str, body: dict[str, Any], is_stream: bool
) -> None:
    if is_stream and "best_of" in body:
        pytest.skip("best_of is not streamed")
    live = speaking("yes", template="{{ messages[0].content }}", api_key_file=file)
    seen = []
    for secret in ("sk-alice", "sk-bob", "sk-alice-new"):
        asked = {"stream": is_stream, **({"model": "fake"} | body)}
        assert live.http.post(path, json=asked, headers=bearer(secret)).status_code == 200
        seen.append({request.namespace for request in live.client.requests})
        live.client.requests.clear()
    assert [len(namespaces) for namespaces in seen] == [1, 1, 1]
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("section", [{}, {"api_key": ("sk-a", "sk-b")}])
def test_without_a_file_there_is_one_operator_and_one_namespace(
    start_server: Callable[..., Any], section: dict[str, Any]
) -> None:
    live = start_server(**section)
    prompt = [*b"the same for all"]
    assert [cached(live, key, prompt, "")[0] for key in ("sk-a", "sk-b")] == [0, len(prompt) - 1]


@pytest.mark.parametrize("section", [{"api_key": ("sk-bob",)}, {"api_key": ("sk-new",)}])
def test_a_key_of_the_command_line_beside_a_file_is_kept_apart(
    start_server: Callable[..., Any], tmp_path: Path, section: dict[str, Any]
) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-alice\nsk-bob\n")
    path.chmod(0o600)
    live = start_server(api_key_file=path, **section)
    prompt = [*b"the same for all"]
    [flag] = section["api_key"]
    assert cached(live, "sk-alice", prompt, "")[0] == 0
    assert cached(live, flag, prompt, "")[0] == 0
    assert cached(live, flag, prompt, "")[0] == len(prompt) - 1


# ---- stored responses


def stored(live: Any, secret: str, **body: Any) -> Any:
    asked = {"input": "a secret", "max_output_tokens": 2, **body}
    answer = live.http.post(RESPONSES, json=asked, headers=bearer(secret))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_response_belongs_to_the_keys_name(tenants: Any) -> None:
    for owner in KEYS:
        body = stored(tenants, owner)
        name = KEYS[owner][0]
        for secret in KEYS:
            is_own = secret == owner or (bool(name) and KEYS[secret][0] == name)
            found = tenants.http.get(f"{RESPONSES}/{body['id']}", headers=bearer(secret))
            assert found.status_code == (200 if is_own else 404), (owner, secret)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer ", "x-api-key", "both"])
def test_a_key_is_read_in_one_way(tenants: Any, scheme: str) -> None:
    body = stored(tenants, "sk-alice")
    headers = {"x-api-key": "sk-alice"} if scheme in {"x-api-key", "both"} else {}
    if scheme != "x-api-key":
        word = "Bearer" if scheme == "both" else scheme
        headers["Authorization"] = f"{word} sk-alice"
    assert tenants.http.get(f"{RESPONSES}/{body['id']}", headers=headers).status_code == 200


def test_another_keys_response_is_as_one_that_never_was(tenants: Any) -> None:
    first = stored(tenants, "sk-alice")
    second = stored(tenants, "sk-alice", previous_response_id=first["id"])
    item = second["output"][0]["id"]
    key = second["id"].removeprefix("resp_")
    missing = f"{(int(key, 16) ^ 1):048x}"

    def seen(method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str, Any]:
        sent = {**bearer("sk-bob"), "X-Request-Id": "the-same"}
        told = tenants.http.request(method, RESPONSES + path, json=body, headers=sent)
        headers = {name: value for name, value in told.headers.items() if name != "date"}
        return told.status_code, told.text.replace(key, "KEY").replace(missing, "KEY"), headers

    def asks(own: str) -> list[tuple[int, str, Any]]:
        refers = [{"id": item.replace(key, own)}]
        return [
            seen("GET", f"/resp_{own}"),
            seen("GET", f"/resp_{own}/input_items"),
            seen("GET", f"/resp_{own}/input_items?after={item.replace(key, own)}"),
            seen("POST", f"/resp_{own}/cancel", {}),
            seen("DELETE", f"/resp_{own}"),
            seen("POST", "", {"input": "x", "previous_response_id": f"resp_{own}"}),
            seen("POST", "", {"input": refers}),
        ]

    told = asks(key)
    assert told == asks(missing)
    assert [status for status, _, _ in told] == [404, 404, 404, 404, 404, 400, 400]
    # Nothing of it was harmed.
    whole = tenants.http.get(f"{RESPONSES}/{second['id']}", headers=bearer("sk-alice"))
    assert whole.json() == second


def test_two_may_use_one_request_id(tenants: Any) -> None:
    prompt = {"prompt": "one id", "max_tokens": 3, "stream": True}
    sent = {"X-Request-Id": "the-same-id"}
    answers = [
        tenants.http.post(COMPLETIONS, json=prompt, headers=bearer(secret) | sent)
        for secret in ("sk-alice", "sk-bob")
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == ["the-same-id"] * 2
    ids = [stored(tenants, "sk-alice")["id"], stored(tenants, "sk-bob")["id"]]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("name", [" ", " alice", "alice ", "a" * 65, "ö"])
@pytest.mark.parametrize("field", ["name", "cache_namespace"])
def test_a_name_that_looks_like_another_is_refused(tmp_path: Path, field: str, name: str) -> None:
    given = {"name": (name, None), "cache_namespace": (None, name)}[field]
    path = tenants_file(tmp_path / "keys.toml", {"sk-a": given})
    with pytest.raises(ValueError, match=rf"key\.0\.{field}"):
        load_keys(ServerSection(api_key_file=path))


def test_an_empty_namespace_is_refused(tmp_path: Path) -> None:
    path = tenants_file(tmp_path / "keys.toml", {"sk-a": ("a", "")})
    with pytest.raises(ValueError, match=r"key\.0\.cache_namespace"):
        load_keys(ServerSection(api_key_file=path))
