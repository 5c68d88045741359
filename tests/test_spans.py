"""Answers against hand-worked cases of SQuAD's official script, best stretches against a search of all, the loss against transformers'."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForQuestionAnswering

from trainer.spans import best_spans, boundary_losses, count_boundaries, exact_match, normalized, span_f1


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the  Denver-Broncos!", ["denverbroncos"], 1, 1),  # articles, white space, case; punctuation joins
        ("The Broncos", ["Denver Broncos", "broncos"], 1, 1),  # the best of the right answers
        ("Denver Broncos", ["Broncos"], 0, 2 / 3),  # precision 1/2, recall 1
        ("Denver Broncos team", ["the Denver Broncos of Denver"], 0, 2 * 2 / (3 + 4)),  # words common: denver, broncos
        ("cat cat cat", ["cat cat dog"], 0, 2 / 3),  # a bag: two of three
        ("Carolina", ["Denver"], 0, 0),
        ("", ["Denver"], 0, 0),
        ("", [], 1, 1),  # no answer, rightly
        ("Denver", [], 0, 0),
        ("", ["the"], 1, 1),  # v2.0: a right answer of nothing but articles counts as none
        ("...", [], 1, 1),
        ("Denver", ["!", "Denver"], 1, 1),  # v2.0 leaves the empty one out
        ("", ["!", "Denver"], 0, 0),
        ("an apple", ["a apple"], 1, 1),
        ("panther", ["pan the r"], 0, 0),  # an article is a word of its own
    ],
)
def test_scores_are_those_of_the_official_script(answer: str, right: list[str], exact: float, f1: float) -> None:
    assert exact_match(answer, right) == exact
    assert span_f1(answer, right) == pytest.approx(f1)


def test_normalized() -> None:
    assert normalized(" The `self.x_y`,\n AN  (a) thing ") == "selfxy thing"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 12), longest=st.integers(1, 15))
def test_the_best_stretch_is_the_best_of_all(seed: int, length: int, longest: int) -> None:
    rng = np.random.default_rng(seed)
    start, end = (torch.from_numpy(rng.normal(size=(3, length))).float() for _ in range(2))
    edges = np.sort(rng.integers(0, length + 1, (3, 2)), axis=1)
    found = best_spans(start, end, edges, longest)
    for row, (low, high) in enumerate(edges):
        scores = {
            (first, last): float(start[row, first].double() + end[row, last].double())
            for first in range(low, high)
            for last in range(first, min(high, first + longest))
        }
        if not scores:
            assert found.score[row] == found.log_total[row] == -np.inf
            continue
        best = max(scores, key=lambda span: scores[span])
        assert (found.first[row], found.last[row]) == best
        assert found.score[row] == scores[best]
        assert found.log_total[row] == pytest.approx(np.log(np.exp(list(scores.values())).sum()))


def test_no_window_gives_no_stretch() -> None:
    assert len(best_spans(torch.zeros(0, 5), torch.zeros(0, 5), np.zeros((0, 2), np.int64), 3).score) == 0


def test_the_loss_is_that_of_transformers_and_padding_does_not_change_it() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForQuestionAnswering(BertConfig(vocab_size=30, initializer_range=0.5, **sizes)).eval()
    ids, labels = torch.randint(1, 30, (4, 9)), torch.tensor([[0, 0], [2, 5], [8, 8], [1, 7]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        plain = model(ids, start_positions=labels[:, 0], end_positions=labels[:, 1])
        padded = model(torch.nn.functional.pad(ids, (0, 6)), attention_mask=torch.nn.functional.pad(mask, (0, 6)))
    losses = boundary_losses(plain.start_logits, plain.end_logits, mask, labels)
    assert losses.shape == (4, 2)
    assert losses.mean() == pytest.approx(plain.loss)  # half of the sum of both means
    again = boundary_losses(padded.start_logits, padded.end_logits, torch.nn.functional.pad(mask, (0, 6)), labels)
    assert torch.allclose(losses, again, atol=1e-5)
    hidden = torch.tensor([[-100, -100], *labels[1:].tolist()])
    assert boundary_losses(plain.start_logits, plain.end_logits, mask, hidden)[0].tolist() == [0.0, 0.0]
    best = torch.stack([plain.start_logits.argmax(dim=1), plain.end_logits.argmax(dim=1)], dim=1)
    assert count_boundaries(plain.start_logits, plain.end_logits, mask, best) == 8
    assert count_boundaries(plain.start_logits, plain.end_logits, mask, torch.full((4, 2), -100)) == 0
