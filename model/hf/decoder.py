"""Decoders of `transformers` on our pages: its layers, our attention, one flat batch.

The model runs without a cache of its own: what it would keep is in the pages, and what sets the
sequences of a batch apart is attention alone. Knows nothing of architectures: what a model wants
is asked of it (`model/hf/attention.py`), and that it gets it is proved at each start
(`model/hf/proof.py`). Imported only where such a model is served, for the import takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import MoeModelOutputWithPast

from model.architectures.arch import ArchError
from model.attention.interface import AttentionBackend, AttentionSpec
from model.hf.attention import (
    ASKING,
    PAGED,
    AttenderSlot,
    AttentionCall,
    CommonWish,
    Inquirer,
    LayerWish,
    common_wish,
    register,
)
from model.hf.config import HfConfig, faults_of, read_hf_config
from model.hf.falcon import open_attention
from model.hf.proof import Proof
from model.hf.text import decoder_of, left_out, notes_on_parts
from model.kv.format import KVFormat
from model.weights.linear import Format
from model.weights.safetensors import SafetensorsWeights, is_derived
from model.weights.source import ModelSource


@dataclass(frozen=True, slots=True)
class HfShape:
    """See `DecoderShape`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    unknown_keys: tuple[str, ...] = ()


class _Given(MoeModelOutputWithPast):  # type: ignore[misc] # transformers has no types
    """What layers put out; every field that some model's own output has beside these is unset."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PagedLayers:
    """See `Attender`: one pass through the layers over planned pages."""

    def __init__(
        self,
        wishes: Sequence[LayerWish],
        common: CommonWish,
        dtype: torch.dtype,
        backend: AttentionBackend,
    ) -> None:
        self._wishes = iter(enumerate(wishes))
        self._common = common
        self._dtype = dtype
        self._backend = backend

    def attend(self, call: AttentionCall) -> Tensor:
        """See `Attender`."""
        common = self._common
        layer, wish = next(self._wishes)
        # Norms and rotations leave some models' heads in float32.
        q, k, v = (
            _widened(heads.to(self._dtype), common.head_dim) for heads in (call.q, call.k, call.v)
        )
        if wish.scale != common.scale:
            q = q * (wish.scale / common.scale)
        if wish.num_kv_heads != common.num_kv_heads:
            repeats = common.num_kv_heads // wish.num_kv_heads
            k, v = (heads.repeat_interleave(repeats, dim=1) for heads in (k, v))
        attended = self._backend.attend(layer, q, k, v).view(q.shape)
        return attended[..., : wish.v_head_dim].to(call.v.dtype)


def _widened(heads: Tensor, width: int) -> Tensor:
    missing = width - heads.shape[2]
    return functional.pad(heads, (0, missing)) if missing else heads


class HfDecoder:
    """See `ServedDecoder`: a causal language model of `transformers`, taken in two."""

    format: Format = "none"
    #: Angles are computed with each step, or are among the weights.
    bytes_per_position = 0

    def __init__(self, model: Any, found: HfConfig) -> None:  # noqa: ANN401 - transformers' class
        """Take over `model`."""
        text_config = found.text_config
        self._slot = AttenderSlot(model)
        wishes = _wishes(model, self._slot, found.max_positions)
        self._wishes = tuple(wishes)
        self._common = common_wish(wishes, text_config.num_hidden_layers)
        self.arch = HfShape(
            num_layers=len(wishes),
            num_kv_heads=self._common.num_kv_heads,
            head_dim=self._common.head_dim,
            max_positions=found.max_positions,
            vocab_size=text_config.vocab_size,
            eos_token_ids=_eos_token_ids(model, text_config),
        )
        dtype = model.dtype
        library = f"transformers {transformers.__version__} ({type(model).__name__})"
        weights = f"weights in {str(dtype).removeprefix('torch.')}"
        self.notes = (f"computed by {library}, {weights}", *found.notes)
        self.weights_bytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
        self.attention_dtype: torch.dtype = dtype
        self.device: torch.device = model.device
        body = decoder_of(model)
        if body is model:
            raise ArchError("its layers and its logits are in one piece")
        self._run_layers = body.forward
        # So that all but the layers computes logits and no more.
        body.forward = self._given_hidden
        self._hidden: Tensor | None = None
        self._head = model

    def attention_spec(self, kv_format: KVFormat) -> AttentionSpec:
        """See `ServedDecoder`."""
        common = self._common
        return AttentionSpec(
            num_layers=self.arch.num_layers,
            num_heads=common.num_heads,
            num_kv_heads=common.num_kv_heads,
            head_dim=common.head_dim,
            scale=common.scale,
            windows=tuple(one.window for one in self._wishes),
            dtype=self.attention_dtype,
            kv_format=kv_format,
            device=self.device,
            softcap=common.softcap,
            sinks=common.sinks,
        )

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See `Decoder`; what it returns is behind the final norm already."""
        layers = _PagedLayers(self._wishes, self._common, self.attention_dtype, attention)
        with self._slot.filled(layers):
            found = self._run_layers(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
            )
        hidden: Tensor = found[0].squeeze(0)
        return hidden.float()

    def hold_positions(self, max_positions: int) -> None:
        """See `ServedDecoder`: there is nothing to make."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`: by the model's own code, for some cap or scale them."""
        self._hidden = hidden.to(self.attention_dtype).unsqueeze(0)
        # What is looked up for them goes nowhere; some models count them.
        ids = torch.zeros(self._hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._head(input_ids=ids, use_cache=False).logits.squeeze(0)
        return logits.float()

    def _given_hidden(self, *_args: object, **_kwargs: object) -> _Given:
        return _Given(last_hidden_state=self._hidden)


def _eos_token_ids(model: Any, text_config: Any) -> tuple[int, ...]:  # noqa: ANN401 - as above
    for config in (model.generation_config, model.config, text_config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def load_hf_decoder(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
) -> HfDecoder:
    """Load a folder of safetensors, or make a dummy's random weights, and prove that it works.

    `max_positions`: as long as requests will be at most, where that is known. `ArchError` (a
    `ValueError`) says in one line why a model cannot be served.
    """
    found = read_hf_config(source, max_positions)
    register()
    with torch.inference_mode(), _quiet(), faults_of(found.config.model_type):
        model, notes = _load(source, found, dtype)
        model.to(device).eval()
        proof = Proof(model, found.text_config.vocab_size)
        decoder = HfDecoder(model, found)
        proof.check(decoder)
    decoder.notes += notes
    return decoder


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the library's advice, which is for people who train, and bars in log files."""
    log = transformers.logging
    before, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if has_bars:
            log.enable_progress_bar()


def _load(source: ModelSource, found: HfConfig, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
    """Have `transformers` load a model as its users do; also what an operator should know of it."""
    # eager: what the library's authors hold everything else against.
    settings: dict[str, object] = {"dtype": dtype, "attn_implementation": "eager"}
    if found.text_class is not None:
        return _load_text(source, found, settings)
    if source.kind == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.AutoModelForCausalLM.from_config(found.config, **settings), ()
    if found.is_mxfp4:
        # Kernels that multiply it as it is are for GPUs alone, and would be fetched from the hub.
        settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    return _read(transformers.AutoModelForCausalLM, source.path, found.config, settings)


def _load_text(
    source: ModelSource, found: HfConfig, settings: dict[str, object]
) -> tuple[Any, tuple[str, ...]]:
    """Load all of a model but what is not for text."""
    if source.kind == "dummy":
        # Tensors that are nowhere are made up; what is left out is not.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Not by a class's own door: some fetch other files, too.
            make = transformers.PreTrainedModel.from_pretrained.__func__
            model = make(found.text_class, None, config=found.config, state_dict={}, **settings)
        return model, tuple(notes_on_parts(model))
    model, notes = _read(found.text_class, source.path, found.config, settings)
    return model, (*notes_on_parts(model), *notes)


def _read(
    model_class: Any,  # noqa: ANN401 - as above
    path: Path,
    config: Any,  # noqa: ANN401 - as above
    settings: dict[str, object],
) -> tuple[Any, tuple[str, ...]]:
    """Read a folder's files; `ArchError` where they lack anything."""
    files = SafetensorsWeights(path)
    model, info = model_class.from_pretrained(
        path,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **settings,
    )
    for what in ("missing_keys", "mismatched_keys"):
        if tensors := sorted(map(str, info[what])):
            # transformers would go on with random ones.
            raise ArchError(f"{what.replace('_', ' ')}: {tensors[0]}")
    return model, (*files.notes, *_notes_on_weights(model, info))


def _notes_on_weights(model: Any, info: Mapping[str, Iterable[object]]) -> Iterator[str]:  # noqa: ANN401 - as above
    """Say which tensors were read otherwise than the config has it, or not at all."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name in sorted(tied.keys() - model.all_tied_weights_keys.keys()):
        yield f"the config ties {name} to {tied[name]}, but it is another: it is used"
    parts = tuple(f"{name}." for name in left_out(model))
    others = sorted(
        one
        for one in map(str, info["unexpected_keys"])
        if not is_derived(one) and not one.startswith(parts)
    )
    if others:
        yield f"{others[0]} has no place in this model ({len(others)} such tensors): not used"
    odd = [
        name
        for name, one in model.named_parameters()
        # As in `model.weights.read_into`.
        if not one.sum(dtype=torch.float32).isfinite() and not one.isfinite().all()
    ]
    if odd:
        yield f"weights that are not finite: {', '.join(odd)}"


def _wishes(model: Any, slot: AttenderSlot, max_positions: int) -> list[LayerWish]:  # noqa: ANN401 - as above
    """Have the model tell what it wants of attention, and leave it ready to be served."""
    inquirer = Inquirer(max_positions)
    open_attention(model)
    _set_attention(model, ASKING)
    # One token: with more, some models cut the masks of layers that need not see all of them.
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with slot.filled(inquirer):
        model(input_ids=zero, position_ids=zero, use_cache=False)
    _set_attention(model, PAGED)
    return inquirer.wishes


def _set_attention(model: Any, name: str) -> None:  # noqa: ANN401 - as above
    """Choose the attention of all models within; the library's own way passes over some."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config._attn_implementation = name  # noqa: SLF001 - see above
