"""Templates: text and targets against golden text written by hand from the models' published formats, and against Jinja."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.data.conversations import Turn
from trainer.data.jinja import with_system
from trainer.data.rendering import Structured, load_format
from trainer.data.templates import TEMPLATES
from trainer.errors import ConfigError, DataError

BOS, EOS = "<s>", "</s>"
SPECIAL = (
    BOS, EOS, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip


def tokenizer(special: Sequence[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """Every byte is a token, and every special token of every format is one id."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(sorted(alphabet))}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(token, normalized=False) for token in special])
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


TOOLS = (
    Turn("user", " What time is it?\n"),
    Turn("assistant", "clock() "),
    Turn("tool", "\n12:00"),
    Turn("assistant", "Noon."),
)
GOLDEN_TOOLS = {
    "chatml": "<|im_start|>user\n What time is it?\n<|im_end|>\n<|im_start|>assistant\nclock() <|im_end|>\n"
    "<|im_start|>tool\n\n12:00<|im_end|>\n<|im_start|>assistant\nNoon.<|im_end|>\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nWhat time is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nclock()<|eot_id|>"
    "<|start_header_id|>ipython<|end_header_id|>\n\n12:00<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nNoon.<|eot_id|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_tool_turns_are_those_written_by_hand_or_refused(name: str) -> None:
    """Llama 3 takes the white space off its texts, ChatML keeps it."""
    plain = tokenizer()
    found = Structured(name, TEMPLATES[name], plain)
    plain.chat_template = found.jinja()
    if name in GOLDEN_TOOLS:
        assert found.render(TOOLS).text == GOLDEN_TOOLS[name]
        assert plain.apply_chat_template(found.messages(TOOLS), tokenize=False) == GOLDEN_TOOLS[name]
        return
    with pytest.raises(DataError, match=f"template {name} has no tool turns"):
        found.render(TOOLS)
    with pytest.raises(TemplateError, match="not tool"):
        plain.apply_chat_template(found.messages(TOOLS), tokenize=False)


def test_white_space_around_a_text_is_dropped_where_the_format_drops_it() -> None:
    spaced = [Turn(turn.role, f" \n{turn.content}\n ") for turn in LONG]
    for name in ("llama2", "llama3", "gemma"):
        assert Structured(name, TEMPLATES[name], tokenizer()).render(spaced).text == GOLDEN[name][2]
    kept = Structured("chatml", TEMPLATES["chatml"], tokenizer()).render(spaced).text
    assert "<|im_start|>assistant\n \n4\n <|im_end|>" in kept


inside = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t ")
texts = st.text(inside, min_size=1, max_size=20).map(lambda t: t.strip() or "x")
loose_texts = st.text(inside, min_size=1, max_size=20).map(lambda t: t if t.strip() else "x")


@st.composite
def conversations(
    draw: st.DrawFn, said: st.SearchStrategy[str] = texts, *, tools: bool = False, inputs: bool = False
) -> list[Turn]:
    """Turns in an order that a chat has, some of them of tools; inputs: some users give one beside what they say."""
    turns = [Turn("system", draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(said), draw(said) if inputs and draw(st.booleans()) else "")]
        turns += [Turn("assistant", draw(said))]
        if tools and draw(st.booleans()):
            turns += [Turn("tool", draw(said)), Turn("assistant", draw(said))]
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(given_data=st.data())
def test_the_saved_jinja_writes_the_same_text_masks_and_prompts(name: str, given_data: st.DataObject) -> None:
    """transformers renders it in its sandbox, and its own mask of `generation` blocks is an oracle for our targets."""
    turns = given_data.draw(conversations(loose_texts, tools=TEMPLATES[name].tool is not None, inputs=True))
    plain = tokenizer()
    found = Structured(name, TEMPLATES[name], plain)
    plain.chat_template = found.jinja()
    messages = found.messages(turns)
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


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_text_for_conversations_without_one_goes_into_the_saved_template(name: str) -> None:
    plain = tokenizer()
    found = Structured(name, TEMPLATES[name], plain)
    plain.chat_template = with_system(found.jinja(), "Be\n'brief'.")
    system = Turn("system", "Be\n'brief'.")
    for turns in (LONG[1:], [system, *LONG[1:]]):
        written = plain.apply_chat_template(found.messages(turns), tokenize=False)
        assert written == found.render([system, *LONG[1:]]).text
    assert plain.apply_chat_template(found.messages(LONG), tokenize=False) == GOLDEN[name][2]


@pytest.mark.parametrize("name", ["llama2", "chatml", "gemma"])
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused_by_name(name: str) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ConfigError, match=rf"data.template \({name}\): the model's tokenizer has no "):
        load_format(name, bare)


GOOD = "user: '{content}'\nanswer: '{content}{eos}'\n"


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral", "gemma"])
def test_a_template_that_begins_with_bos_is_refused_where_the_tokenizer_has_none(name: str) -> None:
    plain = tokenizer()
    plain.bos_token = None
    with pytest.raises(
        ConfigError, match=rf"data.template \({name}\): the model's tokenizer has no a begin-of-text token"
    ):
        load_format(name, plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user: '{content}'\n", "answer: Field required"),
        ("user: hello\nanswer: '{content}{eos}'\n", "user .'hello'. must hold {content}"),
        ("user: '{content}'\nanswer: '{content}'\n", "must end with what stops the model"),
        ("user: '{content}'\nanswer: '{content}{eos}'\nfooter: x\n", "footer: Extra inputs"),
        (f"{GOOD}user_with_input: 'Q {{content}}'\n", "user_with_input .*must hold {input}"),
        (f"{GOOD}user_with_input: 'Q {{input}}'\n", "user_with_input .*must hold {content}"),
        (f"{GOOD}first_user: 'S {{system}}'\n", "first_user .*must hold {content}"),
        (
            f"{GOOD}system: 'S {{content}}'\nfirst_user: '{{system}}{{content}}'\n",
            "system and first_user are two places",
        ),
        (f"{GOOD}begin: 'S {{system}}'\n", "begin .*is not filled with {system}; take it out"),
        (f"{GOOD}default_system: 'S {{content}}'\n", "default_system .*is not filled with {content}"),
        ("user: '{content} {input}'\nanswer: '{content}{eos}'\n", "user .*is not filled with {input}"),
        ("{", "cannot be read"),
    ],
)
def test_a_yaml_template_with_a_mistake_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_format(str(tmp_path / "mine.yaml"), tokenizer())


def test_a_system_text_that_goes_into_the_first_question_does_so_where_that_has_an_input(tmp_path: Path) -> None:
    turns = [Turn("system", "Be short."), Turn("user", "Add.", input="1, 2"), Turn("assistant", "3")]
    pieces = "user_with_input: '{content}|{input}'\n"
    (tmp_path / "none.yaml").write_text(GOOD + pieces)
    with pytest.raises(DataError, match="has no place for a system text"):
        load_format(str(tmp_path / "none.yaml"), tokenizer()).render(turns)
    (tmp_path / "first.yaml").write_text(f"{GOOD}{pieces}first_user: '<{{system}}>{{content}}'\n")
    form = load_format(str(tmp_path / "first.yaml"), tokenizer())
    assert form.render(turns).text == "<Be short.>Add.\n\n1, 23</s>"
    made = tokenizer()
    made.chat_template = form.jinja()
    messages = [{"role": turn.role, "content": turn.content, "input": turn.input} for turn in turns]
    assert made.apply_chat_template(messages, tokenize=False) == form.render(turns).text


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
