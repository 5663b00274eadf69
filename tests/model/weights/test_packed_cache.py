from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch

from model.kv.arena import Arena
from model.weights.file_content import FilesState
from model.weights.packed_cache import PackedCache, Recipe
from model.weights.packed_file import PackedError, Part
from waiting import wait_until

#: Long after the files were written.
LATER_NS = 10 * 10**9


class Model:
    """Weights files and their packed parts."""

    def __init__(self, folder: Path, content: bytes = b"0", packing: str = "a" * 64) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / "model.safetensors"
        if not self.path.exists():
            self.path.write_bytes(content * 100)
        self.packing = packing
        self.parts: Mapping[str, Part] = {
            "0.o": {"weight": torch.full((1000,), float(content[0])), "num_outputs": 16}
        }

    def recipe(self, waited_ns: int = LATER_NS) -> Recipe:
        return Recipe(self.packing, FilesState.of([self.path]), time.time_ns() + waited_ns)

    def save(self, cache: PackedCache) -> Path:
        cache.offer(self.recipe(), self.parts)
        saved = cache.save()
        assert saved is not None
        return saved

    def is_kept(self, cache: PackedCache) -> bool:
        """Return whether it is found, and then check it against the saved one."""
        packed = cache.find(self.recipe())
        if packed is None:
            return False
        with closing(packed):
            found = packed.read("0.o", Arena())
        assert found["num_outputs"] == 16
        torch.testing.assert_close(found["weight"], self.parts["0.o"]["weight"], rtol=0, atol=0)
        return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "weights"


@pytest.fixture
def cache(folder: Path) -> PackedCache:
    return PackedCache(folder, min_bytes=0)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "m")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.weights"))


def records(folder: Path) -> list[Path]:
    return sorted((folder / "known").iterdir())


def test_what_was_saved_is_found(cache: PackedCache, model: Model, folder: Path) -> None:
    assert not model.is_kept(cache)
    assert cache.save() is None
    path = model.save(cache)
    assert model.is_kept(cache)
    assert model.is_kept(PackedCache(folder))
    assert files(folder) == [path]
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {one.name for one in folder.iterdir()} == {path.name, "known", "lock"}


def test_other_weights_are_not_found(cache: PackedCache, model: Model, tmp_path: Path) -> None:
    model.save(cache)
    assert not Model(tmp_path / "other", b"1").is_kept(cache)
    # Another format, version or architecture.
    assert not Model(tmp_path / "m", packing="b" * 64).is_kept(cache)
    # The same beginning of the digest, and so a candidate.
    assert not Model(tmp_path / "m", packing="a" * 63 + "b").is_kept(cache)


