"""Rows of the table between native arrays and Hugging Face tensors (`hf.names`).

In names, {i} is the layer; the native arrays of a stack carry all layers along their first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Row:
    hf: str
    native: tuple[str, ...]  # paths, '/' between levels; () = kept in files, read by nothing
    shape: tuple[int, ...]  # of the Hugging Face tensor
    to_native: Callable[[np.ndarray], Arrays]
    to_hf: Callable[[Arrays], np.ndarray]
    layers: int = 0  # > 0: one tensor per layer
    first: int = 0  # number of the first layer

    @property
    def tensors(self) -> list[str]:
        """Names of the Hugging Face tensors, one per layer where there are layers."""
        numbers = range(self.first, self.first + self.layers)
        return [self.hf.format(i=i) for i in numbers] if self.layers else [self.hf]


def same(hf: str, native: str, shape: Sequence[int], layers: int = 0) -> Row:
    return reshaped(hf, native, shape, shape, layers)


def reshaped(
    hf: str, native: str, hf_shape: Sequence[int], native_shape: Sequence[int], layers: int = 0
) -> Row:
    """The same numbers in the same order."""
    full = tuple(hf_shape)
    return Row(
        hf,
        (native,),
        full,
        lambda x: (x.reshape(native_shape),),
        lambda a: a[0].reshape(full),
        layers,
    )


def linear(hf: str, native: str, kernel: Sequence[int], num_in: int = 1, layers: int = 0) -> Row:
    """torch [out, in] <-> native [in..., out...]."""
    rows = int(np.prod(kernel[num_in:]))
    cols = int(np.prod(kernel[:num_in]))
    return Row(
        hf,
        (native,),
        (rows, cols),
        lambda x: (x.T.reshape(kernel),),
        lambda a: a[0].reshape(cols, rows).T,
        layers,
    )


def conv(hf: str, native: str, patch: int, width: int) -> Row:
    """torch OIHW <-> native HWIO."""
    return Row(
        hf,
        (native,),
        (width, 3, patch, patch),
        lambda x: (x.transpose(2, 3, 1, 0),),
        lambda a: a[0].transpose(3, 2, 0, 1),
    )


def unused(hf: str, shape: Sequence[int]) -> Row:
    return Row(hf, (), tuple(shape), lambda x: (), lambda a: np.zeros(shape, np.float32))
