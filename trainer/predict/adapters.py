"""Prediction with several adapters on one base: the base is loaded once, and every request names its adapter.

Place in the flow: beside classify.py and generate.py, for `samestep predict --adapters`. Invariant: a request's answer is that of its
adapter alone. LoRA classifiers with equally many labels, and LoRA writers that end texts alike, share batches (PEFT's `adapter_names`);
others take turns.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from trainer.errors import CheckpointError, TextError
from trainer.model.adapters import find_adapter
from trainer.model.bottleneck import SETTINGS_FILE
from trainer.model.export import exported_tokenizer, is_peft, load_base, opening, put_adapter, read_shapes
from trainer.model.methods import METHODS
from trainer.predict.answer import Answer, PredictOptions
from trainer.predict.classify import Predictor, Text, check_texts, predictor_of
from trainer.predict.generate import Generator, open_answerer
from trainer.predict.kinds import AnyPrediction

TASKS = ("classification", "clm")
USUAL = {"pooling": "model"}
"""What an adapter has that says nothing of it: one that plain PEFT made."""


class SharedBase:
    """One base and its adapters by name."""

    def __init__(self, runs: Mapping[str, Path]) -> None:
        """runs: name -> run directory or exported folder. CheckpointError where one is no adapter, or they have not one base."""
        assert runs, "no adapter"
        found = {name: find_adapter(path) for name, path in runs.items()}
        check_one_base(found)
        # names that PEFT takes: without a dot, as runs/a.1 has, and not within a prefix of its own, as a3 is of ia3_
        self.inner = {name: f"adapter{number}" for number, name in enumerate(found)}
        self.infos = {name: info for name, (_, info) in found.items()}
        (folder, info), *_ = found.values()
        with opening(folder):
            model: Any = load_base(info, trust_remote_code=False)
        for name, (folder, info) in found.items():
            with opening(folder):
                fit_heads(model, folder)
                model = put_adapter(model, folder, info, self.inner[name])
        self.model: Any = model.eval()
        self.tokenizers = {
            name: exported_tokenizer(folder, info, trust_remote_code=False) for name, (folder, info) in found.items()
        }

    def answer_in_turns(
        self, requests: Sequence[tuple[Any, str]], answer: Callable[[str, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """`answer(name, texts)` of each adapter with its own texts, in the order of the requests, by which a TextError numbers them."""
        answers: dict[int, Any] = {}
        for name in self.infos:
            places = [place for place, (_, wanted) in enumerate(requests) if wanted == name]
            if places:
                self.model.set_adapter(self.inner[name])
                texts = [requests[place][0] for place in places]
                try:
                    answers |= dict(zip(places, answer(name, texts), strict=True))
                except TextError as error:
                    raise TextError(places[error.number - 1] + 1, error.words) from None
        return [answers[place] for place in range(len(requests))]

    def num_bytes(self) -> int:
        """Of all weights in memory."""
        return sum(p.numel() * p.element_size() for p in cast(torch.nn.Module, self.model).parameters())


class AdapterPredictor(SharedBase):
    """Classification."""

    def __init__(self, runs: Mapping[str, Path], device: torch.device | None = None) -> None:
        super().__init__(runs)
        self.predictors: dict[str, Predictor] = {
            name: predictor_of(self.model, self.tokenizers[name], info, device) for name, info in self.infos.items()
        }
        infos = list(self.infos.values())
        read = ("max_length", "target", "pairs")
        same = len({(len(info["label_names"]), *(info.get(key) for key in read)) for info in infos}) == 1
        self.mixes = same and all(METHODS[info["method"]].mixes for info in infos) and has_linear_heads(self.model)
        """Whether requests for different adapters share batches."""

    def predict(self, requests: Sequence[tuple[Text, str]], batch_size: int = 32) -> list[AnyPrediction]:
        """Answers in the order of the requests, each (text, name of its adapter). DataError for a text that its predictor refuses."""
        if self.mixes:
            return self._predict_mixed(requests, batch_size)
        return self.answer_in_turns(requests, lambda name, texts: self.predictors[name].predict(texts, batch_size))

    def _predict_mixed(self, requests: Sequence[tuple[Text, str]], batch_size: int) -> list[AnyPrediction]:
        """Batches of similar length, whatever their adapters."""
        any_one = next(iter(self.predictors.values()))
        texts = [text for text, _ in requests]
        check_texts(texts, any_one.pairs)
        samples = any_one.encode(texts)
        order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
        scores = np.zeros((len(samples), len(any_one.label_names)))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            names = [self.inner[requests[index][1]] for index in batch]
            scores[batch] = any_one.scores([samples[index] for index in batch], adapter_names=names)
        return [
            self.predictors[name].prediction(row, sample)
            for (_, name), row, sample in zip(requests, scores, samples, strict=True)
        ]


class AdapterGenerator(SharedBase):
    """Texts that go on after a prompt, or answer it."""

    def __init__(self, runs: Mapping[str, Path], options: PredictOptions) -> None:
        super().__init__(runs)
        self.answerers: dict[str, Generator] = {}
        for name, info in self.infos.items():
            self.model.set_adapter(self.inner[name])  # by which it counts virtual tokens
            self.answerers[name] = open_answerer(self.model, self.tokenizers[name], info, options)
        hows = [answerer.how for answerer in self.answerers.values()]
        mixes = all(METHODS[info["method"]].mixes for info in self.infos.values())
        self.mixes = mixes and all(how == hows[0] for how in hows) and has_linear_heads(self.model)
        """Whether requests for different adapters share batches."""

    def answer(self, requests: Sequence[tuple[str, str]]) -> list[Answer]:
        """Answers in the order of the requests, each (text, name of its adapter)."""
        if self.mixes:
            return self._answer_mixed(requests)
        return self.answer_in_turns(requests, lambda name, texts: self.answerers[name].answer(texts))

    def _answer_mixed(self, requests: Sequence[tuple[str, str]]) -> list[Answer]:
        """Batches of similar length, whatever their adapters."""
        check_texts([text for text, _ in requests], pairs=False)
        asked = self.answer_in_turns(requests, lambda name, texts: self.answerers[name].numbered_prompts(texts))
        prompts, numbers = [prompt for prompt, _, _ in asked], [number for _, _, number in asked]
        names = [self.inner[name] for _, name in requests]
        written = next(iter(self.answerers.values())).write(prompts, numbers, names)
        return [
            self.answerers[name].told(text, made, is_cut=is_cut)
            for (text, name), made, (_, is_cut, _) in zip(requests, written, asked, strict=True)
        ]


def fit_heads(model: torch.nn.Module, folder: Path) -> None:
    """Give each head that PEFT copies for the next adapter as many classes as that one has; the copies that are there stay. In place."""
    from peft.utils.other import ModulesToSaveWrapper

    sizes = read_shapes(folder) if is_peft(model) else {}
    for name, wrapper in list(model.named_modules()):
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for inner, layer in list(wrapper.original_module.named_modules(prefix="original_module")):
            rows = sizes.get(f"{name}{inner.removeprefix('original_module')}.weight", (0,))[0]
            if isinstance(layer, torch.nn.Linear) and rows not in (0, layer.out_features):
                fitted = torch.nn.Linear(layer.in_features, rows, bias=layer.bias is not None)
                wrapper.set_submodule(inner, fitted.to(layer.weight))


def has_linear_heads(model: torch.nn.Module) -> bool:
    """Whether all modules that PEFT trained as a copy are linear layers: it runs no other with an adapter for each row (0.21)."""
    from peft.utils.other import ModulesToSaveWrapper

    copied = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return all(isinstance(module.original_module, torch.nn.Linear) for module in copied)


def check_one_base(found: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> None:
    """CheckpointError unless all adapters are PEFT's, for one task, on one base."""
    (first, (_, info)), *rest = found.items()
    for name, (folder, about) in found.items():
        if (folder / SETTINGS_FILE).is_file():
            raise CheckpointError(
                f"--adapters ({name}): bottleneck adapters take the place of layers, so one base holds one of them; predict with it alone"
            )
        if about.get("task", "classification") not in TASKS:
            raise CheckpointError(
                f"--adapters ({name}) is for task {about['task']}, and several adapters answer for {' or '.join(TASKS)}; "
                "predict with it alone"
            )
    if len({METHODS[about["method"]].peft_kind or about["method"] for _, about in found.values()}) > 1:
        methods = ", ".join(f"{name} ({about['method']})" for name, (_, about) in found.items())
        raise CheckpointError(
            f"--adapters: PEFT holds adapters of one kind on a base, not {methods}; predict with each kind apart"
        )
    for name, (_, about) in rest:
        for key in ("task", "base", "quantization", "pooling", "head_layers"):
            own, other = (facts.get(key, USUAL.get(key)) for facts in (about, info))
            if own != other:
                raise CheckpointError(
                    f"--adapters: {name} belongs to {key} {own}, but {first} to {other}; give adapters of one base"
                )
