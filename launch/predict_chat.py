"""`samestep predict RUN --chat`: answers of an instruction-tuned model, asked in the template that it was trained with."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any, cast

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
    import torch

    from trainer.model.export import load_exported
    from trainer.task.instruct import generate

    model, tokenizer, info = load_exported(folder)
    if tokenizer.chat_template is None:
        raise ConfigError(f"RUN ({run}) was not trained on conversations: it has no chat template; leave out --chat")
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    stop, padding = info.get("stop_token_ids") or [tokenizer.eos_token_id], int(tokenizer.pad_token_id or 0)
    remaining, num_texts = iter(sources.lines()), 0
    while chunk := list(islice(remaining, TOGETHER)):
        asked = [[{"role": "user", "content": text}] for text in chunk]
        encode = cast(Any, tokenizer).apply_chat_template
        prompts = [torch.tensor(encode(turns, add_generation_prompt=True)["input_ids"]) for turns in asked]
        for text, (ids, has_stopped) in zip(chunk, generate(model, prompts, padding, stop, new_tokens), strict=True):
            answer = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            facts = {"text": text, "answer": answer, "stopped": has_stopped}
            print_plain(
                sys.stdout,
                json.dumps(facts, ensure_ascii=False) if as_json else answer + ("" if has_stopped else " [...]"),
            )
            num_texts += 1
    if not num_texts:
        raise DataError(f"{sources.name} has no text; give one in quotes, --file FILE with one a line, or pipe them in")
    return 0
