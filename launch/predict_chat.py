"""`samestep predict RUN --chat`: an instruction-tuned model, asked in the template that it was trained with."""

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigError
from trainer.run_folder import find_exported

if TYPE_CHECKING:
    from trainer.predict.answer import Answerer, PredictOptions


def open_chat(run: Path, options: "PredictOptions") -> "Answerer":
    """Answers each text as what a user says first. ConfigError for a run that has no chat template."""
    folder = find_exported(run, task="clm")
    from trainer.model.export import load_exported
    from trainer.predict.generate import Generator

    model, tokenizer, info = load_exported(folder)
    if tokenizer.chat_template is None:
        raise ConfigError(f"RUN ({run}) was not trained on conversations: it has no chat template; leave out --chat")
    return Generator(model, tokenizer, info, options, is_chat=True)
