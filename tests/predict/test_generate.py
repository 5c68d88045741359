"""Generation against a decoder that is stepped by hand, and without regard to company."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, LlamaConfig

from tests.tiny import tiny_bart, tiny_llama, tiny_t5
from trainer.errors import ConfigError, DataError
from trainer.predict.answer import PredictOptions, open_answerer
from trainer.predict.generate import Decoding, Draws, generate

END, NEW = 1, 7
GREEDY = Decoding(0, (END,), NEW)
WAYS = {
    "greedy": GREEDY,
    "beams": Decoding(0, (END,), NEW, num_beams=3),
    "sampled": Decoding(0, (END,), NEW, temperature=1.0, seed=5),
}
TEXTS = ["w3 w4", "w9 w8 w7 w6 w5 w4 w3", "w1", "w50 w51 w52 w53"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("generate")
    tiny_llama(folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5(folder / "t5"))
    config = LlamaConfig.from_pretrained(folder / "llama")
    config.vocab_size, config.eos_token_id = len(tokenizer), END
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return {"llama": folder / "llama", "t5": folder / "t5", "bart": tiny_bart(folder / "bart")}


def load(folder: Path) -> tuple[Any, Any]:
    kind = AutoModelForCausalLM if folder.name == "llama" else AutoModelForSeq2SeqLM
    model = kind.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh weights say much the same at every place, so close together that rounding decides
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model, AutoTokenizer.from_pretrained(folder)


def prompts(tokenizer: Any) -> list[torch.Tensor]:
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]


@torch.no_grad()
def by_hand(model: Any, prompt: torch.Tensor) -> tuple[list[int], bool]:
    """Greedy, without a cache, a mask or company."""
    made: list[int] = []
    for _ in range(NEW):
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *made]])
            logits = model(input_ids=prompt[None], decoder_input_ids=start, use_cache=False).logits
        else:
            logits = model(input_ids=torch.cat([prompt, torch.tensor(made, dtype=torch.int64)])[None]).logits
        best = int(logits[0, -1].argmax())
        if best == END:
            return made, True
        made.append(best)
    return made, False


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_greedy_is_the_likeliest_token_at_every_step(name: str, folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders[name])
    asked = prompts(tokenizer)
    found = [(ids.tolist(), stopped) for ids, stopped in generate(model, asked, GREEDY)]
    assert found == [by_hand(model, prompt) for prompt in asked]
    assert any(ids for ids, _ in found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_a_text_does_not_depend_on_those_beside_it(name: str, way: str, folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders[name])
    asked = prompts(tokenizer)
    for number, (prompt, (ids, stopped)) in enumerate(zip(asked, generate(model, asked, WAYS[way]), strict=True)):
        ((alone, stopped_alone),) = generate(model, [prompt], WAYS[way], numbers=[number])
        assert (alone.tolist(), stopped_alone) == (ids.tolist(), stopped)


@torch.no_grad()
def test_beams_find_the_likeliest_text(folders: dict[str, Path]) -> None:
    """Of two tokens, where nothing ends a text, with a beam for each first token: every text is looked at, here and by hand."""
    model, tokenizer = load(folders["t5"])
    prompt, size = prompts(tokenizer)[0], len(tokenizer)
    begun = torch.tensor([[model.config.decoder_start_token_id, first] for first in range(size)])
    logits = model(input_ids=prompt.expand(size, -1), decoder_input_ids=begun, use_cache=False).logits.log_softmax(-1)
    total = logits[0, 0, :, None] + logits[:, 1]
    ((found, _),) = generate(model, [prompt], Decoding(0, (), 2, num_beams=size))
    assert found.tolist() == list(divmod(int(total.argmax()), size))
    ((greedy, _),) = generate(model, [prompt], Decoding(0, (), 2))
    assert total[tuple(greedy.tolist())] <= total.max()


def test_sampling_follows_the_probabilities() -> None:
    """Counts of 20,000 draws at temperature 2 against a softmax by hand: within five standard deviations."""
    scores, temperature, count = torch.tensor([0.0, 1.0, 3.0, -2.0]), 2.0, 20_000
    draws = Draws(Decoding(0, (), 1, temperature=temperature, seed=1), range(count))
    noisy = draws(torch.zeros(count, 1), scores.double().expand(count, -1))
    shares = noisy.argmax(dim=1).bincount(minlength=4) / count
    expected = (scores / temperature).exp() / (scores / temperature).exp().sum()
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_seeds_and_temperatures_change_what_is_sampled(folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders["t5"])
    asked = prompts(tokenizer)

    def sampled(**changes: Any) -> list[list[int]]:
        how = Decoding(**{"padding": 0, "stop": (END,), "new_tokens": NEW, "temperature": 1.0} | changes)
        return [ids.tolist() for ids, _ in generate(model, asked, how)]

    assert sampled() == sampled()
    assert sampled() != sampled(seed=1)
    assert sampled(temperature=1e-4) == [ids.tolist() for ids, _ in generate(model, asked, GREEDY)]


def test_a_cut_text_of_bart_is_not_called_stopped(folders: dict[str, Path]) -> None:
    """Its settings force an end at the last token."""
    model, tokenizer = load(folders["bart"])
    assert model.generation_config.forced_eos_token_id == END
    never = Decoding(0, (END,), 3, temperature=1e6, seed=2)
    found = generate(model, prompts(tokenizer), never)
    assert [len(ids) for ids, stopped in found if not stopped] == [3] * sum(not stopped for _, stopped in found)
    assert not all(stopped for _, stopped in found)


# Answers


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}, {"temperature": 0.7, "seed": 3}])
def test_answers_come_in_order_whatever_the_batch_size(
    name: str, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    task, (model, tokenizer) = "clm" if name == "llama" else "seq2seq", load(folders[name])
    found = [
        open_answerer(task, model, tokenizer, {}, PredictOptions(batch_size=size, new_tokens=NEW, **changes)).answer(
            TEXTS
        )
        for size in (1, 3, 32)
    ]
    assert found[0] == found[1] == found[2]
    assert [answer.facts["text"] for answer in found[0]] == TEXTS
    assert [list(answer.facts) for answer in found[0]] == [["text", "generated", "stopped", "is_cut"]] * len(TEXTS)
    assert all(answer.words.endswith(" [...]") != answer.facts["stopped"] for answer in found[0])


def test_a_run_says_prefix_and_length(folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders["t5"])
    info, options = {"prefix": "w7 ", "max_length": 5}, PredictOptions(new_tokens=NEW)
    asked = torch.tensor([*tokenizer("w7 w9 w8 w7")["input_ids"], END])
    ((ids, _),) = generate(model, [asked], GREEDY)
    (answer,) = open_answerer("seq2seq", model, tokenizer, info, options).answer(["w9 w8 w7 w6 w5"])
    assert answer.facts["generated"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer.facts["is_cut"]


def test_a_chat_is_asked_in_its_template_and_ends_at_its_stop(folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders["llama"])
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w2{% endif %}"
    )
    first = int(generate(model, [torch.tensor(tokenizer("w1 w9 w2")["input_ids"])], GREEDY)[0][0][0])
    options = PredictOptions(new_tokens=NEW)
    (answer,) = open_answerer("clm", model, tokenizer, {"stop_token_ids": [first]}, options).answer(["w9"])
    assert (answer.facts["generated"], answer.facts["stopped"]) == ("", True)


def test_what_cannot_be_answered_is_named(folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders["llama"])
    with pytest.raises(
        ConfigError, match=r"temperature \(0.5\) samples and num_beams \(4\) searches; leave one of them out"
    ):
        open_answerer("clm", model, tokenizer, {}, PredictOptions(temperature=0.5, num_beams=4))
    answerer = open_answerer("clm", model, tokenizer, {}, PredictOptions(new_tokens=100))
    with pytest.raises(
        DataError, match=r"text 2 \('w1 w1.*\) has 29 tokens and new_tokens is 100, together more than the model's 128"
    ):
        answerer.answer(["w1", " ".join(["w1"] * 29)])
    with pytest.raises(DataError, match=r"text 1 \(' '\) is empty"):
        answerer.answer([" "])
    model, tokenizer = load(folders["bart"])
    with pytest.raises(ConfigError, match=r"new_tokens \(64\) must be below 64, the model's positions"):
        open_answerer("seq2seq", model, tokenizer, {}, PredictOptions(new_tokens=64))
