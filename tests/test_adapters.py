"""Exported adapters: opened by plain PEFT and the reverse, merged, compared, and several of them on one base."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from launch.adapter import held_out_samples
from launch.cli import main
from tests.exported_runs import ADAPTER, command, export_clm, llama_base
from tests.test_predict import LABELS, TEXTS, export_run
from tests.tiny import tiny_bart, tiny_bert, tiny_sentences, tiny_t5
from trainer.config import ModelConfig, QloraConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.model.adapters import Difference, compare, find_adapter, merge, merged
from trainer.model.architecture import load_architecture
from trainer.model.export import load_base, load_exported
from trainer.model.load import quantization_of
from trainer.model.quantize import keep_layout
from trainer.predict.adapters import AdapterPredictor, check_one_base
from trainer.predict.classify import load_predictor
from trainer.run_folder import find_exported, read_info

PEFT_METHODS = ("lora", "dora", "rslora", "qlora", "vera", "ia3", "prompt", "p_tuning", "prefix")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_bert(folder / "base", hidden_size=64)
    return folder


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Path]:
    return {method: export_run(root / method, root / "base", method) for method in (*PEFT_METHODS, "adapter")}


def logits_of(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", [method for method in PEFT_METHODS if method != "qlora"])
def test_plain_peft_opens_an_exported_adapter_and_gives_equal_logits(
    method: str, root: Path, runs: dict[str, Path]
) -> None:
    from peft import PeftModel

    folder = runs[method] / "model"
    plain = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    theirs = logits_of(PeftModel.from_pretrained(plain, folder), folder)
    assert torch.equal(theirs, logits_of(load_exported(folder)[0], folder))


def plain_settings(method: str) -> Any:
    """PEFT's own settings of a method, with drawn factors."""
    from peft import IA3Config, LoraConfig, PromptTuningConfig

    if method == "prompt":
        return PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    if method == "ia3":
        return IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[], init_ia3_weights=False)
    low_rank = {"r": 2, "lora_alpha": 7, "target_modules": ["query"], "init_lora_weights": False}
    return LoraConfig(task_type="SEQ_CLS", use_dora=method == "dora", use_rslora=method == "rslora", **low_rank)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "ia3", "prompt"])
