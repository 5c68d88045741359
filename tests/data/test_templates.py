"""Templates: text and targets against golden text written by hand from the models' published formats, and against Jinja."""

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.data.assets import asset_path
from trainer.data.conversations import Turn
from trainer.data.rendering import Own, Structured, load_format
from trainer.data.templates import TEMPLATES
from trainer.errors import ConfigError, DataError

BOS, EOS = "<s>", "</s>"
SPECIAL = (
    BOS, EOS, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, and every special token of every format is one id."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(sorted(alphabet))}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=BOS, eos_token=EOS, pad_token=EOS)


SHORT = (Turn("user", "What is 2 + 2?"), Turn("assistant", "It is 4."))
LONG = (
    Turn("system", "Be brief."),
    Turn("user", "What is 2 + 2?"),
    Turn("assistant", "4"),
    Turn("user", "And 3 + 3?"),
    Turn("assistant", "6"),
)
GOLDEN: dict[str, tuple[str, list[str], str, list[str]]] = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is 2 + 2?\n\n### Response:\nIt is 4.</s>\n\n",
        ["It is 4.</s>"],
        "Be brief.\n\n### Instruction:\nWhat is 2 + 2?\n\n### Response:\n4</s>\n\n"
        "### Instruction:\nAnd 3 + 3?\n\n### Response:\n6</s>\n\n",
        ["4</s>", "6</s>"],
    ),
    "chatml": (
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n",
        ["It is 4.<|im_end|>"],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n",
        ["4<|im_end|>", "6<|im_end|>"],
    ),
    "llama2": (
        "<s>[INST] What is 2 + 2? [/INST] It is 4. </s>",
        [" It is 4. </s>"],
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST] 4 </s><s>[INST] And 3 + 3? [/INST] 6 </s>",
        [" 4 </s>", " 6 </s>"],
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 4.<|eot_id|>",
        ["It is 4.<|eot_id|>"],
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd 3 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n6<|eot_id|>",
        ["4<|eot_id|>", "6<|eot_id|>"],
    ),
    "mistral": (
        "<s> [INST] What is 2 + 2? [/INST] It is 4.</s>",
        [" It is 4.</s>"],
        "<s> [INST] Be brief.\n\nWhat is 2 + 2? [/INST] 4</s> [INST] And 3 + 3? [/INST] 6</s>",
        [" 4</s>", " 6</s>"],
    ),
    "gemma": (
        "<s><start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\nIt is 4.<end_of_turn>\n",
        ["It is 4.<end_of_turn>"],
        "<s><start_of_turn>user\nBe brief.\n\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
        "<start_of_turn>user\nAnd 3 + 3?<end_of_turn>\n<start_of_turn>model\n6<end_of_turn>\n",
        ["4<end_of_turn>", "6<end_of_turn>"],
    ),
    "zephyr": (
        "<|user|>\nWhat is 2 + 2?</s>\n<|assistant|>\nIt is 4.</s>\n",
        ["It is 4.</s>"],
        "<|system|>\nBe brief.</s>\n<|user|>\nWhat is 2 + 2?</s>\n<|assistant|>\n4</s>\n<|user|>\nAnd 3 + 3?</s>\n<|assistant|>\n6</s>\n",
        ["4</s>", "6</s>"],
    ),
    "phi": (
        "<|user|>\nWhat is 2 + 2?<|end|>\n<|assistant|>\nIt is 4.<|end|>\n",
        ["It is 4.<|end|>"],
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 2 + 2?<|end|>\n<|assistant|>\n4<|end|>\n"
        "<|user|>\nAnd 3 + 3?<|end|>\n<|assistant|>\n6<|end|>\n",
        ["4<|end|>", "6<|end|>"],
    ),
    "plain": (
        "What is 2 + 2?\nIt is 4.</s>\n\n",
        ["It is 4.</s>"],
        "Be brief.\n\nWhat is 2 + 2?\n4</s>\n\nAnd 3 + 3?\n6</s>\n\n",
        ["4</s>", "6</s>"],
    ),
}  # fmt: skip


def test_every_template_has_golden_text() -> None:
    assert GOLDEN.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_targets_are_those_written_by_hand(name: str) -> None:
    short, short_targets, long, long_targets = GOLDEN[name]
    found = Structured(name, TEMPLATES[name], tokenizer())
    for turns, text, targets in ((SHORT, short, short_targets), (LONG, long, long_targets)):
        rendered = found.render(turns)
        assert rendered.text == text
        assert [text[first:last] for first, last in rendered.answers] == targets


