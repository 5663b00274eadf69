"""The settings of an operator: four frozen sections.

Each field is also a flag, a file key and an `OCTAVO_*` variable of the same name, so field names
are unique across sections.

Knows nothing of the sources of values (`configs/load.py`). Values that the program derives (the
number of pages, the dtype in use) have types of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from configs.kv_cache import KVCacheDtype, check_skipped_layers, our_kv_cache_dtype
from configs.kv_disk import DiskSettings
from configs.kv_policy import KVPolicy, parse_kv_policy
from configs.sizes import parse_size_bytes
from configs.speculation import Drafting, DraftTokens, Speculation, drafting_of_vllm

_PARSED = BeforeValidator(parse_size_bytes)
_SIZE = Field(json_schema_extra={"format": "size"})
SizeBytes = Annotated[int, _PARSED, _SIZE]
ToolCallParser = Literal[
    "auto",
    "none",
    "hermes",
    "llama3_json",
    "llama4_json",
    "llama4_pythonic",
    "pythonic",
    "mistral",
    "qwen3_coder",
    "qwen3_xml",
    "glm45",
    "glm47",
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "kimi_k2",
    "kimi_k3",
    "gemma4",
    "openai",
]
ReasoningParser = Literal[
    "auto",
    "none",
    "deepseek_r1",
    "qwen3",
    "mistral",
    "kimi_k2",
    "kimi_k3",
    "gemma4",
    "openai_gptoss",
]
#: As in a browser's Origin header; one with a path, such as a lone slash, would never match.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+")
PolicyName = Literal["lru", "lfu", "cost"]
Quantization = Literal["auto", "none", "fp16", "bf16", "int8", "int4", "own"]


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
        description="format of the weights of linear layers; own: the integers of the file;"
        " auto: the fastest near-lossless one, own among them",
    )
    activation_bits: Literal["auto", "8", "16"] = Field(
        default="auto",
        description="of activations that meet integer weights on a CPU; 8: faster, less exact;"
        " auto: 8 with quantization int8 or int4 where that is faster, else 16",
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="longest sequence in tokens; default: the model's own"
    )
    attention_backend: Literal["auto", "reference", "torch", "cpu", "flash", "triton"] = Field(
        default="auto", description="attention kernels; auto: the fastest that works here"
    )
    generation_config: Literal["auto", "vllm"] = Field(
        default="auto",
        description="sampling of requests that do not say: auto: as the model's"
        " generation_config.json asks; vllm: neutral",
    )
    tool_call_parser: ToolCallParser = Field(
        default="auto", description="how the model writes calls; auto: as its chat template says"
    )
    reasoning_parser: ReasoningParser = Field(
        default="auto", description="how the model reasons; auto: as its chat template says"
    )
    chat_template: str | None = Field(
        default=None,
        description="Jinja file, or the name of a built-in template, instead of the model's own",
    )
    tools_in_prompt: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: a system message lists tools where the chat template has no place for"
        " them, and calls are read in the form of Hermes; off: they are refused there",
    )
    special_tokens_in_messages: Literal["text", "allow"] = Field(
        default="text",
        description="those that a message spells, such as <|im_end|>: text like any other, or"
        " tokens; prompts of completions have tokens",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="compute threads on a CPU; default: its cores"
    )
    weights_cache: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: weights that were packed for this CPU's products are kept on disk, and"
        " read by the next start",
    )
    weights_cache_max_bytes: Annotated[int, Ge(1), _PARSED, _SIZE] | None = Field(
        default=None,
        description="disk that kept weights may take together; default: a quarter of what is free",
    )


class CacheSection(Section, DiskSettings):
    """How much memory the keys and values get, and how they lie there."""

    kv_cache_memory: Annotated[int, Ge(1), _PARSED, _SIZE] | None = Field(
        default=None, description="such as 2GiB; default: decided from what is free, and said"
    )
    kv_cache_dtype: KVCacheDtype = Field(
        default="auto",
        description="format of the keys and values; auto: floats, by the weights' format; the"
        " others hold more tokens in the same memory, and round",
    )
    kv_cache_dtype_skip_layers: tuple[str, ...] = Field(
        default=(),
        description="layers whose keys and values stay floats: indices, or sliding_window for"
        " all that have one",
    )
    kv_quality_bound: float = Field(
        default=0.1,
        ge=0,
        description="refuse a lossy kv_cache_dtype that raises the perplexity of a built-in text by"
        " more than this share; 0.1: a tenth; inf: no bound",
    )
    page_size: int | None = Field(
        default=None, ge=1, le=1024, description="tokens a page; default: the backend's own"
    )
    kv_policy: str = Field(
        default="full",
        description="keys that a token reads, where a request does not say: full, window:4096 (the"
        " newest), sinks:4+1020 (the first 4 and the newest 1020) or morph:32/1024 (the newest 32,"
        " and those they score highest, 1024 in all; h2o:32/1024: by the scores of all tokens)",
    )

    @property
    def policy(self) -> KVPolicy:
        """The default of requests. Raises `ValueError` where `kv_policy` is wrong."""
        return parse_kv_policy(self.kv_policy)

    @model_validator(mode="after")
    def _policy_is_known(self) -> Self:
        try:
            _ = self.policy
        except ValueError as error:
            raise ValueError(f"kv_policy: {error}") from error
        return self

    @model_validator(mode="before")
    @classmethod
    def _formats_of_others(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic's
        if isinstance(values, dict) and "kv_cache_dtype" in values:
            return values | {"kv_cache_dtype": our_kv_cache_dtype(values["kv_cache_dtype"])}
        return values

    @model_validator(mode="after")
    def _skipped_layers_are_layers(self) -> Self:
        check_skipped_layers(self.kv_cache_dtype_skip_layers, self.kv_cache_dtype)
        return self


class SchedulerSection(Section):
    """How much is computed side by side."""

    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="sequences running at once")
    max_num_batched_tokens: int = Field(
        default=512, ge=1, le=1_048_576, description="tokens one step computes at most"
    )
    max_decode_slowdown: float = Field(
        default=3.0,
        gt=1,
        description="prompts beside decodes may lengthen a step to this many times one of decodes",
    )
    max_queue: int = Field(
        default=1024,
        ge=0,
        description="requests waiting at most, then 429; 0: only what can start at once",
    )
    max_queue_tokens: int = Field(
        default=4_194_304, ge=1, description="tokens of waiting requests at most, then 429"
    )
    cache_policy: PolicyName = Field(
        default="cost",
        description="which unpinned cached page is evicted first: lru: least recently used; lfu:"
        " least often used; cost: both, times the price of its tokens",
    )
    cache_pin_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the pages that requests may pin (cache_control and the like); where"
        " more are asked for, the key with the most loses its oldest pins",
    )
    speculation: Speculation | None = Field(
        default=None,
        description="guess tokens ahead and verify them together, which changes no token; auto:"
        " from cached prefixes and past outputs; suffix: past outputs; ngram: the request alone;"
        " draft:MODEL: as auto, and a smaller model where these have no guess (on a CPU);"
        " by default auto on a CPU, none on a GPU",
    )
    speculative_tokens: DraftTokens = Field(
        default=16, description="tokens of one draft at most; fewer where they do not pay"
    )
    speculative_config: str | None = Field(
        default=None,
        description="vLLM's JSON in place of both: method (ngram, suffix or draft_model), model,"
        " num_speculative_tokens, prompt_lookup_min, prompt_lookup_max",
    )
    engine_timeout_s: float = Field(
        default=300.0, gt=0, le=86400, description="replace an engine that is silent for so long"
    )
    engine_start_timeout_s: float = Field(
        default=1800.0, gt=0, le=86400, description="give up a start of the engine after so long"
    )
    debug: bool = Field(default=False, description="check every invariant after every step")

    @property
    def drafting(self) -> Drafting:
        """The drafts to make. Raises `ValueError` where `speculative_config` is wrong."""
        if self.speculative_config is not None:
            return drafting_of_vllm(self.speculative_config)
        return Drafting(self.speculation, self.speculative_tokens)

    @model_validator(mode="after")
    def _drafts_are_known(self) -> Self:
        own = {"speculation", "speculative_tokens"} & self.model_fields_set
        if self.speculative_config is not None and own:
            raise ValueError(f"speculative_config and {min(own)} exclude each other")
        _ = self.drafting
        return self

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
    """The address, the clients and the limits of the HTTP server."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all")
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free port")
    api_key: tuple[str, ...] = Field(default=(), description="accepted keys; none: open to all")
    api_key_file: Path | None = Field(
        default=None,
        description="one key a line, or .toml: names, limits, namespaces; SIGHUP reloads",
    )
    max_requests_per_key: int | None = Field(
        default=None, ge=1, description="requests running at once with one key, then 429"
    )
    ssl_certfile: Path | None = Field(
        default=None, description="serve https with the certificate (chain) in this PEM file"
    )
    ssl_keyfile: Path | None = Field(
        default=None, description="its private key; default: in the same file"
    )
    ssl_keyfile_password: str | None = Field(
        default=None,
        description="of an encrypted private key; better in the environment",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="origins whose pages may ask from a browser; *: all; none: no CORS"
    )
    protect_metrics: bool = Field(
        default=False, description="ask for a key on /health, /ready and /metrics too"
    )
    request_timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=86400,
        description="end a request with 408 after so long; default: never",
    )
    sse_keep_alive_s: float = Field(
        default=10.0, ge=0, le=3600, description="comment in a stream silent for so long; 0: none"
    )
    force_include_usage: bool = Field(
        default=False, description="tell the usage in every stream, asked for or not"
    )
    dev_endpoints: bool = Field(
        default=False,
        description="serve POST /reset_prefix_cache and /admin/cache/reset, pin and unpin",
    )
    send_timeout_s: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        description="drop clients that read nothing so long; 0: never",
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, le=3600, description="after SIGTERM, finish what runs within this time"
    )
    max_connections_per_address: int = Field(
        default=1024,
        ge=0,
        description="connections of one address (IPv6: /64), then 429; 0: any, as behind a proxy",
    )
    max_request_bytes: SizeBytes = Field(
        default=8 * 2**20, ge=1024, description="largest body of a request; more is answered 413"
    )
    responses_max_count: int = Field(
        default=4096, ge=0, description="responses of /v1/responses that are kept; 0: none"
    )
    responses_max_bytes: SizeBytes = Field(
        default=64 * 2**20, ge=0, description="memory that kept responses may take together"
    )
    responses_ttl_s: float = Field(
        default=86_400.0, gt=0, description="kept responses are forgotten when unused for so long"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="how log lines are written"
    )
    metrics_alias: Literal["none", "vllm"] = Field(
        default="none", description="vllm: repeat the metrics under vLLM's names"
    )

    @model_validator(mode="after")
    def _origins_are_origins(self) -> Self:
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                message = (
                    f"cors_origins: {origin!r} is no origin a browser sends; write scheme, host and"
                    " port, in lower case and without a path (https://chat.example.org), or *"
                )
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _a_private_key_has_a_certificate(self) -> Self:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_keyfile_password):
            raise ValueError("ssl_keyfile and ssl_keyfile_password need ssl_certfile")
        return self

    @model_validator(mode="after")
    def _limits_have_keys(self) -> Self:
        has_keys = self.api_key or self.api_key_file is not None
        if self.max_requests_per_key is not None and not has_keys:
            raise ValueError("max_requests_per_key needs keys: set api_key_file or api_key too")
        return self


class OctavoConfig(Section):
    """All settings, resolved once at start and passed down; read-only."""

    model: ModelSection = ModelSection()
    cache: CacheSection = CacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    server: ServerSection = ServerSection()
