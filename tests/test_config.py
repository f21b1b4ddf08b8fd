"""Values that no run could use are refused where a config is made, with the key that holds them."""

from __future__ import annotations

import pytest

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("optim", {"warmup": 500}, "optim.warmup must be a fraction from 0 to 1, got 500"),
        ("optim", {"decay": -0.1}, "optim.decay must be a fraction"),
        ("optim", {"schedule": "wsd", "warmup": 0.6, "decay": 0.5}, "optim.warmup and optim.decay"),
        ("optim", {"accumulate": 0}, "optim.accumulate must be at least 1"),
        ("optim", {"clip_norm": -1.0}, "optim.clip_norm must not be negative"),
        ("data", {"min_tiles": 4, "max_tiles": 2}, "data.min_tiles must be from 1 to .* is 2; got"),
        ("data", {"max_tiles": 0}, "data.max_tiles, which is 0"),
        ("data", {"min_tiles": 0}, "data.min_tiles must be from 1"),
        ("data", {"tiles": -1}, "data.tiles must not be negative"),
        ("data", {"max_bad": 5.0}, "data.max_bad must be a fraction"),
        ("guards", {"rewind": 2, "spike": 0.0}, "guards.rewind: needs guards.spike"),
        ("teacher", {"dtype": "bf16"}, "teacher.dtype: 'bf16' is not one of float32, bfloat16"),
        ("", {"log_every": 0}, "log_every must be at least 1"),
        ("", {"steps": 0}, "steps must be at least 1"),
        ("", {"save_every": -1}, "save_every must not be negative"),
    ],
)
def test_values_out_of_range_name_their_key(section, values, message):
    with pytest.raises(UserError, match=message):
        RunConfig.from_config_dict({section: values} if section else values)


def test_the_ends_of_the_ranges_pass():
    RunConfig.from_config_dict(
        {
            "optim": {"schedule": "wsd", "warmup": 0.0, "decay": 1.0},
            "data": {"min_tiles": 3, "max_tiles": 3, "tiles": 0, "max_bad": 1.0},
            "guards": {"rewind": 0, "spike": 0.0},
        }
    )
