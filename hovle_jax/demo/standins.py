"""Small stand-ins for what the paper takes pre-trained: a vision teacher and a text-only LM.

The teacher sees images with their own labels and no text; the LM sees text and no images. What one
of them knows can reach the other only through the three stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hovle_jax import losses, model
from hovle_jax.config import ModelConfig, TeacherConfig
from hovle_jax.data.chat import encode_conversation
from hovle_jax.data.image import open_image
from hovle_jax.data.pack import assemble
from hovle_jax.data.records import Turn
from hovle_jax.data.samples import Sample, get_template
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.demo import digits
from hovle_jax.nn import teacher
from hovle_jax.run.metrics import Progress

Params = dict[str, Any]
TEACHER_STEPS, TEACHER_BATCH, LM_STEPS = 900, 192, 900
LM_ROWS, LM_TOKENS = 96, 28
TEMPERATURE = 15.0


def _fit(
    label: str,
    params: Params,
    loss: Callable[[Params, Any], jax.Array],
    batches: Iterator[Any],
    steps: int,
    lr: float,
) -> Params:
    """AdamW with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 20, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    progress = Progress(label, steps, 100)
    for i in range(1, steps + 1):
        params, state, value = step(params, state, next(batches))
        if i % 50 == 0 or i == steps:
            progress.update(i, f"loss {float(value):.4f}")
    return params


def pointing(features: jax.Array, words: np.ndarray) -> jax.Array:
    """Scores of vectors [..., E] to point at each of `words` [W, E]: [..., W]."""
    words = words / np.linalg.norm(words, axis=-1, keepdims=True)
    return TEMPERATURE * (features / jnp.linalg.norm(features, axis=-1, keepdims=True)) @ words.T


def fit_teacher(
    config: TeacherConfig,
    words: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    pool: Callable[[jax.Array], jax.Array],
    seed: int,
    steps: int,
) -> tuple[Params, float]:
    """(teacher parameters, accuracy of reading regions of test images).

    words: [W, E], the LM's vectors of what there is to read. Features are trained to point at the
    vector of their label, because the teacher this stands for ends in the LLM's input space (mlp1).
    train, test: uint8 [n, H, W, 3], labels [n, R]. pool: features [n, T, E] -> regions [n, R, E].
    """
    images, labels = train
    rng = np.random.default_rng((seed, 1))

    def scores(params: Params, pixels: jax.Array) -> jax.Array:
        return pointing(pool(teacher.apply(params, pixels, config)["features"]), words)

    def loss(params: Params, batch: Any) -> jax.Array:
        pixels, labels = batch
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return entropy(scores(params, pixels), labels).mean()

    def batches() -> Iterator[Any]:
        while True:
            pick = rng.integers(len(images), size=TEACHER_BATCH)
            yield images[pick], labels[pick]

    params = teacher.init(jax.random.key(seed), config)
    params = _fit("vision teacher", params, loss, batches(), steps, 2e-3)
    guess = jax.jit(scores)(params, test[0]).argmax(-1)
    return params, float((np.asarray(guess) == test[1]).mean())


def quadrants(features: jax.Array) -> jax.Array:
    """[N, T, E] on a square grid -> mean feature of each quadrant [N, 4, E], as digits.CELLS."""
    n, tokens, e = features.shape
    half = math.isqrt(tokens) // 2
    return features.reshape(n, 2, half, 2, half, e).mean((2, 4)).reshape(n, 4, e)


def load_labelled(paths: digits.Paths, *splits: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, H, W, 3], digits [n, 4]) of some splits, from their files."""
    images, labels = [], []
    for split in splits:
        names, found = paths.labels(split)
        images += [np.asarray(open_image(f"{paths.images}/{name}", name)) for name in names]
        labels.append(found)
    return np.stack(images), np.concatenate(labels)


def train_teacher(
    config: TeacherConfig, words: np.ndarray, paths: digits.Paths, seed: int
) -> tuple[Params, float]:
    """(teacher parameters, accuracy of reading digits of held-out writers); words: of the ten."""
    train = load_labelled(paths, "train", "unpaired")
    test = load_labelled(paths, "test")
    return fit_teacher(config, words, train, test, quadrants, seed, TEACHER_STEPS)


def _text_row(
    user: str, answer: str, tokenizer: Tokenizer, pad: int
) -> tuple[dict[str, np.ndarray], int]:
    """A text-only conversation as one row, and the place of its answer's first token."""
    encoded = encode_conversation(
        [Turn("user", user), Turn("assistant", answer)],
        [],
        tokenizer,
        get_template("internlm2-chat"),
        tokens_per_tile=1,
        system="",
    )
    sample = Sample(encoded.ids, encoded.labels, np.zeros((0, 1, 1, 3), np.uint8))
    row = assemble([sample], tokens=LM_TOKENS, tiles=0, image_size=1, weights="sample", pad_id=pad)
    row.pop("pixels")
    return row, int(np.argmax(encoded.labels >= 0))


def fit_lm(
    config: ModelConfig,
    tokenizer: Tokenizer,
    example: Callable[[np.random.Generator, int, bool], tuple[str, str]],
    seed: int,
    steps: int,
) -> tuple[Params, float]:
    """(decoder and text table, accuracy of an answer's first token in examples of a test).

    example: (rng, number of the example, of a test?) -> (user, answer), both of them text.
    """
    rng = np.random.default_rng((seed, 2))

    def rows(count: int, *, test: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
        pairs = [_text_row(*example(rng, i, test), tokenizer, config.pad_id) for i in range(count)]
        batch = {k: np.stack([row[k] for row, _ in pairs]) for k in pairs[0][0]}
        return batch, np.array([place for _, place in pairs])

    def loss(params: Params, batch: Any) -> jax.Array:
        names = ("labels", "loss_weight", "segment_ids")
        targets, weights = losses.next_token_weights(*(batch[n] for n in names))
        hidden = model.language_hidden(params, batch, config)
        head = model.head_kernel(params)
        nll = losses.token_nll(hidden, head, targets, weights, config.loss_chunk)
        return jnp.sum(nll * weights) / jnp.sum(weights)

    def batches() -> Iterator[Any]:
        while True:
            yield rows(LM_ROWS, test=False)[0]

    full = model.init(jax.random.key(seed), config)
    params = {"embedding": {"text": full["embedding"]["text"]}, "decoder": full["decoder"]}
    params = _fit("text-only LM", params, loss, batches(), steps, 2e-3)
    batch, places = rows(600, test=True)
    hidden = jax.jit(lambda p, b: model.language_hidden(p, b, config))(params, batch)
    every = np.arange(len(places))
    guess = model.logits(params, hidden[every, places - 1]).argmax(-1)
    return params, float((np.asarray(guess) == batch["input_ids"][every, places]).mean())


def train_lm(config: ModelConfig, tokenizer: Tokenizer, seed: int) -> tuple[Params, float]:
    """(decoder and text table, held-out accuracy of answering questions about textual canvases)."""

    def example(rng: np.random.Generator, i: int, test: bool) -> tuple[str, str]:
        kinds = digits.QUESTION_TYPES if test else (*digits.QUESTION_TYPES, "caption")
        return digits.text_example(rng.integers(10, size=4).tolist(), kinds[i % len(kinds)], rng)

    return fit_lm(config, tokenizer, example, seed, LM_STEPS)
