"""Pages of one digest have one meaning: any change of the model or of its arithmetic is another."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import ModelSection, OctavoConfig
from model.fake import FakeRunner
from model.kv.format import KV_FORMATS, KVLayout
from model.page_digest import model_files, page_digest, require_storable
from model.weights.file_content import FilesState
from model.weights.source import ModelSource

LAYOUT = KVLayout(2, 3, 64, 16, KV_FORMATS["bfloat16"])
INFO = FakeRunner().info


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a model that were written an hour ago, as far as their times can be set."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    return model


def files_of(folder: Path) -> FilesState:
    return model_files(ModelSource("safetensors", folder, "name"))


def digest_of(folder: Path) -> str:
    return page_digest(files_of(folder), OctavoConfig(), INFO, LAYOUT, "avx2")


def test_equal_models_have_equal_digests(folder: Path) -> None:
    digest = digest_of(folder)
    assert len(bytes.fromhex(digest)) == 32
    (folder / "tokenizer.json").write_text("[]")
    assert digest_of(folder) == digest


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_two_models_under_one_name_have_two_digests(folder: Path, name: str) -> None:
    digest = digest_of(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b"?")
    assert digest_of(folder) != digest


def test_any_change_of_format_or_arithmetic_changes_the_digest(folder: Path) -> None:
    files, config = files_of(folder), OctavoConfig()
    byte_activations = OctavoConfig(model=ModelSection(activation_bits="8"))
    other_format = replace(LAYOUT, other_formats={1: KV_FORMATS["float32"]})
    digests = [
        page_digest(files, config, INFO, LAYOUT, "avx2"),
        page_digest(files, config, INFO, LAYOUT, "amx"),
        page_digest(files, byte_activations, INFO, LAYOUT, "avx2"),
        page_digest(files, config, INFO, replace(LAYOUT, page_size=32), "avx2"),
        page_digest(files, config, INFO, replace(LAYOUT, format=KV_FORMATS["int8"]), "avx2"),
        page_digest(files, config, INFO, other_format, "avx2"),
        *(
            page_digest(files, config, info, LAYOUT, "avx2")
            for info in (
                replace(INFO, max_model_len=9),
                replace(INFO, dtype="float16"),
                replace(INFO, quantization="int8"),
                replace(INFO, attention_backend="torch"),
                replace(INFO, device="cuda"),
            )
        ),
    ]
    assert len(set(digests)) == len(digests)


def test_the_content_of_a_known_state_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FilesState, "is_settled", lambda *_: True)
    digest = digest_of(folder)
    monkeypatch.setattr(FilesState, "digests", lambda _: pytest.fail("the files are read again"))
    assert digest_of(folder) == digest
    [record] = (folder.parent / "home" / "digests").iterdir()
    record.write_text("damaged")
    with pytest.raises(pytest.fail.Exception, match="the files are read again"):
        digest_of(folder)


def test_a_state_that_may_still_change_is_not_kept(folder: Path) -> None:
    digest_of(folder)
    assert not (folder.parent / "home").exists()


def test_files_that_changed_while_they_were_loaded_are_refused(folder: Path) -> None:
    files = files_of(folder)
    os.utime(folder / "model.safetensors", (time.time(), 1.0))
    with pytest.raises(ValueError, match="kv_disk_path: the model's files changed"):
        page_digest(files, OctavoConfig(), INFO, LAYOUT, "")


def test_files_of_every_kind_of_model_are_found(folder: Path) -> None:
    def names(source: ModelSource) -> list[str]:
        return [Path(one.path).name for one in model_files(source).files]

    assert names(ModelSource("safetensors", folder, "")) == ["config.json", "model.safetensors"]
    assert names(ModelSource("dummy", folder / "config.json", "")) == ["config.json"]
    for number in (1, 2):
        (folder / f"m-0000{number}-of-00002.gguf").write_bytes(b"")
    first = folder / "m-00001-of-00002.gguf"
    assert len(names(ModelSource("gguf", first, ""))) == 2


@pytest.mark.parametrize(
    ("device", "has_windows", "has_draft_model", "message"),
    [
        ("cuda", False, False, "on a CPU alone, not with cuda"),
        ("cpu", False, True, "not with a draft model"),
        ("cpu", True, False, "not with a model of which some or all layers have a window"),
    ],
)
def test_pages_that_cannot_be_kept_are_refused_by_name(
    device: str, has_windows: bool, has_draft_model: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=f"kv_disk_path: .*{message}"):
        require_storable(device, has_windows=has_windows, has_draft_model=has_draft_model)
    require_storable("cpu", has_windows=False, has_draft_model=False)
