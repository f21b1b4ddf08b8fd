"""TPU generations as data: what a chip can do, and the compiler options it is driven with.

Figures are per JAX device, which is a chip except on TPU7x (two devices a chip). Sources: Google's
Cloud TPU pages and the TPU chapter of the JAX scaling book; memory limits are what the compiler
itself reports when a program does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from hovle_jax.errors import UserError


@dataclass(frozen=True)
class Option:
    """One compiler option and why it is set."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Chip:
    name: str  # as in a topology: v5e of v5e:16x16
    kind: str  # jax.Device.device_kind
    peak_flops: float  # bfloat16, per second
    clock_hz: float  # of the cycles the compiler estimates; v6e and tpu7x are inferred
    hbm_bytes: float  # what the compiler lets a program use
    ici_bandwidth: float  # bytes per second, one link, one way
    torus_axes: int
    network_bandwidth: float  # bytes per second between slices: a device's share of its host's
    host: str  # the largest slice that is one host, by Google's name (v4, v5p: cores, not chips)
    host_chips: int = 4
    devices_per_chip: int = 1


GIB = 2.0**30

NO_WINDOWED_EINSUM = Option(
    "xla_jf_spmd_threshold_for_windowed_einsum_mib",
    "1000000",
    "else each product with a gathered weight is cut into pieces 128 deep to overlap them with the "
    "gather; the pieces run at a fraction of the matrix units' speed, and gathers overlap anyway",
)
ASYNC_ALL_REDUCE = Option(
    "xla_enable_async_all_reduce",
    "true",
    "a gradient is reduced while the layer's next one is computed; v5e needs the next option for "
    "it, v5p and v6e a SparseCore",
)
FUSE_ALL_REDUCE = Option(
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
    "true",
    "the fusion that carries an all-reduce along with a matrix product",
)
GATHER_SMALL_WEIGHTS = Option(
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "true",
    "else the weights of attention, of which each of 256 chips has 32 KiB, are gathered by adding "
    "up zeros: twice the bytes, extra passes over memory, and the chip waits; an all-gather goes "
    "beside computation",
)
SPARSE_CORE = (
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "true",
        "else the chip waits for every gather of weights: the compiler fuses them with computation "
        "on v5e alone; elsewhere the SparseCores run them beside it",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
        "true",
        "the same for gathers over both axes of a slice, which is where parameters are split",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        "true",
        "reductions of gradients too: they take 0.7 ms a layer on 256 chips",
    ),
)
SPARSE_CORE_3D = Option(
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
    "true",
    "and over three axes, the whole of a v5p slice: without it v5p waits for every gather of "
    "weights, 0.46 ms a layer",
)
EACH_REDUCTION_ALONE = Option(
    "xla_jf_crs_combiner_threshold_in_bytes",
    "1048576",
    "else the gradients of a layer are reduced together once the last of them is made, and nothing "
    "is left to compute meanwhile; so each begins when it is made (those under 1 MiB together)",
)

# name, kind, peak, clock, memory, link bandwidth, torus axes, network, host
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 1.05e9, 31.25 * GIB, 4.5e10, 3, 6.25e9, "v4-8"),
        Chip("v5e", "TPU v5 lite", 197e12, 1.5e9, 15.75 * GIB, 4.5e10, 2, 3.125e9, "v5e-8", 8),
        Chip("v5p", "TPU v5", 459e12, 1.75e9, 95.74 * GIB, 9e10, 3, 6.25e9, "v5p-8"),
        Chip("v6e", "TPU v6 lite", 918e12, 1.75e9, 31.25 * GIB, 9e10, 2, 1.25e10, "v6e-8", 8),
        Chip("tpu7x", "TPU7x", 1153.5e12, 2.2e9, 94.75 * GIB, 9e10, 3, 6.25e9, "tpu7x-2x2x1", 4, 2),
    )
}
"""Clock and peak agree with the compiler's own estimate of one large matrix product to within 3 %
(v5e), 10 % (v5p), 20 % (tpu7x), 30 % (v6e)."""

OPTIONS: dict[str, tuple[Option, ...]] = {
    "v4": (NO_WINDOWED_EINSUM,),
    "v5e": (
        NO_WINDOWED_EINSUM,
        ASYNC_ALL_REDUCE,
        FUSE_ALL_REDUCE,
        EACH_REDUCTION_ALONE,
        GATHER_SMALL_WEIGHTS,
    ),
    "v5p": (
        NO_WINDOWED_EINSUM,
        ASYNC_ALL_REDUCE,
        *SPARSE_CORE,
        SPARSE_CORE_3D,
        EACH_REDUCTION_ALONE,
    ),
    "v6e": (NO_WINDOWED_EINSUM, ASYNC_ALL_REDUCE, *SPARSE_CORE, EACH_REDUCTION_ALONE),
    "tpu7x": (NO_WINDOWED_EINSUM,),
}


def get_chip(name: str) -> Chip:
    if name not in CHIPS:
        raise UserError(f"--topology: chip {name!r} is not one of {', '.join(CHIPS)}")
    return CHIPS[name]


def num_hosts(chip: Chip, num_chips: int) -> int:
    """Of one slice: where it takes several hosts, each has four chips."""
    return 1 if num_chips <= chip.host_chips else num_chips // 4


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for what is no known TPU."""
    return next((chip for chip in CHIPS.values() if chip.kind == device_kind), None)


def wraps(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Along which axes a slice of this shape closes into a ring.

    Without this the compiler takes it for a flat mesh and turns all-gathers into all-reduces.
    """
    if chip.torus_axes == 3:
        closed = all(n % 4 == 0 for n in shape)  # built of cubes of 4 x 4 x 4
        return closed, closed, closed
    x, y = (n == 16 for n in shape)
    return x, y, False


def compiler_options(device_kind: str) -> dict[str, str | bool]:
    """For `jax.jit(compiler_options=...)`, by `jax.Device.device_kind`; none for other devices."""
    chip = of_kind(device_kind)
    return {option.name: option.value for option in OPTIONS[chip.name]} if chip else {}
