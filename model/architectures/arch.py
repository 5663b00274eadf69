"""What a decoder of the Llama shape is made of: the few switches between Llama and its cousins.

Llama, SmolLM2, Mistral, Qwen2 and Qwen3 are one `ArchSpec` each. Free of torch, so that capacity
can be planned without it. Knows nothing of files: `model/architectures/read_arch.py` finds them,
`model/architectures/arch_hf.py` and `model/architectures/arch_gguf.py` read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from model.formats.json_file import shown

RopeVariant: TypeAlias = Literal["default", "linear", "dynamic", "llama3", "yarn"]
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: Thirty times what models have. What a file says of its sizes is looped over.
MOST_LAYERS = 4096


#: Beyond what a file can hold in 64 bits.
_BEYOND = 2.0**64


class ArchError(ValueError):
    """The model is of no supported shape; the message names the key and what is supported."""


class BadValueError(ArchError):
    """The config says what no reader can mean; another implementation need not be tried."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding and its scaling; formulas: `model/architectures/rope.py`."""

    theta: float
    #: How many of a head's dimensions are rotated.
    rotary_dim: int
    variant: RopeVariant = "default"
    factor: float = 1.0
    #: Context length before stretching, in tokens (dynamic, llama3, yarn).
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    #: Factor on cosines and sines (yarn); None: derived from the factor and the mscales.
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    #: Whether yarn rounds the ends of its ramp to whole dimensions.
    truncate: bool = True


class DecoderShape(Protocol):
    """What must be known of any decoder to plan its pages and sample from it."""

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""

    @property
    def num_kv_heads(self) -> int:
        """Heads that are kept in each layer."""

    @property
    def head_dim(self) -> int:
        """Width of a key or value."""

    @property
    def max_positions(self) -> int:
        """Longest sequence, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Keys of the config that nobody here knows."""


@dataclass(frozen=True, slots=True)
class ArchSpec:
    """One decoder. `*_size` count values, `num_*` things, windows and positions tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_positions: int
    rope: RopeSpec
    #: For each layer how many tokens back it sees, itself included; None: all.
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    is_tied: bool
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    default_dtype: Dtype = "float32"
    #: Keys of the config that nobody here knows.
    unknown_keys: tuple[str, ...] = ()
    #: How files were read that can be read in two ways.
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ArchError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ArchError(
                f"num_kv_heads must divide num_heads {self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ArchError(f"head_dim must be even, got {self.head_dim}")
        if self.rope.rotary_dim % 2 or not 0 < self.rope.rotary_dim <= self.head_dim:
            raise ArchError(
                f"rotary_dim must be even and at most {self.head_dim}, got {self.rope.rotary_dim}"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ArchError(f"sliding_window must be at least 1, got {self.windows}")
        assert len(self.windows) == self.num_layers

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint, by `transformers`' names; matrices are `[out, in]`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.is_tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}."
            for part, size_out, size_in, has_bias in (
                ("self_attn.q_proj", q_size, hidden, self.has_qkv_bias),
                ("self_attn.k_proj", kv_size, hidden, self.has_qkv_bias),
                ("self_attn.v_proj", kv_size, hidden, self.has_qkv_bias),
                ("self_attn.o_proj", hidden, q_size, self.has_o_bias),
                ("mlp.gate_proj", inner, hidden, self.has_mlp_bias),
                ("mlp.up_proj", inner, hidden, self.has_mlp_bias),
                ("mlp.down_proj", hidden, inner, self.has_mlp_bias),
            ):
                shapes[f"{at}{part}.weight"] = (size_out, size_in)
                if has_bias:
                    shapes[f"{at}{part}.bias"] = (size_out,)
            shapes[f"{at}input_layernorm.weight"] = (hidden,)
            shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
            if self.has_qk_norm:
                shapes[f"{at}self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{at}self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes


def lengthened(arch: ArchSpec, wanted_positions: int | None) -> ArchSpec:
    """Return the architecture for texts of this length, where that changes it.

    Under dynamic rope all angles change once a text is longer than the model was trained for, and
    they would with each token more. Keys that are kept cannot follow, nor can the keys of two
    texts of different length be shared. So where longer texts are wanted, all texts get the angles
    of the longest.
    """
    original = arch.rope.original_max_positions
    if arch.rope.variant != "dynamic":
        return arch
    most = max(int(original * arch.rope.factor), original)
    if wanted_positions is None or wanted_positions <= original:
        note = f"limited to {original} tokens, for past them the model turns all positions by other"
        note += f" angles; --max-model-len up to {most} takes those throughout"
        return replace(arch, notes=(*arch.notes, note))
    note = f"angles are those for texts of {wanted_positions} tokens, in short requests too"
    return replace(arch, max_positions=most, notes=(*arch.notes, note))


class ConfigKeys:
    """A config whose reads are typed and remembered, so that what nobody read can be named."""

    def __init__(self, values: Mapping[str, object], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._values

    def get(self, key: str) -> object:
        """Return the value; null and absent are the same."""
        self._read.add(key)
        return self._values.get(self._prefix + key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; `default` where the key is absent."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise ArchError(f"{self._prefix}{key} is missing")
        # Infinity is not within the bounds, nor is NaN.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _BEYOND:
            return value
        raise self._bad_value(key, "a number", value)

    def count(self, key: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """Return a whole number up to `most`, likewise."""
        value = self.number(key, default)
        if value != int(value):
            raise self._bad_value(key, "a whole number", value)
        if not -most <= value <= most:
            raise self._bad_value(key, f"at most {most}", value)
        return int(value)

    def maybe_number(self, key: str) -> float | None:
        """Return a number or None."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self._bad_value(key, "true or false", value)
        return default if value is None else value

    def refuse_unless(self, key: str, *allowed: object) -> None:
        """Refuse a value that would change the arithmetic; absent and null are fine."""
        value = self.get(key)
        if value is not None and value not in allowed:
            only = " or ".join(json.dumps(one) for one in allowed) or "nothing"
            raise ArchError(f"{self._prefix}{key}: {shown(value)} is not supported, only {only}")

    def _bad_value(self, key: str, wanted: str, value: object) -> BadValueError:
        return BadValueError(f"{self._prefix}{key} must be {wanted}, got {shown(value)}")

    def unread(self, *, inert: frozenset[str]) -> tuple[str, ...]:
        """Keys with a say (no null, no false, no zero) that were neither read nor are inert."""
        names = (key.removeprefix(self._prefix) for key, value in self._values.items() if value)
        return tuple(sorted(name for name in names if name not in self._read | inert))
