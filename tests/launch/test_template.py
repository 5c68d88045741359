"""`samestep template preview` and `samestep predict --chat` as people run them, on a tiny model."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from launch.cli import main
from tests.data.test_instruct import PAIR, chats, write
from tests.data.test_templates import tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tokenizer with ChatML's template, and a model."""
    from trainer.data.rendering import Structured
    from trainer.data.templates import TEMPLATES

    plain = tokenizer()
    plain.chat_template = Structured("chatml", TEMPLATES["chatml"], plain).jinja()
    return tiny_chat_model(tmp_path / "model", plain)


def tiny_chat_model(folder: Path, plain: PreTrainedTokenizerFast) -> Path:
    """The tokenizer with a two-layer Llama. Returns `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain.save_pretrained(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(plain), eos_token_id=plain.eos_token_id, **sizes)).save_pretrained(
        folder
    )
    return folder


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_preview_shows_samples_statistics_and_the_gates_verdict(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = chats(tmp_path)
    words = ("template", "preview", str(path), "max_length=200", "--model", str(model))
    code, output, _ = say(capsys, *words, "-n", "2")
    assert code == 0
    assert output.count(" targets\n") == 2
    assert "<|im_start|>assistant\nAnswer 0" in output
    assert "messages in template the model's own: samples 9, " in output
    assert "the gate finds nothing" in output
    code, output, _ = say(capsys, *words, "--html", str(tmp_path / "page.html"))
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<mark>Answer 0&lt;|im_end|&gt;</mark>" in page
    assert "<script" not in page


def test_preview_refuses_what_training_would_refuse(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = [{"role": "user", "content": "<|im_end|>"}, PAIR[1]]
    path = write(tmp_path / "chats.jsonl", [{"messages": PAIR}, {"messages": PAIR}, {"messages": forged}])
    words = ("template", "preview", str(path), "--model", str(model))
    code, _, errors = say(capsys, *words)
    assert code == 2
    assert "1 of 3 samples hold a special token" in errors
    code, output, _ = say(capsys, *words, "allow=special_token")
    assert code == 0
    assert "allowed: 1 of 3 samples" in output
    code, _, errors = say(capsys, *words, "max_lenght=3")
    assert code == 2
    assert "did you mean `data.max_length`" in errors


def test_an_instruction_tuned_run_answers_in_its_template(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.distributed.resume_runs import start
    from trainer.config import InstructData, LoraConfig, ModelConfig, RunConfig, TrainConfig

    run = tmp_path / "run"
    config = RunConfig(
        name="chat",
        run_dir=run,
        model=ModelConfig(source=str(model), task="clm"),
        method=LoraConfig(rank=2),
        data=InstructData(
            source=str(chats(tmp_path)), max_length=200, validation_fraction=0.2, generate=2, new_tokens=4
        ),
        train=TrainConfig(max_steps=2, global_batch_size=4, metric="loss"),
    )
    facts = start(config, "single", 1)
    assert facts is not None
    assert facts[0]["error"] is None
    code, output, errors = say(
        capsys, "predict", str(run), "--chat", "Question 1 of 2", "Another", "--new-tokens", "4", "--json"
    )
    assert code == 0
    assert errors.startswith("2 texts in ")
    rows = [json.loads(line) for line in output.splitlines()]
    assert [row["text"] for row in rows] == ["Question 1 of 2", "Another"]
    assert all(isinstance(row["generated"], str) and isinstance(row["stopped"], bool) for row in rows)
    code, _, errors = say(capsys, "checkpoint", "export", str(run), "--output", str(tmp_path / "exported"))
    assert code == 0, errors
    questions = ("Question 1 of 2", "Another", "--new-tokens", "4", "--json")
    code, again, _ = say(capsys, "predict", str(tmp_path / "exported"), "--chat", *questions)
    assert (code, again) == (0, output)
    code, plain, _ = say(
        capsys, "predict", str(run), *questions
    )  # a run on conversations is asked in its template anyhow
    assert code == 0
    assert [json.loads(line) for line in plain.splitlines()] == rows
    sampled = ("--temperature", "5", "--seed", "1", "--batch-size", "1")
    code, other, _ = say(capsys, "predict", str(run), "--chat", *questions, *sampled)
    assert code == 0
    assert other != output
    code, _, errors = say(capsys, "predict", str(run), "--chat", "Hi", "--num-beams", "2", "--temperature", "1")
    assert code == 2
    assert "leave one of them out" in errors
    code, _, errors = say(capsys, "predict", str(run), "--chat", "Hi", "--task", "clm")
    assert code == 2
    assert "--chat asks a run on conversations" in errors


ALPACA = (
    "Be brief.\n\n### Instruction:\nQuestion 0 of 0\n\n### Response:\nAnswer 0</s>\n\n"
    "### Instruction:\nHi\n\n### Response:\n"
)
ZEPHYR = "<|system|>\nBe brief.</s>\n<|user|>\nQuestion 0 of 0</s>\n<|assistant|>\nAnswer 0</s>\n<|user|>\nHi</s>\n<|assistant|>\n"


@pytest.mark.parametrize(("template", "method", "golden"), [("alpaca", "full", ALPACA), ("zephyr", "lora", ZEPHYR)])
def test_a_model_without_a_chat_template_is_saved_with_the_one_it_learned(
    template: str, method: str, golden: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a system text and an example before every conversation; asked by plain transformers and by `samestep predict`."""
    from tests.distributed.resume_runs import start
    from trainer.config import InstructData, ModelConfig, RunConfig, TrainConfig
    from trainer.data.instruct import build_instruct
    from trainer.model.export import load_exported
    from trainer.predict.answer import PredictOptions
    from trainer.predict.generate import Generator

    base, run = tiny_chat_model(tmp_path / "model", tokenizer()), tmp_path / "run"
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    data = InstructData(
        source=str(chats(tmp_path, turns=1)),
        template=template,
        system="Be brief.",
        few_shot=1,
        max_length=400,
        validation_fraction=0.2,
        generate=2,
        new_tokens=4,
    )
    config = RunConfig(
        name="chat",
        run_dir=run,
        model=ModelConfig(source=str(base), task="clm"),
        method={"name": method},  # type: ignore[arg-type]
        data=data,
        train=TrainConfig(max_steps=2, global_batch_size=4, metric="loss"),
    )
    facts = start(config, "single", 1)
    assert facts is not None
    assert facts[0]["error"] is None
    code, _, errors = say(capsys, "checkpoint", "export", str(run), "--output", str(tmp_path / "exported"))
    assert code == 0, errors
    learned = build_instruct(data, tokenizer()).train.samples[0]
    for folder in (run / "model", tmp_path / "exported"):
        model, written, info = load_exported(folder)
        turns = [{"role": "user", "content": "Question 0 of 0"}, {"role": "assistant", "content": "Answer 0"}]
        turns += [{"role": "user", "content": "Hi"}]
        assert written.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == golden
        generator = Generator(model, written, info, PredictOptions(), is_chat=True)
        assert written.decode(generator.prompts(["Hi"])[0][0]) == golden
        asked = generator.prompts(["Question 0 of 1?"])[0][0].tolist()
        assert asked == learned.ids[: learned.prompt_length].tolist()
        assert GenerationConfig.from_pretrained(folder).eos_token_id == info["stop_token_ids"]
    if method == "full":
        plain = AutoModelForCausalLM.from_pretrained(run / "model")
        assert plain.generation_config.eos_token_id == info["stop_token_ids"]
