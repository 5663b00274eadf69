"""Decoders of `transformers` on our pages: its layers, our attention, one flat batch.

The model runs without a cache of its own: keys and values are in the pages, and attention alone
separates the sequences of a batch. Knows nothing of architectures: each layer's requirements are
recorded (`model/hf/attention.py`), and each start proves that they are met (`model/hf/proof.py`).
Imported only where such a model is served: the import takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import MoeModelOutputWithPast

from model.architectures.arch import ArchError, DecoderShape
from model.attention.interface import AttentionBackend, AttentionSpec
from model.hf.attention import (
    PAGED,
    PROBING,
    AttentionCall,
    AttentionSlot,
    LayerRequirements,
    Probe,
    common_spec,
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


class _Given(MoeModelOutputWithPast):  # type: ignore[misc] # transformers has no types
    """The output of the layers; any field that a model adds to its own output is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PagedLayers:
    """See `AttentionFn`: one pass through the layers over planned pages."""

    def __init__(
        self,
        layers: Sequence[LayerRequirements],
        spec: AttentionSpec,
        backend: AttentionBackend,
    ) -> None:
        self._layers = iter(enumerate(layers))
        self._spec = spec
        self._backend = backend

    def __call__(self, call: AttentionCall) -> Tensor:
        spec = self._spec
        index, layer = next(self._layers)
        # Norms and rotations leave some models' heads in float32.
        q, k, v = (
            _widened(heads.to(spec.dtype), spec.head_dim) for heads in (call.q, call.k, call.v)
        )
        if layer.scale != spec.scale:
            q = q * (layer.scale / spec.scale)
        if layer.num_kv_heads != spec.num_kv_heads:
            repeats = spec.num_kv_heads // layer.num_kv_heads
            k, v = (heads.repeat_interleave(repeats, dim=1) for heads in (k, v))
        attended = self._backend.attend(index, q, k, v).view(q.shape)
        return attended[..., : layer.v_head_dim].to(call.v.dtype)


def _widened(heads: Tensor, width: int) -> Tensor:
    missing = width - heads.shape[2]
    return functional.pad(heads, (0, missing)) if missing else heads


class HfDecoder:
    """See `ServedDecoder`: a causal language model of `transformers`, split at its last layer."""

    format: Format = "none"
    #: Angles are computed in each step, or are among the weights.
    bytes_per_position = 0

    def __init__(self, model: Any, found: HfConfig) -> None:  # noqa: ANN401 - transformers' class
        """Take ownership of `model`."""
        text_config = found.text_config
        self._slot = AttentionSlot(model)
        self._layers = _probe(model, self._slot, found.max_positions)
        num_layers, dtype = text_config.num_hidden_layers, model.dtype
        self._spec = common_spec(self._layers, num_layers, dtype, model.device)
        self.arch = DecoderShape(
            max_positions=found.max_positions,
            vocab_size=text_config.vocab_size,
            eos_token_ids=_eos_token_ids(model, text_config),
        )
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
        # So that calling the model computes logits from hidden states.
        body.forward = self._given_hidden
        self._hidden: Tensor | None = None
        self._head = model

    def attention_spec(self, kv_format: KVFormat) -> AttentionSpec:
        """See `ServedDecoder`."""
        return replace(self._spec, kv_format=kv_format)

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See `Decoder`; the final norm is already applied."""
        layers = _PagedLayers(self._layers, self._spec, attention)
        with self._slot.filled(layers):
            found = self._run_layers(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
            )
        hidden: Tensor = found[0].squeeze(0)
        return hidden.float()

    def hold_positions(self, max_positions: int) -> None:
        """See `ServedDecoder`: there is no table."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`: by the model's own code, since some cap or scale logits."""
        self._hidden = hidden.to(self.attention_dtype).unsqueeze(0)
        # Their embeddings are not used; some models count them.
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
    """Load a folder of safetensors, or make a dummy's random weights, and prove the logits.

    `max_positions`: the longest request, where that is known. Raises `ArchError` (a `ValueError`)
    with the reason in one line.
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
    """Suppress the library's advice on training, and progress bars outside of terminals."""
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
    """Load the parts of a model that text needs, by its public classes; also return notes."""
    model_class: Any = found.text_class or transformers.AutoModelForCausalLM
    # eager: the library's reference implementation.
    settings: dict[str, object] = {"dtype": dtype, "attn_implementation": "eager"}
    if source.kind == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if found.text_class is None:
                return model_class.from_config(found.config, **settings), ()
            # Makes up tensors that are missing from state_dict, except in parts that are left out.
            # Not by the class's own override of from_pretrained: some fetch other files, too.
            make = transformers.PreTrainedModel.from_pretrained.__func__
            model = make(model_class, None, config=found.config, state_dict={}, **settings)
            return model, tuple(notes_on_parts(model))
    if found.is_mxfp4:
        # Kernels for mxfp4 are for GPUs alone, and would be fetched from the hub.
        settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    files = SafetensorsWeights(source.path)
    model, info = model_class.from_pretrained(
        source.path,
        config=found.config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **settings,
    )
    for fault in ("missing_keys", "mismatched_keys"):
        if tensors := sorted(map(str, info[fault])):
            # transformers would go on with random ones.
            raise ArchError(f"{fault.replace('_', ' ')}: {tensors[0]}")
    return model, (*notes_on_parts(model), *files.notes, *_notes_on_weights(model, info))


def _notes_on_weights(model: Any, info: Mapping[str, Iterable[object]]) -> Iterator[str]:  # noqa: ANN401 - as above
    """Yield a note for tensors that were not read, or not as the config states."""
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
        # As in `model.weights.interface.read_into`.
        if not one.sum(dtype=torch.float32).isfinite() and not one.isfinite().all()
    ]
    if odd:
        yield f"weights that are not finite: {', '.join(odd)}"


def _probe(model: Any, slot: AttentionSlot, max_positions: int) -> list[LayerRequirements]:  # noqa: ANN401 - as above
    """Record the attention that each layer requires, and leave the model ready to be served."""
    probe = Probe(max_positions)
    open_attention(model)
    _set_attention(model, PROBING)
    # One token: with more, some models cut the masks of layers with a window.
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with slot.filled(probe.attend):
        model(input_ids=zero, position_ids=zero, use_cache=False)
    _set_attention(model, PAGED)
    return probe.layers


def _set_attention(model: Any, name: str) -> None:  # noqa: ANN401 - as above
    """Set the attention of all models within; the library's own setter misses some."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config._attn_implementation = name  # noqa: SLF001 - see above
