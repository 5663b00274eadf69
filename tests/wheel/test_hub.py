"""Loading from the hub: the files, the progress, and the message of each failure."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

_GATED = {"X-Error-Code": "GatedRepo"}
_BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
_WEIGHTS = {"config.json": b"{}", "model.safetensors": b"weights"}

#: Contents or answers of the hub, and the message for each.
FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "org/private": (
        {"listing": (401, {})},
        r"the hub has no such model \(set HF_TOKEN if it is a private one\); give a folder of",
    ),
    "org/forbidden": (
        {"listing": (403, {})},
        r"the hub forbids it: the token \(HF_TOKEN\) has no right to read this model$",
    ),
    "org/busy": (
        {"listing": (429, {"Retry-After": "17"})},
        r"the hub accepts no more requests for now \(status 429\): try again in 17 s$",
    ),
    "org/down": ({"listing": (500, {})}, r"the hub answered with status 500: try again later$"),
    "org/away": ({"listing": (503, {})}, r"the hub answered with status 503: try again later$"),
    "org/gated": (
        {"files": _WEIGHTS, "denied": (401, _GATED)},
        r"only to those who accepted its terms: do so on the model's page, then set HF_TOKEN to",
    ),
    "org/gated-still": (
        {"files": _WEIGHTS, "denied": (403, _GATED)},
        r"only to those who accepted its terms: do so on the model's page, then set HF_TOKEN to",
    ),
    "org/tiny@v9": ({"files": _WEIGHTS}, r"the hub has no revision 'v9' of it$"),
    "org/gguf": (
        {"files": {"tiny.Q4_0.gguf": b"", "tiny.Q8_0.gguf": b""}},
        r"the hub has it only as GGUF: .* `hf download org/gguf tiny.Q4_0.gguf`, and give",
    ),
    "org/pickled": (
        {"files": {"config.json": b"{}", "pytorch_model.bin": b""}},
        r"there is only pytorch_model.bin, which is a pickle: convert it$",
    ),
    "org/empty": ({"files": {"config.json": b"{}"}}, r"on the hub there is none$"),
    "org/weights": ({"files": {"model.safetensors": b""}}, r"it has no config.json on the hub"),
    "org/adapter": (
        {"files": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}},
        r"what the hub has under that name is an adapter, not a model$",
    ),
    "org/odd..name": ({}, r"that is not an id of the hub; give a folder of safetensors"),
}


def test_a_model_is_fetched_once_and_only_its_own_files(
    resolve: Any, hub: Any, model_files: dict[str, bytes], needed_files: set[str]
) -> None:
    hub.add("org/tiny", model_files)
    [found] = resolve("org/tiny")
    assert "error" not in found, found
    folder = Path(found["path"])
    assert (found["name"], found["notes"]) == ("org/tiny", [])
    assert {path.name for path in folder.rglob("*") if path.is_file()} == needed_files
    for name in ("model-00001-of-00002.safetensors", "config.json"):
        assert (folder / name).read_bytes() == model_files[name]
    assert hub.fetched() == needed_files
    # Without a terminal: how much there is, then each tenth of it.
    size = r"[\d.]+ KiB"
    first, *tenths = found["log"].splitlines()
    assert re.fullmatch(rf"LOG downloading org/tiny: 7 files, {size}, to .*/hf/hub", first)
    assert re.fullmatch(rf"LOG downloading org/tiny: 100 % of {size}", tenths[-1])

    hub.requests.clear()
    [again] = resolve("org/tiny")
    assert (again["path"], again["log"]) == (found["path"], "")
    assert hub.fetched() == set()


def test_a_revision_is_named_behind_an_at_sign(
    resolve: Any, hub: Any, model_files: dict[str, bytes]
) -> None:
    hub.add("org/tiny", model_files)
    named, whole = resolve("org/tiny@v1", "org/tiny@" + hub.repositories["org/tiny"].commit)
    assert named["name"] == whole["name"] == "org/tiny"
    assert named["path"] == whole["path"]


def test_a_connection_that_is_cut_is_resumed_where_it_was(resolve: Any, hub: Any) -> None:
    # The library writes 10 MiB at a time; the first connection brings 12.
    weights = b"".join(bytes([index]) * 2**20 for index in range(24))
    hub.add("org/large", {"config.json": b"{}", "model.safetensors": weights}, num_cuts=1)
    [found] = resolve("org/large")
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == weights
    assert [wanted for *_, wanted in hub.requests if wanted] == [f"bytes={10 * 2**20}-"]
    assert re.search(r"LOG hub: Error while downloading .* Trying to resume", found["log"])
    assert "secret" not in found["log"], "the signature of an address"
    tenths = re.findall(r"downloading org/large: (\d+) % of 24 MiB", found["log"])
    assert tenths == sorted(tenths, key=int)
    assert (tenths[0], tenths[-1]) == ("40", "100")


@pytest.fixture
def failures(resolve: Any, hub: Any) -> dict[str, str]:
    """The message of each, from one process."""
    for name, (options, _) in FAILURES.items():
        hub.add(name.partition("@")[0], **options)
    return {
        name: found["error"]
        for name, found in zip(
            [*FAILURES, "org/absent"], resolve(*FAILURES, "org/absent"), strict=True
        )
    }


def test_each_failure_is_one_line_that_names_the_model_and_says_what_to_do(
    failures: dict[str, str],
) -> None:
    said = {name: reason for name, (_, reason) in FAILURES.items()}
    said["org/absent"] = r"the hub has no such model .*; give a folder of safetensors, a .gguf "
    for name, reason in said.items():
        error = failures[name]
        assert error.startswith(f"model {name!r}: no such file or folder here, and ")
        assert re.search(reason, error), f"{name}: {error}"
        assert "\n" not in error
        # Neither names of classes nor terms of our dependencies.
        assert not re.search(r"[a-z]Error|Exception|snapshot|local_files_only", error)


def test_a_token_that_the_hub_does_not_accept_is_the_reason(resolve: Any, hub: Any) -> None:
    hub.add("org/private", listing=(401, _BAD_TOKEN))
    variables = {"HF_TOKEN": "hf_expired"}
    [found] = resolve("org/private", **variables)
    assert found["error"].endswith(
        "and the hub does not accept the token: set HF_TOKEN to a valid one"
    )


def test_nothing_of_a_repository_that_is_no_model_is_fetched(
    failures: dict[str, str], hub: Any
) -> None:
    assert {"org/gguf", "org/pickled", "org/adapter"} <= failures.keys()
    assert hub.fetched() == set()


def test_a_file_that_the_hub_refuses_for_the_moment_is_asked_for_again(
    resolve: Any, hub: Any, model_files: dict[str, bytes]
) -> None:
    hub.add("org/tiny", model_files, num_faults=1)
    [found] = resolve("org/tiny")
    assert "error" not in found


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps from asking the hub"),
        ({"HF_ENDPOINT": "{nobody}"}, "it could not be fetched from {nobody}: "),
    ],
    ids=["offline", "nobody"],
)
def test_without_the_hub_the_copy_in_the_cache_is_served(
    variables: dict[str, str],
    reason: str,
    resolve: Any,
    hub: Any,
    model_files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{bound.getsockname()[1]}"
        filled = {name: value.format(nobody=nobody) for name, value in variables.items()}
        reason = reason.format(nobody=nobody)
        hub.add("org/tiny", model_files)
        [here] = resolve("org/tiny")
        [found, missing] = resolve("org/tiny", "org/absent", **filled)
        assert found["path"] == here["path"]
        [note] = found["notes"]
        assert note.startswith(f"the copy in the hub's cache is served: {reason}")
        assert missing["error"].startswith(
            f"model 'org/absent': no such file or folder here, and {reason}"
        )
        if "HF_HUB_OFFLINE" in variables:
            assert f", whose cache ({tmp_path / 'hf/hub'}) does not have it" in missing["error"]
            assert note.endswith(reason)
        # A part of a model is not a model.
        (Path(here["path"]) / "model-00002-of-00002.safetensors").unlink()
        [partial] = resolve("org/tiny", **filled)
        assert "(the hub's cache holds only some of its files)" in partial["error"]


def test_a_cache_that_cannot_be_written_is_named(
    resolve: Any, hub: Any, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("org/tiny", model_files)
    (tmp_path / "file").write_text("not a folder")
    [found] = resolve("org/tiny", HF_HOME=str(tmp_path / "file"))
    cache = re.escape(str(tmp_path / "file/hub"))
    assert re.search(
        rf"the hub's cache \({cache}\) cannot be written: .*; HF_HOME names another", found["error"]
    )