def test_alpaca_with_an_input_is_the_classic_one() -> None:
    turns = (Turn("user", "Translate to French.", "Good morning"), Turn("assistant", "Bonjour"))
    found = Structured("alpaca", TEMPLATES["alpaca"], tokenizer())
    assert found.render(turns).text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nTranslate to French.\n\n### Input:\nGood morning\n\n"
        "### Response:\nBonjour</s>\n\n"
    )
    chatml = Structured("chatml", TEMPLATES["chatml"], tokenizer())
    assert "user\nTranslate to French.\n\nGood morning<|im_end|>" in chatml.render(turns).text


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).map(
    lambda t: t.strip() or "x"
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(texts)), Turn("assistant", draw(texts))]
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(turns=conversations())
def test_the_saved_jinja_writes_the_same_text_masks_and_prompts(name: str, turns: list[Turn]) -> None:
    """transformers renders it in its sandbox, and its own mask of `generation` blocks is an oracle for our targets."""
    plain = tokenizer()
    found = Structured(name, TEMPLATES[name], plain)
    plain.chat_template = found.jinja()
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = found.render(turns)
    assert plain.apply_chat_template(messages, tokenize=False) == rendered.text
    told = plain.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    encoded = plain(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    assert told["input_ids"] == encoded["input_ids"]
    ours = [int(any(end > a and start < b for a, b in rendered.answers)) for start, end in encoded["offset_mapping"]]
    assert told["assistant_masks"] == ours
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            asked = plain.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            assert asked == found.prompt(turns[:number])
            assert rendered.text.startswith(asked)


@settings(max_examples=40, deadline=None)
@given(turns=conversations())
def test_the_models_own_template_gives_the_same_targets_as_ours(turns: list[Turn]) -> None:
    plain = tokenizer()
    ours = Structured("chatml", TEMPLATES["chatml"], plain)
    plain.chat_template = ours.jinja()
    assert Own(plain).render(turns) == ours.render(turns)


@pytest.mark.parametrize("name", ["llama2", "chatml", "gemma"])
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused_by_name(name: str) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ConfigError, match=rf"data.template \({name}\): the model's tokenizer has no "):
        load_format(name, bare)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user: '{content}'\n", "answer: Field required"),
        ("user: hello\nanswer: '{content}{eos}'\n", "user .'hello'. must hold {content}"),
        ("user: '{content}'\nanswer: '{content}'\n", "must end with what stops the model"),
        ("user: '{content}'\nanswer: '{content}{eos}'\nfooter: x\n", "footer: Extra inputs"),
        ("{", "cannot be read"),
    ],
)
def test_a_yaml_template_with_a_mistake_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_format(str(tmp_path / "mine.yaml"), tokenizer())


def test_a_yaml_template_is_used_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "begin: '{bos}'\nuser: \"Q: {content}\\n\"\nreply: 'A: '\nanswer: '{content}{eos}'\nafter: \"\\n\"\n"
    )
    rendered = load_format(str(tmp_path / "mine.yaml"), tokenizer()).render(SHORT)
    assert rendered.text == "<s>Q: What is 2 + 2?\nA: It is 4.</s>\n"
    with pytest.raises(DataError, match="has no place for a system text"):
        load_format(str(tmp_path / "mine.yaml"), tokenizer()).render(LONG)
    with pytest.raises(ConfigError, match="must be auto, alpaca, chatml"):
        load_format("chat-ml", tokenizer())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no way') }}", "refuses this conversation: no way"),
        ("{{ messages[0].content.missing.more }}", "refuses this conversation"),
        ("{% for a in range(10**9) %}{% endfor %}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
    ],
)
def test_a_template_that_raises_loops_or_climbs_out_is_an_error(template: str, message: str) -> None:
    plain = tokenizer()
    plain.chat_template = template
    with pytest.raises(DataError, match=message):
        load_format("auto", plain)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """Some drop what was thought in all but the last answer: what was learned is then never asked for."""
    plain = tokenizer()
    plain.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else 'short' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = load_format("auto", plain)
    found.render(SHORT)
    with pytest.raises(DataError, match="writes turn 3 differently"):
        found.render(LONG)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(turns=conversations())
def test_smollm2s_own_template_gives_the_tokens_of_apply_chat_template(turns: list[Turn]) -> None:
    """The real tokenizer. Its template is ChatML with a default system text; ours asks for the same answer as its users do."""
    real = smollm2_tokenizer()
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = Own(real).render(turns)
    encoded = real(rendered.text, add_special_tokens=False)["input_ids"]
    assert encoded == real.apply_chat_template(messages)["input_ids"]
    asked = real.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert encoded[: len(asked)] == asked
    first, last = rendered.answers[-1]
    assert rendered.text[first:last] == f"{turns[-1].content}<|im_end|>"


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(asset_path("smollm2"))
