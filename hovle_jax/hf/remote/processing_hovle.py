# SPDX-License-Identifier: Apache-2.0
"""Text with images to the inputs of HoVLE."""

import re

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

IMAGE_PLACEHOLDER = "<image>"
IMAGE_TOKEN = "<IMG_CONTEXT>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"

# A lone image token stands for an image too: serving backends write `image_token` per image.
_PLACEHOLDER_RE = re.compile(f"{IMAGE_PLACEHOLDER}|{IMAGE_TOKEN}")


class HoVLEProcessor(ProcessorMixin):
    """An image processor and a tokenizer that know how many tokens an image takes.

    Args:
      image_processor: a `HoVLEImageProcessor`.
      tokenizer: adds BOS; has the tokens "<img>", "</img>" and "<IMG_CONTEXT>" and a pad token.
      tokens_per_tile: "<IMG_CONTEXT>" tokens of a tile.
      chat_template: Jinja text; an image of a message becomes "<image>".
    """

    if hasattr(ProcessorMixin, "attributes"):  # transformers 4; 5 reads the signature below
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        tokens_per_tile=256,
        chat_template=None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.tokens_per_tile = tokens_per_tile
        self.image_token = IMAGE_TOKEN
        tokens = (IMAGE_TOKEN, IMAGE_START, IMAGE_END)
        self.image_ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
        for token, token_id in zip(tokens, self.image_ids, strict=True):
            if token_id is None or token_id == tokenizer.unk_token_id:
                raise ValueError(f"the tokenizer has no token {token!r}")
        self.image_token_id = self.image_ids[0]
        self.image_token_ids = self.image_ids

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Expands placeholders and encodes.

        Every "<image>", from left to right, becomes "<img>", tokens_per_tile times the image's
        tiles "<IMG_CONTEXT>", and "</img>". Text without images may hold such runs already.

        Args:
          images: an image, a list of images in order of their placeholders, or a list of lists,
            one per text. The images of one text share the tile budget.
          text: a string or a list of B strings; None to process images alone.
          videos, audio: must be None.
          **kwargs: settings of the image processor (`max_dynamic_patch`, ...) and the tokenizer
            (`return_tensors`, `padding`, `max_length`, ...), flat or in groups (`images_kwargs`,
            `text_kwargs`). Rows are padded, on the left, unless told otherwise.

        Returns:
          `BatchFeature` of input_ids [B, S] and attention_mask [B, S]; with images, pixel_values
          float32 [tiles of all texts, 3, H, W]; with `return_mm_token_type_ids`,
          mm_token_type_ids [B, S], 1 at the places of an image, its brackets included.

        Raises:
          ValueError: another number of images than of placeholders, or image tokens truncated.
        """
        if videos is not None or audio is not None:
            raise ValueError("HoVLE reads text and images, not videos or audio")
        if text is None and images is None:
            raise ValueError("give text, images or both")
        tiling, settings = self._split_kwargs(kwargs)
        return_tensors = settings.pop("return_tensors", None)
        return_mm_token_type_ids = settings.pop("return_mm_token_type_ids", False)
        if text is None:
            pixels = self.image_processor(images, **tiling)["pixel_values"]
            return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

        texts = [text] if isinstance(text, str) else list(text)
        data, tiles = {}, None
        if images is not None:
            encoded = self.image_processor(_per_text(images, texts), **tiling)
            tiles = encoded["num_patches"]
            texts = self._expand(texts, tiles)
            if tiles:
                data["pixel_values"] = encoded["pixel_values"]
        elif placeholders := sum(t.count(IMAGE_PLACEHOLDER) for t in texts):
            raise ValueError(_mismatch(placeholders, 0))

        settings = {
            "padding": True,
            "padding_side": "left",
            "return_token_type_ids": False,
            **settings,
        }
        if settings.get("add_special_tokens", True) and self.tokenizer("")["input_ids"]:
            # The tokenizer adds BOS; a rendered chat may begin with one.
            texts = [t.removeprefix(self.tokenizer.bos_token) for t in texts]
        encoded = self.tokenizer(texts, **settings)
        ids = encoded["input_ids"]
        if tiles is not None:
            want = self.tokens_per_tile * sum(tiles)
            have = sum(row.count(self.image_token_id) for row in ids)
            if have != want:
                raise ValueError(
                    f"{have} of {want} image tokens are left: raise max_length or do not truncate"
                )
        if return_mm_token_type_ids:
            encoded["mm_token_type_ids"] = [
                np.isin(row, self.image_ids).astype(int).tolist() for row in ids
            ]
        return BatchFeature({**encoded, **data}, tensor_type=return_tensors)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As in `ProcessorMixin`; contents may be strings as well as lists of items."""
        return super().apply_chat_template(_with_lists(conversation), chat_template, **kwargs)

    def _expand(self, texts, tiles):
        """Replaces the placeholders of all texts, in order, by runs of image tokens."""
        counts = iter(tiles)

        def run(_):
            return IMAGE_START + IMAGE_TOKEN * (self.tokens_per_tile * next(counts)) + IMAGE_END

        return [_PLACEHOLDER_RE.sub(run, t) for t in texts]

    def _split_kwargs(self, kwargs):
        """Flat or grouped settings -> (those of the image processor, those of the tokenizer)."""
        flat = dict(kwargs)
        for group in ("common_kwargs", "images_kwargs", "text_kwargs"):
            flat.update(flat.pop(group, None) or {})
        names = self.image_processor.valid_kwargs.__annotations__.keys()
        tiling = {k: v for k, v in flat.items() if k in names}
        return tiling, {k: v for k, v in flat.items() if k not in names}

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Places and tiles of the images of one text, from [(height, width)]; for vLLM."""
        if image_sizes is None:
            return MultiModalData()
        tiling, _ = self._split_kwargs(kwargs)
        patches = self.image_processor.count_patches(image_sizes, **tiling)
        return MultiModalData(
            num_image_tokens=[self.tokens_per_tile * n + 2 for n in patches],  # 2: the brackets
            num_image_patches=patches,
        )


def _mismatch(placeholders, images):
    return (
        f"{placeholders} image placeholders ({IMAGE_PLACEHOLDER!r}) in the text but {images} "
        "images; they must match one to one"
    )


def _per_text(images, texts):
    """One image, a list or a list of lists -> a list of images per text.

    A flat list is dealt out by the placeholders of the texts.
    """
    if not isinstance(images, list | tuple):
        images = [images]
    wanted = [len(_PLACEHOLDER_RE.findall(text)) for text in texts]
    if images and all(isinstance(sample, list | tuple) for sample in images):
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} lists of images for {len(texts)} texts")
        for sample, count in zip(images, wanted, strict=True):
            if len(sample) != count:
                raise ValueError(_mismatch(count, len(sample)))
        return images
    if len(images) != sum(wanted):
        raise ValueError(_mismatch(sum(wanted), len(images)))
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in wanted]


def _with_lists(conversation):
    """Messages, or a batch of conversations, with every string content as a list of one text."""
    if isinstance(conversation, list | tuple):
        return [_with_lists(item) for item in conversation]
    if isinstance(conversation, dict) and isinstance(conversation.get("content"), str):
        text = {"type": "text", "text": conversation["content"]}
        return {**conversation, "content": [text]}
    return conversation
