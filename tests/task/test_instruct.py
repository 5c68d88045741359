"""Instruction tuning as training: answers are learned, alike on every backend, packed or not, and generated at the end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from tests.distributed.resume_runs import same_weights, start
from tests.rank_pool import run_ranks
from tests.tiny import NUM_WORDS, tiny_llama, tiny_tokens
from trainer.backend import build_accelerator
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.shards import ShardReader
from trainer.checkpoint.store import step_name
from trainer.config import (
    FullConfig,
    InstructData,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from trainer.data.batches import IGNORED
from trainer.data.docstrings import INSTRUCTION, pairs_of_file
from trainer.data.instruct import InstructSplit, build_instruct
from trainer.loss import token_losses
from trainer.metrics import rouge_l
from trainer.model.export import load_exported
from trainer.model.load import build_model
from trainer.predict.generate import Decoding, generate
from trainer.task import build_task
from trainer.task.instruct import InstructTask

CHAT = (
    "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }}"
    "{{ ' ' if m.role == 'user' else '<end>' }}{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that pads with its end token, and pairs whose responses have 1 to 20 words, always the same ones."""
    folder = tmp_path_factory.mktemp("instruct")
    tiny_llama(folder / "model")
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder / "model")).save_pretrained(folder / "model")
    tiny_tokens(folder / "tokens")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokens" / "tokenizer.json"), eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(80):
        words = [f"w{number}" for number in rng.integers(NUM_WORDS, size=int(rng.integers(1, 9)))]
        answer = [f"w{7 + number % 3}" for number in range(int(rng.integers(1, 21)))]
        lines.append(json.dumps({"prompt": " ".join(words), "response": " ".join(answer)}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_config(root: Path, run: Path, **changes: object) -> RunConfig:
    return RunConfig(
        name="instruct",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), task="clm"),
        method=LoraConfig(rank=4),
        data=InstructData(source=str(root / "pairs.jsonl"), max_length=40, validation_fraction=0.2, new_tokens=8),
        optim=OptimConfig(peak_lr=2e-2),
        train=TrainConfig(max_steps=8, global_batch_size=8, metric="loss", log_every=4, eval_every=4),
    ).model_copy(update=changes)


def test_docstrings_are_taken_from_their_functions(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        'class A:\n    def f(self, x):\n        """Double x."""\n        return 2 * x\n\n    def g(self):\n        """Only this."""\n'
    )
    assert list(pairs_of_file(file)) == [(f"{INSTRUCTION}def f(self, x):\n    return 2 * x", "Double x.")]
    file.write_text("def broken(:\n")
    assert list(pairs_of_file(file)) == []


