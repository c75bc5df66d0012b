"""The weight matrices of a model on disk, one at a time."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

#: Tables that are looked up in, and the output layer that shares them: not layers to adapt.
NOT_ADAPTED = r"embed|embd|wte|wpe|lm_head|^output\.weight$"
_SUFFIXES = (".safetensors", ".gguf")
_FLOATING = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a file: ``load()`` reads it (fp32 for a quantized one)."""

    name: str
    shape: tuple[int, int]
    load: Callable[[], Tensor]


def find_files(model: str | Path) -> list[Path]:
    """The weight files of a model.

    Args:
        model: a ``.safetensors`` or ``.gguf`` file; a folder that holds some (a Hugging Face
            folder, in one or several shards); or the name of an installed package that carries
            some.

    Raises:
        ValueError: there are none.
    """
    path = Path(model)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"model: {path} is not a {' or '.join(_SUFFIXES)} file")
        return [path]
    folders = [path] if path.is_dir() else _package_folders(str(model))
    if not folders:
        raise ValueError(f"model: {model} is no file, no folder and no installed package")
    for suffix in _SUFFIXES:
        found = sorted(file for folder in folders for file in folder.rglob(f"*{suffix}"))
        if found:
            return found
    raise ValueError(f"model: {folders[0]} holds no {' or '.join(_SUFFIXES)} file")


def _package_folders(name: str) -> list[Path]:
    name = name.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def matrices(
    model: str | Path, *, include: str = "", exclude: str = NOT_ADAPTED
) -> list[StoredMatrix]:
    """The two-dimensional weights of a model, without reading their numbers.

    Args:
        model: as in :func:`find_files`.
        include, exclude: regular expressions searched for in a tensor's name; an empty one lets
            everything in, or keeps nothing out.

    Raises:
        ValueError: no file, no such matrix, or a wrong regular expression.
    """
    try:
        wanted, unwanted = re.compile(include), re.compile(exclude)
    except re.error as error:
        raise ValueError(f"include, exclude: not a regular expression: {error}") from None
    found = [
        matrix
        for file in find_files(model)
        for matrix in (_safetensors(file) if file.suffix == ".safetensors" else _gguf(file))
        if wanted.search(matrix.name) and not (exclude and unwanted.search(matrix.name))
    ]
    if not found:
        raise ValueError(f"model: {model} holds no matrix that include and exclude let through")
    return found


def _safetensors(file: Path) -> Iterator[StoredMatrix]:
    import safetensors

    def read(name: str) -> Tensor:
        with safetensors.safe_open(file, framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor

    try:
        with safetensors.safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a dict
                about = content.get_slice(name)
                shape = about.get_shape()
                if len(shape) == 2 and min(shape) > 1 and about.get_dtype() in _FLOATING:
                    yield StoredMatrix(name, (shape[0], shape[1]), partial(read, name))
    except safetensors.SafetensorError as error:
        raise ValueError(f"model: {file} cannot be read: {error}") from error


def _gguf(file: Path) -> Iterator[StoredMatrix]:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"model: reading {file} needs the package gguf") from error

    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) == 2 and min(tensor.shape) > 1:
            columns, rows = (int(size) for size in tensor.shape)  # GGUF counts from the inside

            def read(tensor: gguf.ReaderTensor = tensor) -> Tensor:
                numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                return torch.from_numpy(numbers.copy()).float()

            yield StoredMatrix(tensor.name, (rows, columns), read)
