"""What an objective must know of a tokenizer: special tokens by role, and which tokens begin words or end sentences.

Pretrained models bring their own special tokens, and lack what they lack. For a model from scratch the data's tokenizer is completed:
tokens that go by a usual name take their role, others are added behind the vocabulary.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainer.data.objectives.rows import Vocabulary
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "start": ("[CLS]", "<cls>", "<s>"),
    "end": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
"""role -> what the token is usually called; where none is known, the last is added."""
ATTRIBUTES = {
    "pad": ("pad_token",),
    "start": ("cls_token", "bos_token"),
    "end": ("sep_token", "eos_token"),
    "mask": ("mask_token",),
}
"""role -> what transformers calls it; the first that a tokenizer has."""
NUM_SENTINELS = 100
SENTINEL = "<extra_id_{}>"  # T5's


def complete(tokenizer: "PreTrainedTokenizerBase", roles: Sequence[str]) -> list[str]:
    """Give the tokenizer of a model from scratch the special tokens it lacks. Changes it; returns the tokens that were added."""
    before = len(cast(Any, tokenizer))
    known = tokenizer.get_vocab()
    for role in ("pad", *(role for role in roles if role != "sentinels")):
        name = next((name for name in NAMES[role] if name in known), NAMES[role][-1])
        tokenizer.add_special_tokens(cast(Any, dict.fromkeys(ATTRIBUTES[role], name)))
    if "sentinels" in roles and SENTINEL.format(0) not in known:
        tokenizer.add_special_tokens({"additional_special_tokens": [SENTINEL.format(i) for i in range(NUM_SENTINELS)]})
    return list(tokenizer.convert_ids_to_tokens(list(range(before, len(cast(Any, tokenizer))))))


def frame(tokenizer: "PreTrainedTokenizerBase", parts: Sequence[str]) -> None:
    """Make the tokenizer put special tokens around a text as `parts` names their roles: `start`, `$A`, `end`. Changes it.

    Else who gives the trained model a text would leave out what every row of its training had. A pair goes on with `$B` and `end`.
    """
    from tokenizers.processors import TemplateProcessing

    names = {role: getattr(tokenizer, ATTRIBUTES[role][0]) for role in parts if role in ATTRIBUTES}
    single = [names.get(part, part) for part in parts]
    second = single.index("$A") + 2  # behind the end of the first text
    pair = [*single[:second], "$B:1", f"{names['end']}:1", *single[second:]]
    ids = [(name, int(cast(Any, tokenizer).convert_tokens_to_ids(name))) for name in names.values()]
    cast(Any, tokenizer).backend_tokenizer.post_processor = TemplateProcessing(single, pair, ids)


def vocabulary_of(
    tokenizer: "PreTrainedTokenizerBase",
    roles: Sequence[str],
    *,
    objective: str,
    source: str,
    separator: int | None = None,
) -> Vocabulary:
    """The tokenizer's vocabulary. ConfigError for a role that no token has.

    source: of the model, for the message. separator: the token between documents, which no tokenizer.json names as such.
    """
    ids = {role: id_of(tokenizer, role) for role in ATTRIBUTES}
    known = tokenizer.get_vocab()
    sentinels = (
        [known[SENTINEL.format(i)] for i in range(len(known)) if SENTINEL.format(i) in known]
        if "sentinels" in roles
        else []
    )
    missing = [role for role in ("pad", *roles) if role != "sentinels" and ids[role] < 0]
    missing += ["sentinel"] if "sentinels" in roles and not sentinels else []
    if missing:
        raise ConfigError(
            f"data.objective ({objective}) needs {' and '.join(f'a {role} token' for role in missing)}, and the tokenizer of model.source "
            f"({source}) has none; take a model that was trained with it, another objective, or model.init=random"
        )
    size = len(cast(Any, tokenizer))
    texts = texts_of(tokenizer, size)
    special = np.zeros(size, np.bool_)
    numbers = (*tokenizer.all_special_ids, *sentinels, *ids.values(), -1 if separator is None else separator)
    special[[number for number in numbers if number >= 0]] = True
    ends = np.array([text.endswith((".", "!", "?")) or "\n" in text for text in texts]) | special
    return Vocabulary(
        size,
        **ids,
        sentinels=np.array(sentinels, np.int64),
        is_special=special,
        starts_word=begin_words(tokenizer, texts),
        ends_sentence=ends,
    )


def id_of(tokenizer: "PreTrainedTokenizerBase", role: str) -> int:
    """The token of a role; -1 where there is none."""
    found = (getattr(tokenizer, f"{attribute}_id") for attribute in ATTRIBUTES[role])
    return next((int(number) for number in found if number is not None), -1)


def texts_of(tokenizer: "PreTrainedTokenizerBase", size: int) -> list[str]:
    """The text of each token, with a space before where one belongs there; WordPiece's ## stays."""
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(size)))]
    if not is_byte_level(tokenizer):
        return [token.replace("\u2581", " ") for token in tokens]
    spaces = {"\u0120": " ", "\u010a": "\n", "\u0109": "\t", "\u010d": "\r"}  # as GPT-2 writes these bytes
    return ["".join(spaces.get(character, character) for character in token) for token in tokens]


def begin_words(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """(V,) which tokens a word begins with: without ## (WordPiece); with a space or no letter before (others)."""
    if is_word_piece(tokenizer):
        return np.array([not text.startswith("##") for text in texts])
    return np.array([not text[:1].isalnum() for text in texts])


def is_word_piece(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether ## marks the tokens that go on a word, as in BERT; elsewhere it may be a token of its own."""
    return bool(json.loads(cast(Any, tokenizer)._tokenizer.to_str())["model"]["type"] == "WordPiece")


def is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether each character of a token stands for a byte, as in GPT-2."""
    kind = json.loads(cast(Any, tokenizer)._tokenizer.to_str())
    return '"ByteLevel"' in json.dumps([kind["pre_tokenizer"], kind["decoder"]])