@pytest.mark.parametrize("method", [LoraConfig(rank=4), PromptConfig(num_virtual_tokens=3)], ids=["lora", "prompt"])
def test_training_learns_responses_and_ranks_agree_with_one_process(
    method: LoraConfig | PromptConfig, root: Path, tmp_path: Path
) -> None:
    single = start(run_config(root, tmp_path / "single", method=method), "single", 1)
    assert single is not None
    assert single[0]["error"] is None
    losses = [single[0]["losses"][step] for step in range(8)]
    ranks = start(run_config(root, tmp_path / "zero2", method=method), "zero2", 3)  # which get 5, 5 and 6 of 16 prompts
    assert ranks is not None
    summed = [sum(facts["losses"][step] for facts in ranks) for step in range(8)]
    assert summed == pytest.approx(losses, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "single" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert evaluated[-1] < evaluated[0]
    assert "[...]" in (tmp_path / "single" / "samples.txt").read_text()
    last, of_ranks = lines[-1], json.loads((tmp_path / "zero2" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/generated"] == of_ranks["eval/generated"] == 16
    assert of_ranks["eval/count"] == last["eval/count"]
    for name in ("stop_rate", "exact_match", "rouge_l"):
        assert of_ranks[f"eval/{name}"] == last[f"eval/{name}"]
    assert 0 <= last["eval/stop_rate"] <= 1
    assert last["eval/rouge_l"] > 0 or method.name == "prompt"  # three vectors learn little in 8 steps
    _, tokenizer, info = load_exported(tmp_path / "single" / "model")
    assert tokenizer.chat_template == CHAT
    assert info["stop_token_ids"] == [NUM_WORDS]


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_stopped_run_goes_on_to_the_same_weights(packing: str, root: Path, tmp_path: Path) -> None:
    def config(run: str) -> RunConfig:
        return packing_config(root, tmp_path / run, packing, max_steps=6, global_batch_size=4, save_every=2)

    whole = start(config("whole"), "ddp", 2)
    assert start(config("again"), "ddp", 2, fault="step@1:3:usr1") is not None
    resumed = start(config("again"), "ddp", 2)
    assert whole is not None
    assert resumed is not None
    for facts, expected in zip(resumed, whole, strict=True):
        assert facts["error"] is None
        assert sorted(facts["losses"]) == [3, 4, 5]
        assert same_weights(facts, expected)


def losses_of(config: RunConfig, backend: str, ranks: int) -> list[float]:
    facts = start(config, backend, ranks)
    assert facts is not None
    assert [each["error"] for each in facts] == [None] * ranks
    return [sum(each["losses"][step] for each in facts) for step in range(len(facts[0]["losses"]))]


def packing_config(root: Path, run: Path, packing: str, **train: object) -> RunConfig:
    """One global batch holds the whole training set, so that packed and unpacked steps see the same samples."""
    settings = {
        "max_steps": 3,
        "global_batch_size": 64,
        "metric": "loss",
        "log_every": 3,
        "eval_every": 3,
        "save_every": 1,
        "keep_last": 5,
    }
    data = InstructData(
        source=str(root / "pairs.jsonl"),
        max_length=40,
        validation_fraction=0.2,
        packing=packing,
        generate=4,
        group_by_length=False,
    )  # type: ignore[arg-type]
    return run_config(root, run, data=data, train=TrainConfig(**(settings | train)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def unpacked(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], torch.Tensor]:
    """Losses of three steps on one process, a row for each conversation, and the first gradient."""
    run = tmp_path_factory.mktemp("plain")
    return losses_of(packing_config(root, run, "none"), "single", 1), first_moment(run)


def first_moment(run: Path) -> torch.Tensor:
    """(P,): Adam's moment after one step, which is that step's gradient times 0.1 and clipped, of every trained parameter."""
    folder = run / "checkpoints" / step_name(1)
    manifest = read_manifest(folder)
    reader = ShardReader(folder, [name for name in manifest.files if name.startswith("optimizer")])
    return torch.cat([reader.whole(key).flatten() for key in sorted(manifest.tensors) if key.startswith("exp_avg/")])


@pytest.mark.parametrize(
    ("backend", "ranks", "micro"),
    [
        ("single", 1, None),
        ("single", 1, 3),
        ("ddp", 3, 1),
        ("fsdp", 2, None),
        ("zero1", 2, 3),
        ("zero2", 2, 2),
        ("zero3", 2, None),
    ],
)
def test_packed_rows_take_the_step_of_unpacked_ones(
    backend: str, ranks: int, micro: int | None, root: Path, tmp_path: Path, unpacked: tuple[list[float], torch.Tensor]
) -> None:
    """Loss and gradient, whatever the backend and however differently many targets the micro-batches hold."""
    losses, gradient = unpacked
    rows = packed_rows(root)
    config = packing_config(root, tmp_path / "packed", "best_fit", global_batch_size=rows, micro_batch_size=micro)
    assert losses_of(config, backend, ranks) == pytest.approx(losses, rel=1e-5)
    assert max(losses) - min(losses) > 1e-3
    assert float((first_moment(config.folder) - gradient).norm() / gradient.norm()) < 1e-5
    assert gradient.norm() > 1e-3


def packed_rows(root: Path) -> int:
    """How many rows the training set is packed into."""
    return len(split_of(root, "best_fit"))


@pytest.mark.parametrize("micro", [None, 1, 5])
def test_packed_rows_have_the_gradient_of_unpacked_ones(micro: int | None, root: Path) -> None:
    """In double precision, of every parameter, of the whole set at once and summed over micro-batches."""
    plain, packed = (gradient_of(root, packing, size) for packing, size in (("none", None), ("best_fit", micro)))
    assert float((packed - plain).norm() / plain.norm()) < 1e-5
    assert float(plain.norm()) > 1


def gradient_of(root: Path, packing: str, micro: int | None) -> torch.Tensor:
    """(P,) float64: of the loss summed over the training set, micro rows at a time."""
    split = split_of(root, packing)
    model = AutoModelForCausalLM.from_pretrained(root / "model").double()
    counts = []
    for first in range(0, len(split), micro or len(split)):
        batch = split.batch(np.arange(first, min(first + (micro or len(split)), len(split))), NUM_WORDS)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        token_losses(model(**inputs, use_cache=False).logits, batch["labels"]).sum().backward()
        counts.append(int((batch["labels"] != IGNORED).sum()))
    assert micro != 1 or max(counts) > 1.5 * min(counts)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def split_of(root: Path, packing: str) -> InstructSplit:
    """The training rows."""
    data = packing_config(root, root, packing).data
    assert isinstance(data, InstructData)
    return build_instruct(data, AutoTokenizer.from_pretrained(root / "model")).train


def test_a_packed_conversation_does_not_see_its_neighbour(root: Path, tmp_path: Path) -> None:
    """Bit for bit, on the attention in use, in the model that a run builds and a batch of two rows of which one is padded."""
    (found,) = run_ranks(logits_before_and_after, "single", 1, args=(packing_config(root, tmp_path, "best_fit"),))
    for one, other, end, held in found:
        assert np.array_equal(one[end:held], other[end:held])
        assert not np.array_equal(one[:end], other[:end])
    assert found[0][3] != found[1][3]


def logits_before_and_after(config: RunConfig) -> list[tuple[np.ndarray, np.ndarray, int, int]]:
    """Of two packed rows: logits, those after the first conversation was replaced, where it ends, and where the row does."""
    accelerator = build_accelerator(config)
    task = build_task(config, accelerator)
    assert isinstance(task, InstructTask)
    split = task.data.train
    rows = [number for number, members in enumerate(split.rows) if len(members) > 1]
    shortest = min(rows, key=lambda number: split.lengths[number])
    batch = task.training_batch(np.array([shortest, next(number for number in rows if number != shortest)]))
    ends = [split.samples[split.rows[row][0]].num_inputs for row in (shortest, rows[int(rows[0] == shortest)])]
    changed = batch["input_ids"].clone()
    for row, end in enumerate(ends):
        changed[row, :end] = (changed[row, :end] + 1) % NUM_WORDS
    model = build_model(config, (), accelerator).eval()
    with torch.no_grad():
        one, other = (
            model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits.numpy()
            for ids in (batch["input_ids"], changed)
        )
    held = batch["num_tokens"].tolist()
    return [(one[row], other[row], ends[row], held[row]) for row in range(2)]


def test_the_end_of_a_run_writes_no_further_than_the_models_positions(root: Path, tmp_path: Path) -> None:
    """GPT-2 looks its positions up in a table."""
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": NUM_WORDS + 1, "n_positions": 40}
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=NUM_WORDS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    data = InstructData(source=str(root / "pairs.jsonl"), max_length=40, validation_fraction=0.2, new_tokens=38)
    settings = {"model": ModelConfig(source=str(tmp_path / "gpt2"), task="clm"), "method": FullConfig(), "data": data}
    train = TrainConfig(max_steps=1, global_batch_size=8, metric="loss")
    facts = start(run_config(root, tmp_path / "run", train=train, **settings), "single", 1)
    assert facts is not None
    assert facts[0]["error"] is None
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/generated"] == 16
    assert last["eval/stop_rate"] < 1


def test_generation_ends_at_the_stop_and_does_not_depend_on_its_company(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    prompts = [torch.tensor([1, 5, 2]), torch.tensor([1, 7, 8, 9, 2]), torch.tensor([3])]
    how = Decoding(NUM_WORDS, [NUM_WORDS], 12)
    together = generate(model, prompts, how)
    for prompt, (ids, has_stopped) in zip(prompts, together, strict=True):
        ((alone, stopped),) = generate(model, [prompt], how)
        assert (alone.tolist(), stopped) == (ids.tolist(), has_stopped)
    first = int(together[0][0][2])
    ((cut, stopped),) = generate(model, prompts[:1], Decoding(NUM_WORDS, [NUM_WORDS, first], 12))
    assert stopped
    assert first not in cut.tolist()


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("the cat", "the cat sat down", 2 * 2 / 6),
        ("sat the cat", "the cat sat", 2 * 2 / 6),
        ("", "a", 0.0),
        ("a", "b", 0.0),
        ("police kill the gunman", "police killed the gunman", 0.75),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)
