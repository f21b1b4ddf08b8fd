# SPDX-License-Identifier: Apache-2.0
"""Who sees later image tokens, and where image tokens stand for rotary embedding.

B rows   L places of the tokens of one call, as a stack reads them ('post' models: the long stream)

Both follow from ids and belong to a stack: its config has `image_mask` and `image_positions`. An
image is an unbroken run of image tokens. Tokens that continue a cache without tiles are text.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass
class ImageTokens:
    ids: torch.Tensor  # [B, L]
    is_image: torch.Tensor  # bool [B, L]; all False where no tiles came with the ids
    grid: tuple[int, int]  # rows and columns of a tile
    end_of_turn: int | None  # id of the token after every message

    def spread(self, stream, grid):
        """The same for the long stream, whose tiles are `grid`."""
        if stream is None:
            return replace(self, grid=grid)
        ids, is_image = stream.spread(self.ids), stream.spread(self.is_image)
        return replace(self, ids=ids, is_image=is_image, grid=grid)

    @property
    def in_tile(self):
        """How many of its tile's tokens come before each image token."""
        rank = self.is_image.long().cumsum(1) - 1
        return torch.where(self.is_image, rank % (self.grid[0] * self.grid[1]), 0)

    def until(self, marks):
        """Place of the first marked token from each on, or the row's last."""
        last = marks.shape[1] - 1
        places = torch.arange(last + 1, device=marks.device).expand(marks.shape)
        return places.masked_fill(~marks, last).flip(1).cummin(1).values.flip(1)

    def reach(self, mask):
        """Place of the last token that each one sees by this mask, if that is later: [B, L]."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device).expand(self.ids.shape)
        if mask == "bidirectional":
            end_of_image = ~F.pad(self.is_image[:, 1:], (0, 1))
            return torch.where(self.is_image, self.until(end_of_image), places)
        if self.end_of_turn is None:
            raise ValueError("image_mask 'prefix' needs im_end_token_id in config.json")
        image_before = places.masked_fill(~self.is_image, -1).cummax(1).values
        return image_before.gather(1, self.until(self.ids == self.end_of_turn))


def mask_function(images, config, past):
    """(row, head, query, key) -> whether a later key is seen, as transformers' masks want it; None
    of a stack, or of tokens, that are causal."""
    mask = getattr(config, "image_mask", "causal")
    if mask == "causal":
        return None
    if images is None:
        raise ValueError(f"image_mask {mask!r} follows from input_ids: give those, no embeddings")
    if not images.is_image.any():
        return None
    if "flash" in config._attn_implementation:
        raise ValueError(f"image_mask {mask!r} needs attn_implementation eager, sdpa or flex")
    reach = images.reach(mask) + past
    return lambda row, head, query, key: key <= reach[row, query - past]


def rotary_coordinates(images, config, position_ids, cache, layer):
    """position_ids [B or 1, L] -> what each of the frequencies turns by, [B, L, D / 2]; None of a
    stack where that is the position.

    Text counts one, a tile its longer side. The cache remembers by how much text after a tile is
    off its number, and from which length on.
    """
    scheme = getattr(config, "image_positions", "1d")
    if scheme == "1d":
        return None
    if images is None:
        raise ValueError(f"image_positions {scheme!r} follow from input_ids: give those")
    known = {} if cache is None else cache.__dict__.setdefault("hovle_shift", {})
    past = 0 if cache is None else cache.get_seq_length(layer)
    if not past:
        known.pop(layer, None)
    least, shift = known.get(layer, (0, 0))
    if past < least:
        raise ValueError("a cache cannot be cropped to before its last image")
    in_tile, is_image = images.in_tile, images.is_image
    last = in_tile == images.grid[0] * images.grid[1] - 1
    width = torch.where(is_image, last.long() * max(images.grid), 1)
    extra = width - 1
    index = position_ids + shift + extra.cumsum(1) - extra
    if cache is not None and is_image.any():
        places = torch.arange(is_image.shape[1], device=is_image.device)
        after = int((places * is_image).max()) + 1  # cropped to here, all images are still there
        known[layer] = (past + after, shift + extra.sum(1, keepdim=True))
    row, column = in_tile // images.grid[1], in_tile % images.grid[1]
    axes = {"2d": (index + row, index + column), "3d": (index, index + row, index + column)}
    chosen = torch.stack(axes[scheme], dim=-1)
    frequencies = torch.arange(config.head_dim // 2, device=index.device) % chosen.shape[-1]
    return chosen[..., frequencies]
