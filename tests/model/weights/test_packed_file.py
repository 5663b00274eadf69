from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.kv.arena import Arena
from model.weights.packed_file import PackedError, PackedFile, Part, num_bytes_of, write_packed
from waiting import TIMEOUT_S

PARTS: dict[str, Part] = {
    "0.qkv": {
        "weight": torch.arange(6000, dtype=torch.int16).view(torch.bfloat16).view(3, 10, 200),
        "scales": torch.linspace(-1, 1, 77),
        "codes": torch.arange(256, dtype=torch.int64).to(torch.uint8).view(4, 64),
        "minimums": None,
        "num_outputs": 48,
        "factor": 0.1,
    },
    "norm": {"tensor": torch.tensor([float("nan"), float("inf"), -0.0])},
    "empty": {"tensor": torch.empty(0, 3), "scalar": torch.tensor(7, dtype=torch.int32)},
    "notes": {"names": "ä, b", "is_tied": True},
}
FACTS = {"files": [[12, ["ab", "cd"]]], "packing": "x"}


def write(path: Path, parts: Mapping[str, Part] = PARTS) -> Path:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        assert write_packed(descriptor, parts, FACTS) == path.stat().st_size
    finally:
        os.close(descriptor)
    return path


def map_all(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)


def read(path: Path) -> dict[str, dict[str, object]]:
    """Read a file twice: mapped, and into memory."""
    with closing(PackedFile.open(path, map_all)) as packed:
        assert_same({name: dict(packed.read(name, Arena())) for name in PARTS})
    with closing(PackedFile.open(path)) as packed:
        assert packed.facts == FACTS
        return {name: dict(packed.read(name, Arena())) for name in PARTS}


def assert_same(found: Mapping[str, Mapping[str, object]]) -> None:
    for name, part in PARTS.items():
        assert found[name].keys() == part.keys()
        for attribute, value in part.items():
            other = found[name][attribute]
            if not isinstance(value, Tensor):
                assert other == value
                assert type(other) is type(value)
                continue
            assert isinstance(other, Tensor)
            assert (other.dtype, other.shape) == (value.dtype, value.shape)
            # By bytes: NaN is not equal to itself, and -0 is to 0.
            flat, expected = other.reshape(-1), value.reshape(-1)
            assert torch.equal(flat.view(torch.uint8), expected.view(torch.uint8))


def test_parts_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = write(tmp_path / "w")
    assert_same(read(path))
    assert path.stat().st_size > num_bytes_of(PARTS)


def test_the_order_of_parts_changes_nothing(tmp_path: Path) -> None:
    reverse = dict(reversed(PARTS.items()))
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b", reverse).read_bytes()


def test_tensors_larger_than_one_read_have_one_checksum(tmp_path: Path) -> None:
    # Longer than a piece that is written, and ends within one.
    large = torch.arange(3 * 2**19 + 5)
    path = write(tmp_path / "w", {"large": {"tensor": large}})
    with closing(PackedFile.open(path)) as packed:
        found = packed.read("large", Arena())["tensor"]
    assert isinstance(found, Tensor)
    assert torch.equal(found, large)


def test_each_tensor_can_be_mapped(tmp_path: Path) -> None:
    content = write(tmp_path / "w").read_bytes()
    for part in PARTS.values():
        for value in part.values():
            if isinstance(value, Tensor) and value.nbytes > 64:
                raw = bytes(value.reshape(-1).view(torch.uint8).tolist())
                assert content.index(raw) % 4096 == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("written") / "w").read_bytes()


def read_content(content: bytes, tmp_path: Path) -> dict[str, dict[str, object]]:
    path = tmp_path / "changed"
    path.write_bytes(content)
    path.chmod(0o600)
    return read(path)


@given(data=st.data())
def test_any_changed_byte_is_found_or_changes_nothing(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    where = data.draw(st.integers(0, len(written) - 1))
    value = data.draw(st.integers(0, 255))
    changed = written[:where] + bytes([value]) + written[where + 1 :]
    folder = tmp_path_factory.mktemp("changed")
    try:
        found = read_content(changed, folder)
    except PackedError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are allowed
    else:
        assert_same(found)


@given(data=st.data())
def test_a_file_cut_off_anywhere_is_refused(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    length = data.draw(st.integers(0, len(written) - 1))
    with pytest.raises(PackedError, match=r"cut off|damaged"):
        read_content(written[:length], tmp_path_factory.mktemp("cut"))
    with pytest.raises(PackedError, match="lengthened"):
        read_content(written + b"x", tmp_path_factory.mktemp("long"))


def test_a_file_without_its_last_write_is_refused(tmp_path: Path, written: bytes) -> None:
    """The prefix comes last: everything else may be there."""
    with pytest.raises(PackedError, match="another version"):
        read_content(bytes(28) + written[28:], tmp_path)


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w")
    with closing(PackedFile.open(path)) as packed:
        os.truncate(path, 4096)
        with pytest.raises(PackedError, match="cut off"):
            packed.read("0.qkv", Arena())


def test_mapped_tensors_outlive_the_file_and_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "w")
    packed = PackedFile.open(path, map_all)
    found = {name: dict(packed.read(name, Arena())) for name in PARTS}
    packed.close()
    path.unlink()
    assert_same(found)
    codes = found["0.qkv"]["codes"]
    assert isinstance(codes, Tensor)
    codes.zero_()  # A write stays in this process, and is not an error.


def test_a_missing_part_is_an_error(tmp_path: Path) -> None:
    packed = PackedFile.open(write(tmp_path / "w"))
    with pytest.raises(PackedError, match=r"has no part 1\.qkv"):
        packed.read("1.qkv", Arena())
    packed.close()


def test_only_this_users_own_files_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "w")
    path.chmod(0o620)
    with pytest.raises(PackedError, match="can be written by other users"):
        PackedFile.open(path)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(PackedError, match="link cannot be read"):
        PackedFile.open(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(PackedError, match="pipe is not a file"):
        PackedFile.open(tmp_path / "pipe")
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(PackedError, match="folder is not a file"):
        PackedFile.open(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        PackedFile.open(tmp_path / "absent")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "w")
    os.chown(path, 12345, 12345)
    with pytest.raises(PackedError, match="belongs to another user"):
        PackedFile.open(path)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(tmp_path / "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(PackedError):
        PackedFile.open(tmp_path / "w")


#: Writes a file in processes that are killed before the first, second... call that changes it.
KILLED = """
import os, sys
from pathlib import Path

import test_packed_file


def counted(call):
    def limited(*args):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args)

    return limited


for name in ("pwrite", "fsync", "fdatasync", "ftruncate"):
    setattr(os, name, counted(getattr(os, name)))
for left in range(100):
    if not (pid := os.fork()):
        test_packed_file.write(Path(sys.argv[1]) / f"{left:02}")
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
"""


def test_a_writer_may_be_killed_before_any_of_its_calls(tmp_path: Path) -> None:
    modules = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": modules}
    subprocess.run(command, check=True, env=environ, timeout=TIMEOUT_S)
    outcomes = []
    for path in sorted(tmp_path.iterdir()):
        try:
            assert_same(read(path))
            outcomes.append(True)
        except PackedError:
            outcomes.append(False)
    assert outcomes[-1]
    # Only the last call, which waits for the disk, may be missing.
    assert not any(outcomes[:-2])
    assert len(outcomes) > 5
