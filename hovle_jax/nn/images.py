"""What the ids of a token sequence say about its images, for masks and position schemes.

    B rows   L places of the sequence as a stack sees it (of a 'post' model's first one, the long)

The k-th tile of a row is its k-th run of so many image tokens. An *image* is an unbroken run of
image tokens: one tile, or all tiles of a picture with its thumbnail.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Arrays are [B, L]; what is computed from them is computed inside jit."""

    ids: jax.Array
    segment_ids: jax.Array
    position_ids: jax.Array  # counts up by one inside each segment
    image_id: int | None  # of image tokens; None where all are text
    tile: int  # places that a tile takes
    end_of_turn: int  # id of the token that ends a message of a conversation

    @property
    def place(self) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(self.ids.shape[1]), self.ids.shape)

    @property
    def is_image(self) -> jax.Array:
        if self.image_id is None:
            return jnp.zeros(self.ids.shape, bool)
        return self.ids == self.image_id

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a tile.

        Raises:
          UserError: a tile's tokens are no square of places.
        """
        side = math.isqrt(self.tile)
        if side * side != self.tile:
            raise UserError(
                f"model: {self.tile} tokens of a tile are no square: they have no rows and columns "
                "for masks and positions to go by"
            )
        return side, side

    @property
    def in_tile(self) -> jax.Array:
        """How many of its tile's tokens come before each image token; 0 for text."""
        rank = jnp.cumsum(self.is_image, axis=1) - 1
        return jnp.where(self.is_image, rank % self.tile, 0)

    @property
    def row(self) -> jax.Array:
        return self.in_tile // self.grid[1]

    @property
    def column(self) -> jax.Array:
        return self.in_tile % self.grid[1]

    def following(self, marks: jax.Array) -> jax.Array:
        """Of each token, whether the one after it is marked."""
        return jnp.pad(marks[:, 1:], ((0, 0), (0, 1)))

    def until(self, marks: jax.Array) -> jax.Array:
        """Place of the first marked token from each on, or of the last one of its segment."""
        segments = jnp.pad(self.segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        stop = marks | (segments != self.segment_ids)
        places = jnp.where(stop, self.place, self.ids.shape[1])
        return jax.lax.cummin(places, axis=1, reverse=True)
