"""Where pages of the prefix cache are kept on a disk, and how many bytes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from annotated_types import Ge
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from configs.sizes import parse_size_bytes

_DEFAULT_BYTES = 16 * 2**30


@dataclass(frozen=True, slots=True)
class KVDisk:
    """The disk tier."""

    path: Path
    max_bytes: int = _DEFAULT_BYTES


class DiskSettings(BaseModel):
    """The settings of the disk tier."""

    kv_disk_path: Path | None = Field(
        default=None,
        description="folder in which cached pages outlast eviction and restarts; they hold the"
        " prompts' text",
    )
    kv_disk_size: (
        Annotated[
            int,
            Ge(1),
            BeforeValidator(parse_size_bytes),
            Field(json_schema_extra={"format": "size"}),
        ]
        | None
    ) = Field(default=None, description="disk that they may take there; default: 16GiB")

    @property
    def disk(self) -> KVDisk | None:
        """The disk tier; None: there is none."""
        if self.kv_disk_path is None:
            return None
        return KVDisk(self.kv_disk_path, self.kv_disk_size or _DEFAULT_BYTES)

    @model_validator(mode="after")
    def _size_has_a_path(self) -> Self:
        if self.kv_disk_path is None and self.kv_disk_size is not None:
            raise ValueError("kv_disk_size needs kv_disk_path")
        return self
