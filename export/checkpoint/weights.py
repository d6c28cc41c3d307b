"""A checkpoint's weights, tensor by tensor: a model is built and traced while its numbers stay on the disk.

Every floating-point tensor of the safetensors files is given to transformers as a *stand-in*: a tensor of
the right shape and dtype whose one stored element is NaN. Transformers renames, ties and checks them as it
does real ones. Code that needs numbers asks here for the source of a stand-in and reads that one tensor. What
is computed from a stand-in by mistake is NaN, and `emit` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.engines import VtpError
from vtp.export.checkpoint.weight_files import weight_files
from vtp.export.patched import patched
from vtp.export.verify.overflow import rounded

_PIECE_BYTES = 1 << 25  # of a tensor in memory at a time, where it is read in order
_SMALL_BYTES = 1 << 20  # what a streamed model loads for good: norms, biases, small matrices
_TABLE_BYTES = 1 << 26  # the same for embeddings: tables of positions are read in other ways than by index
_FLOATING = ("F64", "F32", "F16", "BF16")
_WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")

# Storage of a stand-in -> where its numbers are. Entries live as long as the Weights that made them,
# and these as long as the model.
_sources: WeakValueDictionary[int, Source] = WeakValueDictionary()


class Source:
    """One tensor of a checkpoint, in the dtype that the model is wanted in."""

    def __init__(self, file: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.file = file
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.stand_in = stand_in(shape, dtype)

    def view(self) -> Tensor:
        """The tensor as the file has it: mapped, not read; only what is looked at takes memory."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)

    def read(self) -> Tensor:
        """The whole tensor in `dtype`."""
        return rounded(self.view(), self.dtype, self.name)

    def pieces(self, transposed: bool = False) -> Iterator[Tensor]:
        """The numbers in order, contiguous, some MB at a time; of a transposed matrix all at once."""
        whole = self.view()
        if transposed or not self.shape:
            yield rounded(whole.T if transposed else whole, self.dtype, self.name).contiguous()
            return
        rows = max(1, _PIECE_BYTES // max(1, self.stand_in[:1].nbytes))
        for part in whole.split(rows):
            yield rounded(part, self.dtype, self.name).contiguous()


def stand_in(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """NaN in any shape, in the memory of one number."""
    return torch.full((), torch.nan, dtype=dtype).expand(tuple(shape))


def source_of(tensor: Tensor) -> Source | None:
    """Where the numbers of a stand-in are; None for a tensor that has its own.

    Raises VtpError for a part or another view of a stand-in: it does not say which of the numbers it means.
    """
    source = _sources.get(tensor.untyped_storage().data_ptr())
    if source is not None and (tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype):
        raise VtpError(
            f"the weight {source.name} {list(source.shape)} was cut to {list(tensor.shape)} before it was "
            "loaded; take it with `real` first"
        )
    return source


def real(tensor: Tensor) -> Tensor:
    """The numbers of a parameter or buffer that may be a stand-in, for facts that are read off weights."""
    source = source_of(tensor)
    return tensor if source is None else source.read()


class Weights:
    """All tensors of a model folder, by their names in its safetensors files."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Read the files' headers. Raises VtpError as `shapes_of` does."""
        self.sources: dict[str, Source] = {}
        self._whole: dict[str, Source] = {}  # of whole numbers: few and small, always real
        for path in weight_files(folder):
            for name, shape, floating in _header(path):
                if name in self.sources or name in self._whole:
                    raise VtpError(f"the checkpoint in {folder} has the tensor {name} in two files")
                (self.sources if floating else self._whole)[name] = Source(path, name, shape, dtype)
        for source in self.sources.values():
            _sources[source.stand_in.untyped_storage().data_ptr()] = source

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all tensors."""
        return [source.shape for source in (*self.sources.values(), *self._whole.values())]

    def state(self, loaded: Iterable[str] = ()) -> dict[str, Tensor]:
        """A state dict for transformers: a stand-in for every tensor but those named in `loaded`."""
        state = {name: source.stand_in for name, source in self.sources.items()}
        state.update({name: source.view() for name, source in self._whole.items()})
        return {**state, **{name: self.sources[name].read() for name in loaded}}

    def converted(self, model: nn.Module) -> list[str]:
        """Names of tensors that transformers computed other weights from (joined, split), if it did so."""
        found = [source_of(tensor) for tensor in _saved(model) if tensor.is_floating_point()]
        if all(source is not None for source in found):
            return []
        held = {source.name for source in found if source is not None}
        return sorted(set(self.sources) - held)


def fill(model: nn.Module) -> None:
    """Load all weights of a model that was built from stand-ins."""
    for tensor in _saved(model):
        tensor.data = real(tensor)


@contextmanager
def streamed(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 while its large weights stay on the disk.

    Linear layers and embeddings read their weight, rounded to the bundle's dtype, whenever they run, some MB
    at a time; everything else is loaded. Afterwards the large weights are missing: NaN.
    """
    sources = {id(tensor): source for tensor in _saved(model) if (source := source_of(tensor)) is not None}
    with ExitStack() as stack:
        passing: set[int] = set()
        for module in model.modules():
            source = sources.get(id(getattr(module, "weight", None)))
            if source is not None and _reads_in_passing(module, source):
                run = _linear if isinstance(module, nn.Linear) else _embedding
                stack.enter_context(patched(module, "forward", run(module, source)))
                passing.add(id(module.weight))
        for tensor in _saved(model):
            source = sources.get(id(tensor))
            if source is not None:
                left = id(tensor) in passing
                tensor.data = stand_in(source.shape, torch.float32) if left else source.read().float()
        model.float()  # what never had a source: buffers
        yield


def _reads_in_passing(module: nn.Module, source: Source) -> bool:
    size = 4 * source.stand_in.numel()
    if type(module) is nn.Linear:
        return size >= _SMALL_BYTES
    return type(module) is nn.Embedding and size >= _TABLE_BYTES


def _linear(module: Any, source: Source) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        parts = [functional.linear(inputs, piece.float()) for piece in source.pieces()]
        outputs = torch.cat(parts, dim=-1)
        return outputs if module.bias is None else outputs + module.bias

    return forward


def _embedding(module: Any, source: Source) -> Callable[[Tensor], Tensor]:
    del module
    return lambda ids: functional.embedding(ids, source.view()).to(source.dtype).float()


def _saved(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer that a checkpoint holds, each once."""
    found = model.state_dict(keep_vars=True).values()
    return list({id(tensor): tensor for tensor in found if isinstance(tensor, Tensor)}.values())


def shapes_of(folder: Path) -> list[tuple[int, ...]]:
    """Shapes of all tensors in a model folder, from the headers of its safetensors files.

    Raises VtpError for files that `weight_files` refuses, and for a header that does not fit its file.
    """
    return [shape for path in weight_files(folder) for _, shape, _ in _header(path)]


def _header(path: Path) -> list[tuple[str, tuple[int, ...], bool]]:
    """Name and shape of every tensor of a file, and whether it holds floating-point numbers."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            parts = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 (no mapping)
            told = [(name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts]
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise VtpError(
            f"cannot load the model in {path.parent}: {path.name} is not a complete safetensors file "
            f"({type(error).__name__}: {reason}); download it anew"
        ) from error
    for name, _, dtype in told:
        if dtype not in (*_FLOATING, *_WHOLE):
            raise VtpError(
                f"the tensor {name} in {path} is of type {dtype}; only float weights can be exported: "
                "give the original model, not a quantised one"
            )
    return [(name, shape, dtype in _FLOATING) for name, shape, dtype in told]
