"""The types that describe a decoder: its sizes, its layers and its tensors.

Free of torch, so that capacity can be planned without it. Knows nothing of files:
`model/architectures/` has a module for each family, `model/architectures/read_arch.py` finds the
files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from model.formats.json_file import shown
from model.formats.quantization import Quantization

RopeVariant: TypeAlias = Literal["default", "linear", "dynamic", "llama3", "yarn"]
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]

Activation: TypeAlias = Literal["silu", "gelu_tanh"]
#: The places of a layer's RMS norms: the inputs and outputs of its two blocks.
NormPlace: TypeAlias = Literal["attention_input", "attention_output", "mlp_input", "mlp_output"]
BiasedPart: TypeAlias = Literal["qkv", "o", "mlp"]
#: Shapes of a file's tensors by name, outermost dimension first.
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

PRE_NORMS: frozenset[NormPlace] = frozenset({"attention_input", "mlp_input"})
#: Thirty times the layers of any model. A file's sizes bound loops.
MOST_LAYERS = 4096


#: More than 64 bits of a file can hold.
_BEYOND = 2.0**64


class ArchError(ValueError):
    """An architecture that is not supported; the message names the key and the supported values."""


class BadValueError(ArchError):
    """A value that is invalid for any implementation, so that no other need be tried."""


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

    def magnitude(self, weight: float) -> float:
        """Return yarn's factor on attention, of this weight (equation 22 of its paper)."""
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The properties of a decoder that page planning and sampling need."""

    #: Token ids are below this.
    vocab_size: int
    #: Longest sequence, in tokens.
    max_positions: int
    #: Tokens that end an answer.
    eos_token_ids: tuple[int, ...] = ()
    #: Keys of the config that no reader knows.
    unknown_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GatedMlpSpec:
    """An MLP that computes `down(activation(gate(x)) * up(x))`."""

    intermediate_size: int
    activation: Activation = "silu"


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How the experts of a token are chosen: those of the largest scores, in the best groups."""

    #: From the products with the router's weights.
    scores: Literal["softmax", "sigmoid"]
    num_experts: int
    #: Experts for each token.
    num_chosen: int
    #: Of equal size, one after another.
    num_groups: int = 1
    #: Groups for each token.
    num_chosen_groups: int = 1
    #: A group is as good as the sum of so many of its largest scores.
    num_group_scores: int = 1
    #: Whether a number for each expert is added to its score, for the choice alone.
    has_bias: bool = False
    #: Whether the scores of the chosen experts are divided by their sum.
    is_normalized: bool = False
    #: Factor on the scores of the chosen experts.
    factor: float = 1.0

    def __post_init__(self) -> None:
        groups, chosen = self.num_groups, self.num_chosen_groups
        if groups < 1 or self.num_experts % groups:
            raise ArchError(f"n_group must divide {self.num_experts} experts, got {groups}")
        if not 1 <= chosen <= groups:
            raise ArchError(f"topk_group must be from 1 to n_group {groups}, got {chosen}")
        size = self.num_experts // groups
        if size < self.num_group_scores:
            raise ArchError(f"n_group: {groups} leave {size} experts to a group, too few")
        if not 1 <= self.num_chosen <= chosen * size:
            raise ArchError(
                f"num_experts_per_tok must be from 1 to {chosen * size}, got {self.num_chosen}"
            )