def test_a_changed_file_is_not_taken_for_the_old_one(cache: PackedCache, model: Model) -> None:
    model.save(cache)
    status = model.path.stat()
    content = bytearray(model.path.read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)  # A tick of the clock that stamps files.
    model.path.write_bytes(content)
    os.utime(model.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not model.is_kept(cache)


def test_the_same_content_in_another_place_is_found(
    cache: PackedCache, model: Model, tmp_path: Path, folder: Path
) -> None:
    model.save(cache)
    assert Model(tmp_path / "copy").is_kept(cache)
    time.sleep(0.02)
    model.path.touch()
    assert model.is_kept(cache)
    # Each state was read once, and is known from now on.
    assert len(records(folder)) == 3
    assert len(files(folder)) == 1


def test_the_content_is_read_once_for_each_state(
    cache: PackedCache, model: Model, tmp_path: Path, folder: Path
) -> None:
    model.save(cache)
    copy = Model(tmp_path / "copy")
    found = []
    for _ in range(2):
        found.append(copy.is_kept(cache))
        # With the records alone, since no content can be compared any more.
        recipe = copy.recipe()
        copy.path.rename(copy.path.with_name("moved"))
        with closing(cache.find(recipe) or pytest.fail("not found")):
            pass
        copy.path.with_name("moved").rename(copy.path)
        time.sleep(0.02)
    assert found == [True, True]
    assert len(records(folder)) == 3


def test_files_written_just_before_are_not_trusted(
    cache: PackedCache, model: Model, folder: Path
) -> None:
    cache.offer(model.recipe(waited_ns=0), model.parts)
    with pytest.raises(PackedError, match="in the seconds before"):
        cache.save()
    assert not model.is_kept(cache)
    # No record is written of such a state where the content was compared.
    model.save(cache)
    for record in records(folder):
        record.unlink()
    with closing(cache.find(model.recipe(waited_ns=0)) or pytest.fail("not found")):
        pass
    assert records(folder) == []


def test_files_that_change_while_they_are_packed_are_not_kept(
    cache: PackedCache, model: Model
) -> None:
    cache.offer(model.recipe(), model.parts)
    time.sleep(0.02)
    model.path.write_bytes(b"1" * 100)
    with pytest.raises(PackedError, match="changed after they were read"):
        cache.save()
    cache.offer(model.recipe(), model.parts)
    model.path.unlink()
    with pytest.raises(PackedError, match="No such file"):
        cache.save()


def test_small_weights_are_packed_each_time(folder: Path, model: Model) -> None:
    cache = PackedCache(folder)
    cache.offer(model.recipe(), model.parts)
    assert cache.save() is None
    assert not folder.exists()


# ---- the bound -----------------------------------------------------------------------------------


def test_the_least_recently_used_files_are_removed(folder: Path, tmp_path: Path) -> None:
    models = [Model(tmp_path / str(number), bytes([48 + number])) for number in range(4)]
    cache = PackedCache(folder, min_bytes=0)
    sizes = [one.save(cache).stat().st_size for one in models[:3]]
    for age_s, one in enumerate((models[1], models[0], models[2])):
        packed = cache.find(one.recipe())
        assert packed is not None
        packed.close()
        os.utime(packed.path, ns=(0, time.time_ns() + age_s * 10**9))
    bounded = PackedCache(folder, min_bytes=0, max_bytes=sum(sizes) - 1)
    models[3].save(bounded)
    assert [one.is_kept(cache) for one in models] == [True, False, True, True]
    assert sum(path.stat().st_size for path in files(folder)) <= sum(sizes)
    # No record leads to the removed file.
    assert len(records(folder)) == 3


def test_a_use_is_noted(cache: PackedCache, model: Model) -> None:
    path = model.save(cache)
    os.utime(path, ns=(0, 0))
    assert model.is_kept(cache)
    assert path.stat().st_mtime_ns > 0


def test_weights_above_the_bound_are_not_kept(folder: Path, tmp_path: Path) -> None:
    cache = PackedCache(folder, min_bytes=0, max_bytes=5000)
    small, large = Model(tmp_path / "small"), Model(tmp_path / "large", b"1")
    large.parts = {"0.o": {"weight": torch.zeros(2000)}}
    with pytest.raises(PackedError, match=r"take 7\.81 KiB, and .*weights_cache_max_bytes"):
        large.save(cache)
    assert not files(folder)
    small.save(PackedCache(folder, min_bytes=0, max_bytes=9000))
    assert small.is_kept(cache)


# ---- damage --------------------------------------------------------------------------------------


def test_a_damaged_file_is_named_and_written_again(cache: PackedCache, model: Model) -> None:
    path = model.save(cache)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:5000], b"x" + whole[1:], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(PackedError, match=r"\.weights is (cut off|damaged)"):
            cache.find(model.recipe())
        model.save(cache)
        assert path.read_bytes() == whole
        assert model.is_kept(cache)


def test_a_file_found_damaged_while_it_is_read_is_removed(cache: PackedCache, model: Model) -> None:
    path = model.save(cache)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    packed = cache.find(model.recipe())
    assert packed is not None
    with pytest.raises(PackedError, match=r"checksum of 0\.o"):
        packed.read("0.o", Arena())
    cache.remove(packed)
    assert not model.is_kept(cache)
    assert model.save(cache) == path
    assert model.is_kept(cache)


def test_a_renamed_file_is_not_taken_for_another(
    cache: PackedCache, model: Model, tmp_path: Path
) -> None:
    other = Model(tmp_path / "other", b"1")
    path, theirs = model.save(cache), other.save(cache)
    theirs.replace(path)
    with pytest.raises(PackedError, match="other weights"):
        cache.find(model.recipe())
    model.save(cache)
    assert model.is_kept(cache)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../etc/passwd", b"x" * 100])
