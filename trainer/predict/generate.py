"""Texts that a model writes: after a prompt (clm), or to a text (seq2seq); greedy, sampled, or by beams.

Place in the flow: `samestep predict` and the end of a run. Local to the process. Invariant: what is written to a text does not depend on
the texts beside it, sampled or not, beyond rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from trainer.data.batches import random_words
from trainer.data.pairs import encode_texts
from trainer.errors import ConfigError, TextError
from trainer.predict.answer import Answer, PredictOptions
from trainer.predict.classify import check_texts

Written = tuple[Tensor, bool]
"""Tokens up to and without what stopped them, and whether something did."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and where they end."""

    padding: int
    """Token that fills short prompts; masked."""
    stop: Sequence[int]
    """Tokens that end a text. None: `new_tokens` alone do."""
    new_tokens: int
    """Most tokens of a text."""
    num_beams: int = 1
    """Above 1: the likeliest whole text that a search of so many beams finds."""
    temperature: float | None = None
    """Sample at this temperature. None: the likeliest token each time, or beams."""
    seed: int = 0
    """Of sampling."""


def generate(
    model: nn.Module,
    prompts: Sequence[Tensor],
    how: Decoding,
    *,
    numbers: Sequence[int] | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[Written]:
    """What the model writes to each prompt (N,) int64. Local to the rank.

    A model with an encoder reads the prompt there, padded on the right; any other goes on after it, padded on the left. numbers: of the
    prompts, by which sampling draws; None counts them from 0. adapter_names: PEFT's, one for each prompt; None is the active one.
    """
    device = next(model.parameters()).device
    has_encoder = bool(getattr(cast(Any, model).config, "is_encoder_decoder", False))
    ids, mask = pad_prompts(prompts, how.padding, on_the_right=has_encoder)
    named = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
    draws = [] if how.temperature is None else [Draws(how, range(len(prompts)) if numbers is None else numbers)]
    with torch.no_grad():
        made = cast(Any, model).generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=how.new_tokens,
            num_beams=how.num_beams,
            do_sample=False,
            logits_processor=draws,
            use_cache=True,
            eos_token_id=list(how.stop) or None,
            forced_eos_token_id=None,  # BART's would end what is only cut off
            pad_token_id=how.padding,
            **named,
        )
    start = 1 if has_encoder else ids.shape[1]  # behind the decoder's start token, or the prompt
    stop = torch.tensor(list(how.stop), dtype=torch.int64)
    return [until_stop(row, stop) for row in made[:, start:].cpu()]


def pad_prompts(prompts: Sequence[Tensor], padding: int, *, on_the_right: bool) -> tuple[Tensor, Tensor]:
    """(B, T) int64 tokens, and which are no padding."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = 0 if on_the_right else longest - len(prompt)
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def until_stop(made: Tensor, stop: Tensor) -> Written:
    """The tokens (N,) before the first that stops."""
    ends = torch.isin(made, stop).nonzero()
    return (made[: int(ends[0])], True) if len(ends) else (made, False)


class Draws(LogitsProcessor):
    """Samples, as the highest of scores with Gumbel's noise, which is a function of seed, number of the prompt and place.

    transformers' own sampling draws for a whole batch at once, so that a text would depend on those beside it.
    """

    def __init__(self, how: Decoding, numbers: Sequence[int]) -> None:
        self.temperature, self.seed, self.numbers, self.place = how.temperature, how.seed, numbers, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores at the next place of every prompt; called once for each place."""
        words = np.stack([random_words(scores.shape[1], self.seed, number, self.place) for number in self.numbers])
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        self.place += 1
        noise = torch.from_numpy(-np.log(-np.log(uniform))).to(scores)
        assert self.temperature is not None
        return scores / self.temperature + noise


