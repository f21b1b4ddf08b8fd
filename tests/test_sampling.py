"""How the next token is chosen, against a written-out reference and by counting draws."""

import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.generation.sampling import REMOVED, Sampling, choose, keep_likely, rows

RNG = np.random.default_rng(0)


def reference(scores: np.ndarray, s: Sampling) -> set[int]:
    """The tokens that top-k, top-p and min-p leave, one filter after the other."""
    order = np.argsort(-scores)[: s.top_k or None]
    share = np.exp(scores[order] - scores.max())
    share /= share.sum()
    before = np.concatenate([[0], np.cumsum(share)[:-1]])
    order = order[before < s.top_p]
    share = share[before < s.top_p]
    return set(order[share >= s.min_p * share[0]].tolist())


@pytest.mark.parametrize(
    "setting",
    [
        Sampling(1.0),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=7),
        Sampling(1.0, top_k=500),
        Sampling(1.0, top_p=0.5),
        Sampling(1.0, top_p=1e-6),
        Sampling(1.0, min_p=0.2),
        Sampling(1.0, min_p=1.0),
        Sampling(1.0, top_k=9, top_p=0.8, min_p=0.1),
    ],
)
def test_filters(setting):
    scores = RNG.standard_normal((4, 50)).astype(np.float32) * 2
    others = [setting, Sampling(1.0), setting, Sampling(1.0, top_k=3)]
    kept = np.asarray(keep_likely(jnp.asarray(scores), rows(others, 50)))
    for row, own, before in zip(kept, others, scores, strict=True):
        left = set(np.flatnonzero(row > REMOVED).tolist())
        assert left == reference(before, own)
        assert all(row[i] == before[i] for i in left)


def draw(scores, setting: Sampling, count: int = 4000, seen=None) -> np.ndarray:
    """`count` draws of one request, as if its answer were that long."""
    many = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, len(scores)))
    seen = jnp.broadcast_to(
        jnp.asarray(np.zeros(len(scores), bool) if seen is None else seen), many.shape
    )
    return np.asarray(
        choose(many, seen, rows([setting] * count, len(scores)), jnp.arange(count), True)
    )


def test_draws_follow_the_probabilities():
    scores = np.array([0.0, 1.0, 2.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        share = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
        counts = np.bincount(draw(scores, Sampling(temperature)), minlength=4) / 4000
        np.testing.assert_allclose(counts, share, atol=0.03)  # 3.8 standard deviations


def test_seeds():
    scores = np.zeros(50)
    first, again, other = (draw(scores, Sampling(1.0, seed=s), 100) for s in (1, 1, 2**32 - 1))
    assert first.tolist() == again.tolist() and first.tolist() != other.tolist()
    assert len(set(first.tolist())) > 20


def test_rows_keep_their_own_settings():
    """Greedy rows among drawing ones, and the same draws wherever a row stands."""
    scores = jnp.asarray(RNG.standard_normal((3, 50)), jnp.float32)
    settings = [Sampling(), Sampling(2.0, seed=5), Sampling(2.0, top_k=1)]
    seen, made = jnp.zeros((3, 50), bool), jnp.array([0, 3, 9])
    token = np.asarray(choose(scores, seen, rows(settings, 50), made, True))
    assert token[0] == np.argmax(scores[0]) and token[2] == np.argmax(scores[2])
    back = slice(None, None, -1)
    turned = choose(scores[back], seen, rows(settings[back], 50), made[back], True)
    assert np.asarray(turned)[back].tolist() == token.tolist()
    plain = choose(scores, seen, rows([Sampling()] * 3, 50), made, False)
    assert np.asarray(plain).tolist() == np.argmax(scores, axis=1).tolist()


def test_repetition_penalty():
    scores = jnp.array([[3.0, 2.0, -1.0], [3.0, 2.0, -1.0], [-1.0, -1.5, -9.0]])
    seen = jnp.array([[True, False, False], [True, True, False], [True, False, False]])
    settings = [Sampling(repetition_penalty=2.0)] * 3  # 3 -> 1.5 and -1 -> -2
    token = choose(scores, seen, rows(settings, 3), jnp.zeros(3, jnp.int32), False)
    assert np.asarray(token).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_out_of_range(bad):
    with pytest.raises(UserError, match=f"{next(iter(bad))} must be"):
        Sampling(**bad)
