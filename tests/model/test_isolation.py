"""Packed documents do not see each other: replacing one leaves the other's logits equal to the last bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

from tests.tiny import tiny_llama, tiny_tokens
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.errors import ConfigError
from trainer.model.isolation import check_isolation
from trainer.task.clm import read_batch

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tiny_tokens(tmp_path_factory.mktemp("isolation") / "tokens")
    return Stream([folder], StreamSettings(64, "best_fit"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_rows_documents_do_not_see_each_other(attention: str, stream: Stream, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama(tmp_path), use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    documents = stream.batch(range(8), document_ids=True)["document_ids"]
    batch = read_batch(stream.batch(range(8)), 64)
    changed = batch["input_ids"].clone()
    first = torch.from_numpy(documents == 0)
    assert first.any(dim=1).all()
    assert (documents == 1).any(axis=1).all()
    changed[first] = (changed[first] + 7) % 60
    with torch.no_grad():
        one, two = (
            model(input_ids=ids, position_ids=batch["position_ids"]).logits for ids in (batch["input_ids"], changed)
        )
    assert torch.equal(one[~first], two[~first])
    assert not torch.equal(one[first], two[first])


def test_a_document_alone_has_the_same_logits(stream: Stream, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(tiny_llama(tmp_path), use_cache=False)).eval()
    row = stream.batch([3], document_ids=True)
    batch = {name: torch.from_numpy(array) for name, array in row.items()}
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        for number in range(int(batch["document_ids"].max()) + 1):
            inside = batch["document_ids"][0] == number
            alone = model(input_ids=batch["input_ids"][:, inside]).logits[0]
            torch.testing.assert_close(packed[inside], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, GPTNeoXConfig])
def test_usual_architectures_pass_the_check(kind: type) -> None:
    config = kind(**SHAPE, bos_token_id=None, eos_token_id=60, pad_token_id=None)
    check_isolation(AutoModelForCausalLM.from_config(config), "data.isolate=false")


def test_a_model_that_ignores_positions_is_refused() -> None:
    class Leaking(torch.nn.Module):
        """Calls the model without what keeps documents apart."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, eos_token_id=60))
            self.config = self.inner.config

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> object:
            return self.inner(input_ids=input_ids)

    with pytest.raises(ConfigError, match=r"Leaking does not keep the documents .* or data\.packing=none"):
        check_isolation(Leaking(), "data.packing=none")  # type: ignore[arg-type]


def test_flash_attention_is_refused_since_it_isolates_only_a_row_that_is_alone() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, eos_token_id=60))
    model.config._attn_implementation_internal = "flash_attention_2"  # not installed here
    with pytest.raises(ConfigError, match=r"model\.attention \(flash_attention_2\) .* or data\.isolate=false"):
        check_isolation(model, "data.isolate=false")


def test_transformers_still_looks_for_packed_rows_in_a_batch_of_one_only() -> None:
    """Where this fails, flash attention may isolate, and need no longer be refused."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    positions = torch.arange(4).repeat(2, 2)
    assert _is_packed_sequence(positions[:1], 1)
    assert not _is_packed_sequence(positions, 2)
