"""The chat template that a model brings: targets, refusals, limits; and SmolLM2's real one."""

import functools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.test_instruct import chats, data, targets
from tests.data.test_templates import BOS, EOS, SPECIAL, conversations, loose_texts, tokenizer
from trainer.config import InstructData
from trainer.data.assets import asset_path
from trainer.data.conversations import Conversation, Turn
from trainer.data.gate import check, findings_of
from trainer.data.instruct import build_instruct, encode
from trainer.data.rendering import Own, Structured, load_format, special_texts
from trainer.data.templates import TEMPLATES
from trainer.data.time_limit import TooSlowError, time_limit
from trainer.errors import ConfigError, DataError


@settings(max_examples=40, deadline=None)
@given(turns=conversations())
def test_the_models_own_template_gives_the_same_targets_as_ours(turns: list[Turn]) -> None:
    plain = tokenizer()
    ours = Structured("chatml", TEMPLATES["chatml"], plain)
    plain.chat_template = ours.jinja()
    assert Own(plain).render(turns) == ours.render(turns)


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    plain = tokenizer()
    plain.chat_template = template
    return plain


LOOP = "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no way') }}", "refuses this conversation: no way"),
        ("{{ messages[0].content.missing.more }}", "refuses this conversation"),
        ("{% for a in range(10**9) %}{% endfor %}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
        (LOOP, r"took more than 0\.2 s for this conversation"),
    ],
)
def test_a_template_that_raises_loops_or_climbs_out_is_an_error_with_its_place(
    template: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.rendering.MOST_SECONDS", 0.2)
    with pytest.raises(DataError, match=rf"chats\.jsonl:1: the model's own template {message}.*begins 'Question 0"):
        build_instruct(data(chats(tmp_path), template="auto"), chat_tokenizer(template))


def test_the_time_limit_holds_in_any_thread_and_spares_what_is_fast() -> None:
    ended: list[str] = []

    def work() -> None:
        try:
            with time_limit(0.1):
                sum(1 for _ in iter(int, 1))  # for ever
        except TooSlowError:
            ended.append("interrupted")
        with time_limit(0.1):
            ended.append("fast")
        time.sleep(0.2)
        ended.append("not interrupted later")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=20)
    assert ended == ["interrupted", "fast", "not interrupted later"]


TRACED = """
import sys
from trainer.data.time_limit import TooSlowError, time_limit

def trace(frame, event, argument):
    return trace

def calls():
    return sum(int(number) for number in range(100))

sys.settrace(trace)
for seconds in (10, 0.05):
    try:
        with time_limit(seconds):
            calls() if seconds > 1 else sum(1 for _ in iter(int, 1))
    except TooSlowError:
        print("interrupted")
    print(calls())
"""


def test_the_time_limit_works_under_a_debugger() -> None:
    """A request that is taken back (PyThreadState_SetAsyncExc with null) has Python 3.11 look for it for ever while it traces."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["4950", "interrupted", "4950"], done.stderr


REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role != 'assistant' else 'short' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Some templates drop what was thought in all but the last answer: what was learned is then never asked for."""


def test_a_template_that_rewrites_earlier_turns_is_refused_and_the_ways_out_work(tmp_path: Path) -> None:
    plain, path = chat_tokenizer(REWRITING), chats(tmp_path)
    build_instruct(data(chats(tmp_path, turns=1), template="auto"), plain)
    with pytest.raises(
        DataError,
        match=r"chats\.jsonl:1: the model's own template writes turn 2 differently.*use data\.learn=last, or data\.template=NAME",
    ):
        build_instruct(data(chats(tmp_path), template="auto"), plain)
    last = data(path, template="auto", learn="last")
    found = build_instruct(last, plain)
    assert list(findings_of(found, last, plain)) == []
    text = plain.decode(found.train.samples[0].ids)
    assert "assistant\nshort<|im_end|>" in text
    assert targets(found.train.samples[0]) == ["Answer 1<|im_end|>"]
    named = data(path, template="chatml")
    assert [finding.name for finding in findings_of(build_instruct(named, plain), named, plain)] == ["template"]