class Generator:
    """A model that is ready to write; implements `Answerer` of answer.py."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        info: Mapping[str, Any],
        options: PredictOptions,
        *,
        is_chat: bool,
    ) -> None:
        """is_chat: each text is what a user says, and stands in the chat template. ConfigError for options that do not go together."""
        if options.temperature is not None and options.num_beams > 1:
            raise ConfigError(
                f"temperature ({options.temperature:g}) samples and num_beams ({options.num_beams}) searches; leave one of them out"
            )
        self.config: Any = cast(Any, model).config
        positions = getattr(self.config, "max_position_embeddings", None)
        virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        self.positions: int | None = positions - virtual if positions and positions > 0 else None
        self.has_encoder, self.is_chat = bool(getattr(self.config, "is_encoder_decoder", False)), is_chat
        if self.has_encoder and self.positions is not None and options.new_tokens >= self.positions:
            raise ConfigError(
                f"new_tokens ({options.new_tokens:,}) must be below {self.positions:,}, the model's positions; lower it"
            )
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model, self.tokenizer, self.info, self.options = model.to(device).eval(), tokenizer, info, options
        self.how = Decoding(
            padding=next((int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0),
            stop=stop_tokens(model, tokenizer, info),
            new_tokens=options.new_tokens,
            num_beams=options.num_beams,
            temperature=options.temperature,
            seed=options.seed,
        )  # fmt: skip
        self.num_answered = 0

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """What is written to each text, in their order. DataError for a text that is empty, or too long for a model without encoder."""
        check_texts(texts, pairs=False)
        asked = self.numbered_prompts(texts)
        written = self.write([prompt for prompt, _, _ in asked], [number for _, _, number in asked])
        return [
            self.told(text, made, is_cut=cut) for text, made, (_, cut, _) in zip(texts, written, asked, strict=True)
        ]

    def numbered_prompts(self, texts: Sequence[str]) -> list[tuple[Tensor, bool, int]]:
        """Of each text, the next to be answered: its tokens, whether its end was cut off, and the number by which sampling draws."""
        prompts, cuts = self.prompts(texts)
        first, self.num_answered = self.num_answered, self.num_answered + len(texts)
        return list(zip(prompts, cuts, range(first, self.num_answered), strict=True))

    def write(
        self, prompts: Sequence[Tensor], numbers: Sequence[int], adapter_names: Sequence[str] | None = None
    ) -> list[Written]:
        """What the model writes to each prompt (N,), in batches of similar length; arguments as `generate` takes them."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        written: dict[int, Written] = {}
        for start in range(0, len(order), self.options.batch_size):
            batch = order[start : start + self.options.batch_size]
            names = None if adapter_names is None else [adapter_names[index] for index in batch]
            drawn, chosen = [numbers[index] for index in batch], [prompts[index] for index in batch]
            found = generate(self.model, chosen, self.how, numbers=drawn, adapter_names=names)
            written |= dict(zip(batch, found, strict=True))
        return [written[index] for index in range(len(prompts))]

    def prompts(self, texts: Sequence[str]) -> tuple[list[Tensor], list[bool]]:
        """The tokens of each text as the model was trained to read them, and whether its end was cut off."""
        if self.has_encoder:
            return self.inputs(texts)
        if self.is_chat:
            before = self.info.get("turns_before", [])
            asked = [[*before, {"role": "user", "content": text}] for text in texts]
            render = cast(Any, self.tokenizer).apply_chat_template
            rows = [render(turns, add_generation_prompt=True)["input_ids"] for turns in asked]
        else:
            rows = self.tokenizer(list(texts), verbose=False)["input_ids"]
        for number, (text, row) in enumerate(zip(texts, rows, strict=True), start=1):
            if not row:
                raise TextError(number, f"({text!r:.80}) has no token in the model's vocabulary; leave it out")
            if self.positions is not None and len(row) + self.how.new_tokens > self.positions:
                raise TextError(
                    number,
                    f"({text!r:.80}) has {len(row):,} tokens and new_tokens is {self.how.new_tokens:,}, together more than "
                    f"the model's {self.positions:,} positions; shorten the text, or lower new_tokens",
                )
        return [torch.tensor(row) for row in rows], [False] * len(texts)

    def inputs(self, texts: Sequence[str]) -> tuple[list[Tensor], list[bool]]:
        """The same for an encoder: behind the prefix of training, cut to its longest text, or to what the model can read."""
        longest = self.info.get("max_length") or min(self.positions or MOST_READ, self.tokenizer.model_max_length)
        prefix = self.info.get("prefix") or ""
        found = encode_texts([prefix + text for text in texts], self.tokenizer, longest)
        rows = np.split(found.split.tokens.astype(np.int64), found.split.offsets[1:-1])
        return [torch.from_numpy(row) for row in rows], (found.full_lengths > longest).tolist()

    def told(self, text: str, written: Written, *, is_cut: bool) -> Answer:
        """Tokens as an answer; what only goes on after the text keeps its white space."""
        ids, has_stopped = written
        generated = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if self.has_encoder or self.is_chat:
            generated = generated.strip()
        facts = {"text": text, "generated": generated, "stopped": has_stopped, "is_cut": is_cut}
        return Answer(generated + ("" if has_stopped else " [...]"), facts)


MOST_READ = 4096
"""Tokens of a text, where neither model nor tokenizer say how many they can read."""


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, info: Mapping[str, Any]) -> tuple[int, ...]:
    """What ends a text: as a run on conversations says; or the tokenizer's end of sequence; of a model that is no run's, as it says itself.

    A run on other data than its model's has that data's tokenizer, and settings of a vocabulary that is gone.
    """
    own = None if info else getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for found in (info.get("stop_token_ids"), own, tokenizer.eos_token_id):
        if found is not None:
            return tuple(found) if isinstance(found, Sequence) else (int(found),)
    return ()


def open_answerer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, info: Mapping[str, Any], options: PredictOptions
) -> Generator:
    """A generator; it asks in the chat template where the run was on conversations."""
    return Generator(model, tokenizer, info, options, is_chat="stop_token_ids" in info)
