"""A GGUF file becomes a folder that `from_pretrained` opens: safetensors in bf16 and a tokenizer. Once per machine, in 20 to 90 s."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, cast


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantize the weights of `file` and write model and tokenizer into `folder`. Leaves torch's random state as it was."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.random.fork_rng(devices=[]), redirect_stderr(io.StringIO()):  # its bars heed no setting
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = cast(Any, AutoModelForCausalLM).from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers 5.23 would go on to call the model quantized, which save_pretrained refuses.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    with redirect_stderr(io.StringIO()):
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