def test_an_adapter_made_by_plain_peft_opens_here(method: str, root: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    torch.manual_seed(1)
    plain = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
    theirs = get_peft_model(plain, plain_settings(method))
    theirs.save_pretrained(tmp_path)
    model, tokenizer, info = load_exported(tmp_path)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits
        assert torch.equal(expected, model(**inputs).logits)
    assert find_adapter(tmp_path)[1]["method"] == info["method"] == method
    answers = load_predictor(tmp_path).predict(TEXTS)
    assert [one.label for one in answers] == [f"LABEL_{number}" for number in expected.argmax(-1).tolist()]
    together = AdapterPredictor({"theirs": tmp_path}).predict([(text, "theirs") for text in TEXTS])
    assert [one.confidence for one in together] == pytest.approx([one.confidence for one in answers], abs=1e-5)


def test_a_plain_adapter_with_one_output_gives_a_number(root: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    torch.manual_seed(1)
    plain = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1)
    theirs = get_peft_model(plain, plain_settings("lora"))
    theirs.save_pretrained(tmp_path)
    expected = logits_of(theirs, root / "base")[:, 0].tolist()
    answers = load_predictor(tmp_path).predict(TEXTS)
    assert [getattr(one, "value", None) for one in answers] == pytest.approx(expected, abs=1e-5)


def test_the_labels_of_a_plain_adapter_are_those_of_its_last_layer(tmp_path: Path) -> None:
    """PEFT saves DistilBERT's pre_classifier, which ends with the name of the head, beside it."""
    from peft import LoraConfig, get_peft_model

    small = {"vocab_size": 30, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    plain = DistilBertForSequenceClassification(DistilBertConfig(**small, num_labels=3))
    plain.name_or_path = "distil"
    get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin"])).save_pretrained(tmp_path)
    assert read_info(tmp_path)["label_names"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    ours = {"task": "classification", "method": "lora", "base": "distil", "pooling": "model", "head_layers": None}
    check_one_base({"ours": (tmp_path, ours), "theirs": (tmp_path, read_info(tmp_path))})
    (tmp_path / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="no safetensors file; fetch it again, with git-lfs"):
        find_exported(tmp_path)


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix"])
def test_adapters_of_language_models_go_from_here_to_plain_peft_and_back(method: str, tmp_path: Path) -> None:
    """Equal logits; back without samestep.json, which for qlora says that the base is quantized and is needed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = export_clm(tmp_path / "run", llama_base(tmp_path / "llama"), {"name": method})
    folder = run / "model"
    model, tokenizer, _ = load_exported(folder)
    inputs = tokenizer(["w3 w4 w5", "w9 w8 w7"], return_tensors="pt")
    quantized = {}
    if method == "qlora":
        config = ModelConfig(source=str(tmp_path / "llama"), task="clm")
        found = quantization_of(config, QloraConfig(), load_architecture(config, ()), precision="no")
        quantized = {"quantization_config": found}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32, **quantized)
    keep_layout(plain)  # else bitsandbytes rounds scales where the CPU has AVX512-BF16, and logits differ by 6e-4
    before = plain(**inputs).logits
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, folder).eval()(**inputs).logits
        assert (theirs - before).abs().max() > 1e-2
        assert torch.equal(theirs, model(**inputs).logits)
        if method != "qlora":
            (folder / "samestep.json").unlink()
            again, _, info = load_exported(folder)
            assert info == {"task": "clm", "method": method, "base": str(tmp_path / "llama")}
            assert torch.equal(theirs, again(**inputs).logits)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "vera", "ia3"])
def test_a_merged_model_opens_without_its_adapter_and_says_the_same(
    method: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder, info = find_adapter(runs[method])
    merge(folder, info, "base", tmp_path / "out")
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits_of(alone, folder), logits_of(load_exported(folder)[0], folder), atol=1e-5)
    assert load_predictor(tmp_path / "out").predict(TEXTS)[0].label in LABELS


def test_a_model_that_keeps_buffers_in_its_files_is_merged(tmp_path: Path) -> None:
    """BART's final_logits_bias is none of its parameters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_bart(tmp_path / "bart"))
    settings = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(*find_adapter(tmp_path / "adapter"), "base", tmp_path / "out")
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        alone = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")(input_ids=ids, decoder_input_ids=ids).logits
        expected = adapted.eval()(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.allclose(alone, expected, atol=1e-5)


@pytest.mark.parametrize("into", ["dequantized", "base"])
def test_a_quantized_base_of_gpt2s_transposed_layers_is_merged(into: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    words = AutoTokenizer.from_pretrained(tiny_t5(tmp_path / "words"))
    config = GPT2Config(vocab_size=len(words), n_embd=64, n_layer=2, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    words.save_pretrained(tmp_path / "gpt2")
    folder, info = find_adapter(export_clm(tmp_path / "run", tmp_path / "gpt2", {"name": "qlora"}))
    merge(folder, info, into, tmp_path / "out")
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        apart = (alone - load_exported(folder)[0](input_ids=ids).logits).abs().max()
    assert apart < 1e-4 if into == "dequantized" else 1e-3 < apart < 10


def test_a_quantized_base_is_merged_as_the_adapter_knew_it_and_the_other_merge_is_told_apart(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder, info = find_adapter(runs["qlora"])
    model, tokenizer, _ = load_exported(folder)
    faithful = compare(model, merged(folder, info, "dequantized"), tokenizer, TEXTS)
    other = compare(model, merged(folder, info, "base"), tokenizer, TEXTS)
    assert faithful.verdict == "the same model, to rounding"
    assert faithful.max_logit_difference < 1e-4
    assert other.mean_kl > 10 * faithful.mean_kl
    assert other.max_logit_difference > 10 * faithful.max_logit_difference
    merge(folder, info, "dequantized", tmp_path / "out")
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits_of(alone, folder), logits_of(model, folder), atol=1e-4)


@pytest.mark.parametrize("into", ["dequantized", "base"])
def test_the_command_merges_a_quantized_run_both_ways_and_what_it_wrote_opens(
    into: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command("adapter", "merge", runs["qlora"], "--into", into, "--output", out) == 0
    said = capsys.readouterr().out
    assert f"{out}, opened again" in said
    assert f"samestep adapter compare {runs['qlora']}" in said
    model, _, info = load_exported(out)
    assert (info["method"], info["merged"]) == ("full", {"method": "qlora", "into": into})
    assert "quantization" not in info
    folder, about = find_adapter(runs["qlora"])
    expected = merged(folder, about, into).state_dict()  # type: ignore[arg-type]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_merge_that_is_another_model_ends_the_comparison_with_1(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Factors that nearly cancel, and are so large that fp32 has no digit left for what the merged weights were."""
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    tensors = load_file(run / "model" / ADAPTER)
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor[1::2] = tensor[::2] * 1.001
        elif "lora_B" in name:
            tensor[:, ::2], tensor[:, 1::2] = 1e9, -1e9 / 1.001
    save_file(tensors, run / "model" / ADAPTER, {"format": "pt"})
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    assert command("adapter", "compare", run, "--text", texts) == 1
    assert "ANOTHER MODEL" in capsys.readouterr().out


def test_next_tokens_are_compared_at_every_place_of_every_text(tmp_path: Path) -> None:
    run = export_clm(tmp_path / "run", llama_base(tmp_path / "llama"), {"name": "lora"})
    folder, info = find_adapter(run)
    model, tokenizer, _ = load_exported(folder)
    texts = ["w3 w4 w5", "w9 w8 w7 w6 w5"]
    same = compare(model, merged(folder, info, "base"), tokenizer, texts)
    assert (same.num_positions, same.verdict) == (8, "the same model, to rounding")
    base = load_base(info, trust_remote_code=False).eval()
    other = compare(model, base, tokenizer, texts)
    kl, agreed = [], []
    with torch.no_grad():
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt")
            one, two = (m(**inputs).logits[0].double().log_softmax(-1).numpy() for m in (model, base))
            kl += [float((np.exp(p) * (p - q)).sum()) for p, q in zip(one, two, strict=True)]
            agreed += [p.argmax() == q.argmax() for p, q in zip(one, two, strict=True)]
    assert other.mean_kl == pytest.approx(np.mean(kl))
    assert other.top1_agreement == np.mean(agreed)


def test_the_comparison_is_that_of_the_formulas() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, **_: torch.Tensor) -> "Fixed":
            return self

    def tokenizer(*_: object, **__: object) -> dict[str, torch.Tensor]:
        return {}

    found = compare(Fixed([0.0, 1.0]), Fixed([1.0, 0.0]), tokenizer, ["any"])  # type: ignore[arg-type]
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert found.mean_kl == pytest.approx(float((p * np.log(p / p[::-1])).sum()))
    assert (found.top1_agreement, found.max_logit_difference) == (0.0, 1.0)
    assert found.verdict.startswith("ANOTHER MODEL")
    assert Difference(1, 1e-4, 1.0, 0.1).verdict.startswith("close")


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning", "adapter"])
def test_what_cannot_be_merged_is_refused(method: str, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"method {method} adds no weights.*cannot be merged"):
        merge(*find_adapter(runs[method]), "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_list_inspect_compare_and_predict(
    runs: dict[str, Path], root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def say(*argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(argv))
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    assert "qlora" in say("adapter", "list", str(root))
    assert "quantized to nf4" in say("adapter", "inspect", str(runs["qlora"]))
    assert "  size: " in say("adapter", "inspect", str(runs["adapter"]))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    assert "to rounding" in say("adapter", "compare", str(runs["lora"]), "--text", str(texts))
    both = f"{runs['lora']},{runs['rslora']}"
    lines = say("predict", "--adapters", both, "a good film", "an awful film").splitlines()
    assert [line.split()[0] for line in lines] == ["lora", "rslora"] * 2
    tiny_sentences(tmp_path / "data.csv", rows=40)
    (runs["lora"] / "config.yaml").write_text(f"name: tiny\ndata:\n  source: {tmp_path / 'data.csv'}\n")
    rows = [line.split() for line in say("adapter", "evaluate", both).splitlines()]
    assert [row[0] for row in rows] == ["adapter", "lora", "rslora"]
    assert all(row[2] == "6" for row in rows[1:])
    predictor = load_predictor(runs["rslora"])
    texts, labels = held_out_samples(runs["lora"])
    answers = predictor.predict(texts)
    share = np.mean([answer.label == label for answer, label in zip(answers, labels, strict=True)])
    assert rows[2][1] == f"{share:.4f}"
    assert f"{runs['lora'] / 'merged'}, opened again" in say("adapter", "merge", str(runs["lora"]))
    assert load_predictor(runs["lora"] / "merged").predict(TEXTS)[0].label in LABELS


def test_evaluation_refuses_an_adapter_that_gives_several_labels(
    root: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = export_run(tmp_path / "several", root / "base", "lora", target="multi")
    tiny_sentences(tmp_path / "data.csv", rows=40)
    (runs["lora"] / "config.yaml").write_text(f"name: tiny\ndata:\n  source: {tmp_path / 'data.csv'}\n")
    assert command("adapter", "evaluate", f"{runs['lora']},{several}") == 2
    assert "RUN (several) was trained with data.target=multi" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_long_text_is_cut_for_the_virtual_tokens_of_a_plain_adapter(method: str, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    base = tiny_bert(tmp_path / "base")
    kind = PromptTuningConfig if method == "prompt" else PrefixTuningConfig
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    adapted = get_peft_model(plain, kind(task_type="SEQ_CLS", num_virtual_tokens=5))
    adapted.save_pretrained(tmp_path / "adapter")
    predictor = load_predictor(tmp_path / "adapter")
    assert predictor.max_length == AutoTokenizer.from_pretrained(base).model_max_length - 5
    assert predictor.predict(["good " * 600])[0].is_cut
