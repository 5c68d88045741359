"""Checks of what a config points at: data files, columns, labels, layer names. No weights are loaded, no rank talks."""

from collections.abc import Callable, Sequence

from trainer.config import (
    Augmentation,
    ClassificationData,
    InstructData,
    PairData,
    QuestionData,
    RunConfig,
    StreamData,
    TagData,
)
from trainer.errors import ConfigError, SamestepError


def input_problems(config: RunConfig, settings_problems: Sequence[str] = ()) -> list[str]:
    """Every problem with the data and the model that a config names.

    A check is skipped where a problem of the settings speaks about its sections: its verdict would follow from that.
    """
    problems: list[str] = []
    for check, sections in ((_check_data, ("data",)), (_check_model, ("model", "method"))):
        if not any(section in problem for section in sections for problem in settings_problems):
            problems += _problems_of(check, config)
    return problems


def _check_data(config: RunConfig) -> None:
    if isinstance(config.data, ClassificationData):
        from trainer.data.classify import read_splits

        read_splits(config.data)
        _check_augmentation(config.data.augment)
    elif isinstance(config.data, StreamData):
        from trainer.data.stream.open import open_streams

        streams = open_streams(config)
        from trainer.data.objectives import build_objective
        from trainer.model.vocabulary import check_next_tokens, objective_vocabulary

        if config.data.objective == "clm":
            check_next_tokens(config.model, streams.tokenizer_file)
        else:
            _, _, vocabulary = objective_vocabulary(
                config.model, config.data, streams.tokenizer_file, streams.train.tokenizer.eos
            )
            build_objective(config.data, vocabulary, config.train.seed)
    elif isinstance(config.data, InstructData):
        from trainer.data.conversations import read_conversations

        if not config.data.source.startswith("asset:"):
            read_conversations(config.data)
    elif isinstance(config.data, PairData):
        from trainer.data.pairs import read_pairs

        if not config.data.source.startswith("asset:"):
            read_pairs(config.data)
    elif isinstance(config.data, QuestionData):
        from trainer.data.questions import read_questions

        if config.data.source != "asset:stdlib" or config.data.validation is not None:
            read_questions(config.data)
    elif isinstance(config.data, TagData):
        from trainer.data.tags import read_tags

        if not config.data.source.startswith("asset:"):
            read_tags(config.data)
    else:
        from trainer.data.stream.live import open_dataset

        open_dataset(config.data)


def _check_augmentation(augment: Augmentation) -> None:
    if augment.synonyms is not None:
        from trainer.data.synonyms import load_synonyms

        load_synonyms(augment.synonyms)
    if augment.text_kinds:
        from trainer.model.rewrite import check_writers

        check_writers(augment)


def _check_model(config: RunConfig) -> None:
    from trainer.model.methods import check_method

    check_method(config)


def _problems_of(check: Callable[[RunConfig], None], config: RunConfig) -> Sequence[str]:
    try:
        check(config)
    except ConfigError as error:
        return error.problems
    except SamestepError as error:
        return (str(error),)
    return ()