def test_a_template_that_always_asks_for_the_next_answer_has_its_answers_end_before_that(tmp_path: Path) -> None:
    """As Llama 3's first one did."""
    settings = data(chats(tmp_path, turns=1), template="auto")
    asks = "<|im_start|>assistant\n"
    plain = chat_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + asks
    )
    found = build_instruct(settings, plain)
    assert targets(found.train.samples[0])[0].endswith("<|im_end|>")
    assert targets(found.train.samples[0])[0].count("<|im") == 1
    assert plain.decode(found.train.samples[0].ids).count(asks) == 1
    assert list(findings_of(found, settings, plain)) == []


def test_examples_may_be_rewritten_since_they_are_not_learned(tmp_path: Path) -> None:
    settings = data(chats(tmp_path, turns=1), template="auto", few_shot=2, max_length=400)
    found = build_instruct(settings, chat_tokenizer(REWRITING))
    assert targets(found.train.samples[0])[0].startswith("Answer 0")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "ends an answer without a special token",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is not string %}{{ m.content[0].text }}{% endif %}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "leaves an answer's text out",
        ),
        (
            "{% if messages[-1].role == 'assistant' and messages | length == 2 and messages[0].content == 'a' %}"
            "{{ raise_exception('no') }}{% endif %}x",
            "for a question and its answer: .* refuses this conversation: no",
        ),
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused_and_another_can_be_named(
    template: str, message: str, tmp_path: Path
) -> None:
    plain, path = chat_tokenizer(template), chats(tmp_path)
    with pytest.raises(ConfigError, match=rf"{message}; use data\.template=NAME data\.allow=template"):
        build_instruct(data(path, template="auto"), plain)
    named = data(path, template="chatml", allow=("template",))
    assert "data.template (chatml) writes" in check(build_instruct(named, plain), named, plain)[0]


def test_a_models_template_that_refuses_the_probe_is_a_finding_and_no_dead_end(tmp_path: Path) -> None:
    plain = chat_tokenizer("{{ raise_exception('system first') }}")
    named = data(chats(tmp_path), template="chatml")
    with pytest.raises(
        DataError, match=r"comes with: .* refuses this conversation: system first.*data\.allow=template"
    ):
        check(build_instruct(named, plain), named, plain)


def test_what_counts_as_a_special_token() -> None:
    """Those that the tokenizer calls special and those that the format names; a word of a domain is none, though it was added."""
    plain = tokenizer()
    plain.add_tokens(["<think>", "<tool>", AddedToken("user", single_word=True)])
    plain.chat_template = "<tool>{% for m in messages %}{{ m.role == 'user' }}{% endfor %}"
    assert set(special_texts(plain, Own(plain))) == {*SPECIAL, "<tool>"}
    assert set(special_texts(plain, Structured("alpaca", TEMPLATES["alpaca"], plain))) == set(SPECIAL)
    bare = tokenizer(special=(BOS, EOS))
    bare.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"])
    chatml = Structured("chatml", TEMPLATES["chatml"], bare)
    assert set(special_texts(bare, chatml)) == {BOS, EOS, "<|im_start|>", "<|im_end|>"}


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(turns=conversations() | conversations(loose_texts))
def test_smollm2s_own_template_gives_the_tokens_of_apply_chat_template(turns: list[Turn]) -> None:
    """The real tokenizer. What is learned is what transformers adds to the prompt that it would ask with, up to the token that ends it."""
    real = smollm2_tokenizer()
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    conversation = Conversation(tuple(turns), "here")
    (sample,) = encode([(conversation, 0)], load_format("auto", real), real, InstructData(max_length=4000))
    assert sample is not None
    assert [*sample.ids.tolist(), *real("\n")["input_ids"]] == real.apply_chat_template(messages)["input_ids"]
    if sample.straddles:  # white space at the beginning of an answer joined the prompt's: the gate refuses it
        assert any(turn.content[0].isspace() for turn in turns if turn.role == "assistant")
        return
    expected = np.zeros(len(sample.ids), bool)
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            asked = real.apply_chat_template(messages[:number], add_generation_prompt=True)["input_ids"]
            answered = real.apply_chat_template(messages[: number + 1])["input_ids"]
            assert answered[: len(asked)] == asked
            assert real.decode(answered[-2:]) == "<|im_end|>\n"
            expected[len(asked) : len(answered) - 1] = True
    assert sample.is_target.tolist() == expected.tolist()


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(asset_path("smollm2"))
