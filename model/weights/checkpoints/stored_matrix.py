"""Finds the quantized matrices among a checkpoint's tensors, checks their parts and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model.formats.quantization import MatrixFormat, Quantization
from model.formats.safetensors import SafetensorsEntry
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.checkpoints.group_order import mixed_groups
from model.weights.checkpoints.interface import PartError, PartSpec
from model.weights.checkpoints.layouts import LAYOUTS, layout_of
from model.weights.interface import QuantizedWeightsError
from model.weights.stored_tensor import read_tensor

#: Parts that round activations, which stay exact here.
ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "activation_scale")

_ALL_PARTS = {part for one in LAYOUTS.values() for part in one.other_parts}


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A quantized matrix in the parts that its files have."""

    #: `[outputs, inputs]`.
    shape: tuple[int, ...]
    format: MatrixFormat
    codes: SafetensorsEntry
    #: All of them, by their names behind the module's.
    parts: Mapping[str, SafetensorsEntry]
    #: The name of the codes' tensor.
    codes_name: str

    @property
    def path(self) -> Path:
        """Return the file with the codes."""
        return self.codes.path

    @property
    def name_of_integers(self) -> str:
        """Name its integers for the operator; empty for floats."""
        return (
            ""
            if self.format.layout == "floats"
            else f"{self.format.bits} bits ({self.format.layout})"
        )

    def has_mixed_groups(self) -> bool:
        """Read the order of its inputs; return whether groups have inputs from everywhere."""
        order = self.parts.get("g_idx", self.parts.get("weight_g_idx"))
        if order is None:
            return False
        with self._naming():
            group_inputs = self.format.block[1] or self.shape[1]
            return mixed_groups(read_tensor(order), group_inputs) is not None

    def read(self) -> CodedMatrix:
        """Read and unpack it. Raises `QuantizedWeightsError`."""
        parts = {name: read_tensor(entry) for name, entry in self.parts.items()}
        outputs, inputs = self.shape
        with self._naming():
            return layout_of(self.format).decode(parts, (outputs, inputs), self.format)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except PartError as error:
            where = f"tensor {self.codes_name} in {self.path}"
            raise QuantizedWeightsError(f"{where}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of one module, by their names behind the module's."""

    name: str
    tensors: Mapping[str, SafetensorsEntry]

    def matrix(self, fmt: MatrixFormat) -> StoredMatrix | None:
        """Return its matrix if that is quantized. Raises `QuantizedWeightsError`."""
        layout = layout_of(fmt)
        codes = self.tensors.get(layout.codes)
        others = [part for part in layout.other_parts if part in self.tensors]
        is_coded = codes is not None and codes.dtype_name in layout.codes_dtype_names
        if not (is_coded or others):
            return None
        if codes is None:
            beside = self._describe(others[0])
            raise QuantizedWeightsError(
                f"tensor {self.name}.{layout.codes} is missing beside {beside}"
            )
        shape = self._shape(fmt, codes)
        parts = {layout.codes: codes}
        try:
            for spec in layout.parts(shape, fmt):
                if found := self._part(spec, codes):
                    parts[spec.names[0]] = found
        except PartError as error:
            raise QuantizedWeightsError(f"{self._describe(layout.codes)}: {error}") from error
        return StoredMatrix(shape, fmt, codes, parts, f"{self.name}.{layout.codes}")

    def _shape(self, fmt: MatrixFormat, codes: SafetensorsEntry) -> tuple[int, int]:
        """Check the codes; return the shape of the matrix."""
        layout = layout_of(fmt)
        where, plain = self._describe(layout.codes), self.tensors.get("weight")
        if plain is not None and layout.codes != "weight":
            raise QuantizedWeightsError(f"{where} is there beside {self._describe('weight')}")
        if codes.dtype_name not in layout.codes_dtype_names:
            only = " or ".join(layout.codes_dtype_names)
            raise QuantizedWeightsError(
                f"{where} is of type {codes.dtype_name}, and should be {only}"
            )
        match codes.shape:
            case (rows, columns) if rows > 0 and columns > 0:
                shape = layout.shape((rows, columns), fmt.bits)
            case _:
                raise QuantizedWeightsError(
                    f"{where} has shape {list(codes.shape)}, and not two sizes"
                )
        outputs, inputs = fmt.block
        if outputs == 1 and inputs is not None and shape[1] % inputs:
            raise QuantizedWeightsError(
                f"{where}: groups of {inputs} do not divide its {shape[1]} inputs"
            )
        return shape

    def _part(self, spec: PartSpec, codes: SafetensorsEntry) -> SafetensorsEntry | None:
        """Return a part, checked; None if it may be absent."""
        name = next((one for one in spec.names if one in self.tensors), None)
        wanted = " or ".join(str(list(shape)) for shape in spec.shapes)
        if name is None:
            if spec.is_required:
                raise QuantizedWeightsError(
                    f"tensor {self.name}.{' or '.join(spec.names)} is missing; beside the codes "
                    f"in {codes.path} it should be {wanted}"
                )
            return None
        found = self.tensors[name]
        if found.dtype_name not in spec.dtype_names:
            only = ", ".join(spec.dtype_names)
            raise QuantizedWeightsError(
                f"{self._describe(name)} is of type {found.dtype_name}; supported are {only}"
            )
        if found.shape not in spec.shapes:
            raise QuantizedWeightsError(
                f"{self._describe(name)} has shape {list(found.shape)}; with this "
                f"quantization_config it should be {wanted}"
            )
        return found

    def _describe(self, part: str) -> str:
        return f"tensor {self.name}.{part} in {self.tensors[part].path}"


def gather_matrices(
    entries: Mapping[str, SafetensorsEntry], quantization: Quantization
) -> tuple[dict[str, SafetensorsEntry | StoredMatrix], tuple[str, ...]]:
    """Put each quantized matrix in place of its parts, under its plain name.

    Returns all tensors by name, and notes for the operator. Raises `QuantizedWeightsError`.
    """
    modules: dict[str, dict[str, SafetensorsEntry]] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = entry
    found: dict[str, SafetensorsEntry | StoredMatrix] = {}
    num_unused = 0
    for name, tensors in modules.items():
        fmt = quantization.format_of(name)
        matrix = _Module(name, tensors).matrix(fmt) if fmt else None
        if matrix is None:
            _check_plain(name, tensors)
            found |= {f"{name}.{part}" if name else part: one for part, one in tensors.items()}
            continue
        found[f"{name}.weight"] = matrix
        taken = {id(entry) for entry in matrix.parts.values()}
        unused = [part for part in tensors if part in ACTIVATION_PARTS]
        num_unused += len(unused)
        found |= {
            f"{name}.{part}": one
            for part, one in tensors.items()
            if id(one) not in taken and part not in unused
        }
    notes = (f"{num_unused} scales of activations are not used",) if num_unused else ()
    return found, notes


def _check_plain(module: str, tensors: Mapping[str, SafetensorsEntry]) -> None:
    """Check that a module without a format has no parts. Raises `QuantizedWeightsError`."""
    codes = {one.codes for one in LAYOUTS.values()} - {"weight"}
    for part in tensors.keys() & (_ALL_PARTS | codes):
        raise QuantizedWeightsError(
            f"tensor {module}.{part} in {tensors[part].path} belongs to a quantized matrix, but "
            f"quantization_config has no format for it"
        )
