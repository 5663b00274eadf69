"""What an operator may set: four frozen sections.

Each field is also a flag, a file key and an `OCTAVO_*` variable of the same name, so field names
are unique across sections.

Knows nothing of where a value came from (`configs/load.py`), nor of what the program derives from
it (the number of pages, the dtype in use): derived values have types of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from configs.sizes import parse_size_bytes

SizeBytes = Annotated[int, BeforeValidator(parse_size_bytes)]
Quantization = Literal["auto", "none", "fp16", "bf16", "int8"]


class Section(BaseModel):
    """Frozen, and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSection(Section):
    """Which model, and in which arithmetic."""

    model: str = Field(
        default="smollm2",
        description="folder of safetensors, .gguf file, hub id, smollm2, or dummy:CONFIG.json",
    )
    served_model_name: str | None = Field(default=None, description="the name clients ask for")
    model_impl: Literal["auto", "octavo", "transformers"] = Field(
        default="auto",
        description="whose code computes it; auto: Octavo's own where it has the architecture",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the model computes; auto: a GPU if there is one"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="dtype of the activations"
    )
    quantization: Quantization = Field(
        default="auto",
        description="format of the weights of linear layers; auto: the fastest near-lossless one",
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="longest sequence in tokens; default: the model's own"
    )
    attention_backend: Literal["auto", "reference", "torch", "cpu", "flash"] = Field(
        default="auto", description="attention kernels; auto: the fastest that works here"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="compute threads on a CPU; default: its cores"
    )


class CacheSection(Section):
    """How much memory the keys and values get, and how they lie there."""

    kv_cache_memory: SizeBytes | None = Field(
        default=None, ge=1, description="such as 2GiB; default: decided from what is free, and said"
    )
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="dtype of the keys and values; auto: by the weights' format"
    )
    page_size: int | None = Field(
        default=None, ge=1, le=1024, description="tokens a page; default: the backend's own"
    )


class SchedulerSection(Section):
    """How much is computed side by side."""

    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="sequences running at once")
    max_num_batched_tokens: int = Field(
        default=512, ge=1, le=1_048_576, description="tokens one step computes at most"
    )
    max_decode_slowdown: float = Field(
        default=3.0,
        gt=1,
        description="prompts beside decodes may lengthen a step to this many times its own",
    )
    max_queue: int = Field(
        default=1024, ge=0, description="requests waiting at most, then 429; 0 refuses all"
    )
    debug: bool = Field(default=False, description="check every invariant after every step")

    @model_validator(mode="after")
    def _every_decode_fits(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            message = (
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running sequence needs a token a step"
            )
            raise ValueError(message)
        return self


class ServerSection(Section):
    """Where and to whom it answers."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all")
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free port")
    api_key: tuple[str, ...] = Field(default=(), description="accepted keys; none: open to all")
    api_key_file: Path | None = Field(default=None, description="a file with one key a line")
    protect_metrics: bool = Field(
        default=False, description="ask for a key on /health, /ready and /metrics too"
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, le=3600, description="after SIGTERM, finish what runs within this time"
    )
    max_request_bytes: SizeBytes = Field(
        default=8 * 2**20, ge=1024, description="largest body of a request; more is answered 413"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="how log lines are written"
    )
    metrics_alias: Literal["none", "vllm"] = Field(
        default="none", description="vllm: repeat the metrics under vLLM's names"
    )


class OctavoConfig(Section):
    """Everything, resolved once at start and passed down; nobody writes to it."""

    model: ModelSection = ModelSection()
    cache: CacheSection = CacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    server: ServerSection = ServerSection()