@dataclass(frozen=True, slots=True)
class MixtureSpec:
    """An MLP of experts: some are chosen for each token by a router, others are for all tokens."""

    router: RouterSpec
    #: Of each expert.
    intermediate_size: int
    #: Experts for all tokens, as one of so many times the size.
    num_shared: int

    def __post_init__(self) -> None:
        if self.num_shared < 1:
            raise ArchError(f"n_shared_experts must be at least 1, got {self.num_shared}")


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention: a token's keys and values are products of one latent vector.

    It is stored, with one rotated vector for all heads.
    """

    #: Elements of the latent vector.
    rank: int
    #: Elements of the vector that queries are products of; None: that is the layer's input.
    query_rank: int | None
    #: Elements of a head's query and key without rotation, and with it.
    plain_dim: int
    rotary_dim: int
    #: Elements of a head's value.
    value_dim: int
    #: Whether neighbours are rotated together, in place of halves.
    is_interleaved: bool = True

    def __post_init__(self) -> None:
        for name, size in (
            ("kv_lora_rank", self.rank),
            ("q_lora_rank", 1 if self.query_rank is None else self.query_rank),
            ("qk_nope_head_dim", self.plain_dim),
            ("v_head_dim", self.value_dim),
        ):
            if size < 1:
                raise ArchError(f"{name} must be at least 1, got {size}")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer: attention and an MLP, each between optional norms and added to the residual."""

    mlp: GatedMlpSpec | MixtureSpec
    #: Factor on q·k. It and `softcap` are the same in all layers.
    scale: float
    #: Scores s become softcap * tanh(s / softcap); None: unchanged.
    softcap: float | None = None
    #: Number of tokens a query sees, itself included; None: all.
    window: int | None = None
    norms: frozenset[NormPlace] = PRE_NORMS
    #: RMS norm of q and of k: one for each head, or one over all heads.
    qk_norm: Literal["head", "all_heads"] | None = None
    biases: frozenset[BiasedPart] = frozenset()
    #: Factor on both blocks' outputs before they are added to the residual.
    residual_multiplier: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchSpec(DecoderShape):
    """One decoder. `*_size` count values, `num_*` things, windows and positions tokens."""

    family: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    #: Of queries and keys, as attention reads them.
    head_dim: int
    rms_eps: float
    rope: RopeSpec
    layers: tuple[LayerSpec, ...]
    is_tied: bool
    #: None: keys and values are products of the layer's input, each stored as such.
    latent: LatentSpec | None = None
    embedding_multiplier: float = 1.0
    logits_divisor: float = 1.0
    #: Logits are capped as `LayerSpec.softcap` caps scores.
    logits_softcap: float | None = None
    #: Added to the weights of all norms when they are loaded.
    norm_offset: float = 0.0
    default_dtype: Dtype = "float32"
    #: Of the checkpoint; None: its weights are plain.
    quantization: Quantization | None = None
    #: Choices made where files can be read in two ways.
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the window of each layer."""
        return tuple(layer.window for layer in self.layers)

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "num_layers", "num_heads")
        sizes = [(name, getattr(self, name)) for name in names]
        sizes += [("intermediate_size", layer.mlp.intermediate_size) for layer in self.layers]
        for name, size in sizes:
            if size < 1:
                raise ArchError(f"{name} must be at least 1, got {size}")
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

    def with_layers(self, layer: LayerSpec, windows: Sequence[int | None] = ()) -> ArchSpec:
        """Return the same decoder with this layer throughout, with a window each if given."""
        windows = windows or self.windows
        return replace(self, layers=tuple(replace(layer, window=window) for window in windows))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a checkpoint, declared once for checking and for loading."""

    #: In safetensors; the name by which weights are read, whatever the file.
    name: str
    gguf_name: str
    #: Matrices are `[out, in]`.
    shape: tuple[int, ...]
    #: The norm or the product that it becomes; a product stacks its tensors in order.
    target: str
    #: Whether GGUF interleaves the rows of each head's halves.
    is_interleaved: bool = False

    def in_layer(self, index: int) -> TensorSpec:
        """Return the same tensor of one layer."""
        return replace(
            self,
            name=f"model.layers.{index}.{self.name}",
            gguf_name=f"blk.{index}.{self.gguf_name}",
            target=f"{index}.{self.target}",
        )


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models: how its files are read and which tensors they hold."""

    #: Read config.json, but for the keys that `arch_hf.read_common` adds.
    read_hf: Callable[[ConfigKeys], ArchSpec]
    #: Read a GGUF file's metadata and the shapes of its tensors, likewise; None: not supported.
    read_gguf: Callable[[ConfigKeys, Shapes], ArchSpec] | None
    #: Declare the tensors of a layer, with names relative to it.
    layer_tensors: Callable[[ArchSpec, LayerSpec], Iterable[TensorSpec]]


def lengthened(arch: ArchSpec, wanted_positions: int | None) -> ArchSpec:
    """Return the architecture for texts of this length, where that changes it.

    Under dynamic rope all angles change with each token beyond the trained length. Cached keys
    cannot follow, and texts of different length could not share them. So if longer texts are
    requested, all texts get the angles of the longest.
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
    """A config with typed reads, which records the keys that were read."""

    def __init__(self, values: Mapping[str, object], prefix: str = "") -> None:
        self._values = values
        self.prefix = prefix
        #: Keys that were read.
        self.read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self._values

    def get(self, key: str) -> object:
        """Return the value; null and absent are the same."""
        self.read.add(key)
        return self._values.get(self.prefix + key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; `default` where the key is absent."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise ArchError(f"{self.prefix}{key} is missing")
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
            raise ArchError(f"{self.prefix}{key}: {shown(value)} is not supported, only {only}")

    def _bad_value(self, key: str, wanted: str, value: object) -> BadValueError:
        return BadValueError(f"{self.prefix}{key} must be {wanted}, got {shown(value)}")

    def unread(self, *, inert: frozenset[str]) -> tuple[str, ...]:
        """Return keys that were not read, are not inert and are not null, false or zero."""
        names = (key.removeprefix(self.prefix) for key, value in self._values.items() if value)
        return tuple(sorted(name for name in names if name not in self.read | inert))
