"""`samestep predict RUN --chat`: answers of an instruction-tuned model, asked in the template that it was trained with."""

import json
import sys
from itertools import islice
from pathlib import Path

from launch.predict import Sources
from trainer.errors import ConfigError, DataError
from trainer.quiet import quiet_libraries
from trainer.run_folder import find_exported
from trainer.screen import print_plain

TOGETHER = 16
"""Questions in one batch."""


def predict_chat_command(run: Path, texts: list[str], *, file: Path | None, as_json: bool, new_tokens: int) -> int:
    """Greedy answers to each text, or each line of `file`, as a conversation of its own. Returns the exit code."""
    folder = find_exported(run, task="clm")
    sources = Sources(texts, file)
    quiet_libraries()
    from trainer.model.export import load_exported
    from trainer.predict.answer import PredictOptions
    from trainer.predict.generate import Generator

    model, tokenizer, info = load_exported(folder)
    if tokenizer.chat_template is None:
        raise ConfigError(f"RUN ({run}) was not trained on conversations: it has no chat template; leave out --chat")
    options = PredictOptions(batch_size=TOGETHER, new_tokens=new_tokens)
    generator = Generator(model, tokenizer, info, options, is_chat=True)
    remaining, num_texts = iter(sources.lines()), 0
    while chunk := list(islice(remaining, TOGETHER)):
        for answer in generator.answer(chunk):
            facts = {
                "text": answer.facts["text"],
                "answer": answer.facts["generated"],
                "stopped": answer.facts["stopped"],
            }
            print_plain(sys.stdout, json.dumps(facts, ensure_ascii=False) if as_json else answer.words)
        num_texts += len(chunk)
    if not num_texts:
        raise DataError(f"{sources.name} has no text; give one in quotes, --file FILE with one a line, or pipe them in")
    return 0
