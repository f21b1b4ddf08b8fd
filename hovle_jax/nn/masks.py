"""Who sees later tokens: masks over images by name, one per stack (`LayersConfig.mask`).

Every token sees its segment up to itself. A mask says how far beyond that: the place of the last
token that each one sees. That is an integer per token instead of a bit per pair, so it costs
nothing to pack, and a Pallas kernel compares it with the places of keys as it does for causality.

    causal         nothing beyond itself
    bidirectional  tokens of one image, with all of its tiles, see each other
    prefix         all of a turn up to its last image sees each other: what was said before the
                   first image of the turn, its images, and the text between them

A mask is a function of ids alone, the same in training and in generation. Generation reads prompts
as a whole up to their last image and adds text to that, so what follows the last image of a segment
must see nothing later. Nor may what is predicted: answers lie in turns of their own, which have no
images (`data.chat` refuses them).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hovle_jax.errors import UserError
from hovle_jax.nn.images import Tokens
from hovle_jax.registry import Registry

Mask = Callable[[Tokens], jax.Array]  # -> int32 [B, L], places in the row
MASKS: Registry[Mask | None] = Registry("mask of model.embedding or model.decoder")

MASKS.add("causal")(None)


@MASKS.add("bidirectional")
def bidirectional(tokens: Tokens) -> jax.Array:
    last = ~tokens.following(tokens.is_image)
    return jnp.where(tokens.is_image, tokens.until(last), tokens.place)


@MASKS.add("prefix")
def prefix(tokens: Tokens) -> jax.Array:
    return _last_image(tokens, tokens.until(tokens.ids == tokens.end_of_turn))


def _last_image(tokens: Tokens, end: jax.Array) -> jax.Array:
    """Place of the last image token of a row up to `end` [B, L], -1 where there is none."""
    image_before = jax.lax.cummax(jnp.where(tokens.is_image, tokens.place, -1), axis=1)
    return jnp.take_along_axis(image_before, end, axis=1)


def reach(name: str, tokens: Tokens) -> jax.Array | None:
    """The place of the last token that each one sees, int32 [B, L]; None of a causal stack.

    No mask can take away from causality, nor show anything after the last image of a segment;
    segments are kept apart by those who use it.

    Raises:
      UserError: a mask that gives no integer per token.
    """
    mask = MASKS.find(name)
    if mask is None:
        return None
    last = mask(tokens)
    if last.shape != tokens.ids.shape or not jnp.issubdtype(last.dtype, jnp.integer):
        raise UserError(
            f"mask {name!r}: gives {last.dtype.name} {list(last.shape)}; it must be the place of "
            f"the last token that each one sees, int32 {list(tokens.ids.shape)}"
        )
    end = tokens.until(jnp.zeros(tokens.ids.shape, bool))  # of the segment
    return jnp.maximum(jnp.minimum(last, _last_image(tokens, end)), tokens.place)