def test_a_damaged_record_is_as_none(
    cache: PackedCache, model: Model, folder: Path, content: bytes
) -> None:
    model.save(cache)
    (record,) = records(folder)
    record.write_bytes(content)
    assert model.is_kept(cache)
    assert len(record.read_text()) > 40


def test_what_others_can_write_is_not_used(cache: PackedCache, model: Model, folder: Path) -> None:
    path = model.save(cache)
    path.chmod(0o666)
    with pytest.raises(PackedError, match="can be written by other users"):
        cache.find(model.recipe())
    model.save(cache)
    assert path.stat().st_mode & 0o777 == 0o600
    folder.chmod(0o777)
    with pytest.raises(PackedError, match="weights can be written by other users"):
        cache.find(model.recipe())
    # Its files are of unknown origin: they are removed.
    stranger = folder / ("0" * 16 + "-" + "0" * 32 + ".weights")
    stranger.touch()
    model.save(cache)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert files(folder) == [path]
    assert model.is_kept(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_another_user_is_not_used(
    cache: PackedCache, model: Model, folder: Path
) -> None:
    model.save(cache)
    os.chown(folder, 12345, 12345)
    with pytest.raises(PackedError, match="belongs to another user"):
        cache.find(model.recipe())
    with pytest.raises(PackedError, match="set OCTAVO_HOME"):
        model.save(cache)


def test_the_folder_may_be_a_link_to_another_disk(
    cache: PackedCache, model: Model, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "disk")
    model.save(cache)
    assert model.is_kept(cache)
    assert len(files(tmp_path / "disk")) == 1


# ---- a disk that does not take it ----------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_an_error_with_the_reason(
    tmp_path: Path, model: Model
) -> None:
    (tmp_path / "home").write_text("a file")
    cache = PackedCache(tmp_path / "home" / "weights", min_bytes=0)
    assert not model.is_kept(cache)
    with pytest.raises(PackedError, match="Not a directory"):
        model.save(cache)


def test_a_full_disk_leaves_nothing(cache: PackedCache, model: Model, folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(PackedError, match=r"cannot be written .*too large"):
            model.save(cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in folder.iterdir()} == {"lock"}
    assert not model.is_kept(cache)
    model.save(cache)
    assert model.is_kept(cache)


# ---- other processes -----------------------------------------------------------------------------

#: Saves weights again and again until it is killed.
SAVING = """
import sys
from pathlib import Path

from model.weights.packed_cache import PackedCache
from test_packed_cache import Model, files

folder, place = map(Path, sys.argv[1:])
model = Model(place)
print("ready", flush=True)
while True:
    model.save(PackedCache(folder, min_bytes=0))
    for path in files(folder):
        path.unlink()
"""


def test_a_killed_process_leaves_the_file_or_none(
    cache: PackedCache, model: Model, folder: Path
) -> None:
    modules = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environ = {**os.environ, "PYTHONPATH": modules}
    command = [sys.executable, "-c", SAVING, str(folder), str(model.path.parent)]
    for pause_s in (0.0, 0.003, 0.01, 0.02):
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(pause_s)
            process.send_signal(signal.SIGKILL)
        model.is_kept(cache)
    model.save(cache)
    assert model.is_kept(cache)
    # The remains of killed writers are gone.
    assert not list(folder.glob(".saving-*"))


def test_one_process_saves_at_a_time(cache: PackedCache, model: Model, folder: Path) -> None:
    path = model.save(cache)
    written_ns = path.stat().st_ctime_ns
    # The second finds the file of the first, and leaves it alone.
    model.save(cache)
    assert path.stat().st_ctime_ns == written_ns
    path.unlink()
    with (folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = PackedCache(folder, min_bytes=0)
        other.offer(model.recipe(), model.parts)
        other.save_in_background()
        time.sleep(0.05)
        assert not path.exists()
    wait_until(path.exists)
    wait_until(lambda: model.is_kept(cache))
