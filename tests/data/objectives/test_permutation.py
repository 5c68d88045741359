"""XLNet's order: masks as transformers makes them from the same order, spans by the same rule, and no way round the order."""

import numpy as np
import pytest
import torch
from transformers import (
    BertTokenizerFast,
    DataCollatorForPermutationLanguageModeling,
    XLNetConfig,
    XLNetLMHeadModel,
)

from trainer.data.batches import IGNORED
from trainer.data.objectives.permutation import Permutation
from trainer.data.objectives.rows import Rows, Vocabulary
from trainer.loss import token_losses
from trainer.task.objective import permutation_inputs

PAD, START, END, FIRST, SIZE, LENGTH = 0, 1, 2, 3, 300, 128


def objective() -> Permutation:
    numbers = np.arange(SIZE)
    words = Vocabulary(SIZE, PAD, START, END, -1, np.zeros(0, np.int64), numbers < FIRST, numbers >= 0, numbers < 0)
    return Permutation(words, LENGTH, 3, 1 / 6, 5)


def rows(count: int, held: int = LENGTH - 2) -> Rows:
    return Rows(
        np.random.default_rng(0).integers(FIRST, SIZE, (count, LENGTH - 2)), np.full(count, held), np.arange(count)
    )


def batch_of(count: int, held: int = LENGTH - 2) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in objective().batch(rows(count, held)).items()}


def test_the_mask_is_that_of_transformers_for_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its collator itself, whose draws of an order are noted. Special tokens differ on purpose: there they see some predicted tokens."""
    names = {"[PAD]": PAD, "[CLS]": START, "[SEP]": END, "[MASK]": 3, "[UNK]": 4}
    names |= {f"w{number}": number for number in range(5, SIZE)}
    collator = DataCollatorForPermutationLanguageModeling(BertTokenizerFast(vocab=names))
    rows = torch.from_numpy(np.random.default_rng(0).integers(5, SIZE, (20, LENGTH)))
    rows[:, -2], rows[:, -1], rows[:, 40] = END, START, END
    drawn: list[torch.Tensor] = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda count: drawn.append(randperm(count)) or drawn[-1])
    torch.manual_seed(0)
    theirs = collator(list(rows.clone()))
    assert len(drawn) == 20
    is_special = rows < 5
    for row, half in enumerate(drawn):
        chosen = theirs["labels"][row] != IGNORED
        assert 5 < chosen.sum() < 50
        places = torch.arange(LENGTH).reshape(2, -1)[:, half].flatten()  # of its factorisation order, half by half
        order = torch.where(chosen, places, -1)[None]
        targets = torch.nonzero(chosen).T
        ours = permutation_inputs({"input_ids": rows[[row]], "order": order, "targets": targets})["perm_mask"][0]
        assert torch.equal(ours[~is_special[row]].float(), theirs["perm_mask"][row][~is_special[row]])
        assert (ours[is_special[row]] == chosen).all()  # no way round the order
        assert (ours[is_special[row]] >= theirs["perm_mask"][row][is_special[row]]).all()


def test_no_target_sees_itself_or_a_later_one_by_any_way() -> None:
    """Through any number of layers: a token may see what those see that it sees. Special tokens may not lead round the order."""
    batch = batch_of(4, held=100)
    inputs = permutation_inputs(batch)
    for row in range(4):
        order = batch["order"][row]
        sees = inputs["perm_mask"][row] == 0
        reach = (sees | torch.eye(LENGTH, dtype=torch.bool)).float()
        for _ in range(8):
            reach = ((reach @ reach) > 0).float()
        targets = torch.nonzero(order >= 0).flatten()
        for target in targets.tolist():
            seen_by_query = sees[target].float() @ reach > 0
            later = targets[order[targets] >= order[target]]
            assert not seen_by_query[later].any()


def test_spans_have_the_rule_s_lengths_and_share() -> None:
    chosen = objective().spans(np.arange(8000))
    assert chosen.size > 10**6
    assert chosen[:, : LENGTH - 30].mean() == pytest.approx(1 / 6, abs=0.002)
    runs = np.diff(np.flatnonzero(np.diff(np.pad(chosen, ((0, 0), (1, 1))).ravel().astype(np.int8))))[::2]
    assert set(np.unique(runs)) <= set(range(1, 11))  # two spans may touch
    assert np.bincount(runs)[1:6].min() > 1000


def test_targets_name_the_predicted_tokens_and_the_mapping_points_at_them() -> None:
    batch = batch_of(10, held=90)
    inputs = permutation_inputs(batch)
    counts = (batch["order"] >= 0).sum(dim=1)
    for row in range(10):
        places = torch.nonzero(batch["order"][row] >= 0).flatten()
        assert batch["targets"][row, : counts[row]].tolist() == places.tolist()
        assert batch["labels"][row, : counts[row]].tolist() == batch["input_ids"][row, places].tolist()
        assert (batch["labels"][row, counts[row] :] == IGNORED).all()
        assert inputs["target_mapping"][row, : counts[row]].argmax(dim=1).tolist() == places.tolist()
        assert sorted(batch["order"][row, places].tolist()) == sorted(set(batch["order"][row, places].tolist()))
    assert (batch["input_ids"][:, 90] == END).all() and (batch["input_ids"][:, 91] == START).all()
    assert inputs["attention_mask"].sum(dim=1).tolist() == [92] * 10
    assert (batch["order"][:, 90:] == -1).all()


def test_a_row_s_losses_do_not_depend_on_the_rows_beside_it() -> None:
    """Some rows predict their first token and have fewer targets than others."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=SIZE, **sizes, initializer_range=0.3)).eval()
    whole = rows(40)
    losses = losses_of(model, whole)
    counts = (objective().batch(whole)["labels"] != IGNORED).sum(axis=1)
    assert any(objective().batch(whole)["order"][counts < counts.max(), 0] >= 0)
    for row in range(40):
        alone = losses_of(model, Rows(whole.ids[[row]], whole.held[[row]], whole.samples[[row]]))[0]
        assert torch.allclose(alone, losses[row, : counts[row]], atol=1e-4)


def losses_of(model: XLNetLMHeadModel, given: Rows) -> torch.Tensor:
    batch = {name: torch.from_numpy(array) for name, array in objective().batch(given).items()}
    with torch.no_grad():
        return token_losses(model(**permutation_inputs(batch)).logits, batch["labels"])
