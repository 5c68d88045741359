"""What a person meant by an unknown key: a misspelling, another tool's name, or the accelerate configuration's."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

SYNONYMS = {
    "optim.peak_lr": ("lr", "learning_rate", "max_lr", "peak_learning_rate"),
    "optim.head_lr": ("head_learning_rate", "lr_head", "classifier_lr"),
    "optim.schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_schedule"),
    "optim.warmup_fraction": ("warmup", "warmup_ratio", "warmup_steps", "num_warmup_steps"),
    "optim.max_grad_norm": ("clip", "clip_norm", "grad_clip", "gradient_clipping", "clip_grad_norm", "max_norm"),
    "optim.eps": ("adam_epsilon", "epsilon"),
    "optim.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "optim.weight_decay": ("wd", "decay"),
    "train.global_batch_size": ("batch_size", "bs", "batch", "train_batch_size"),
    "train.micro_batch_size": ("per_device_train_batch_size", "per_gpu_batch_size", "microbatch", "device_batch_size"),
    "train.eval_batch_size": ("per_device_eval_batch_size", "test_batch_size"),
    "train.num_epochs": ("epochs", "num_train_epochs", "n_epochs"),
    "train.max_steps": ("steps", "num_steps", "total_steps", "max_train_steps", "iterations"),
    "train.eval_every": ("eval_steps", "eval_interval"),
    "train.log_every": ("logging_steps", "log_interval", "log_steps"),
    "train.metric": ("metric_for_best_model", "monitor"),
    "train.patience": ("early_stopping", "early_stopping_patience"),
    "train.seed": ("random_seed",),
    "method.rank": ("r", "lora_r", "lora_rank"),
    "method.alpha": ("lora_alpha",),
    "method.dropout": ("lora_dropout",),
    "method.targets": ("target_modules", "lora_target_modules", "lora_targets"),
    "method.name": ("peft", "peft_method", "adapter"),
    "model.source": ("model_name", "model_name_or_path", "checkpoint", "pretrained", "base_model"),
    "model.attention": ("attn_implementation", "attn", "flash_attention"),
    "model.dropout": ("hidden_dropout", "hidden_dropout_prob"),
    "model.attention_dropout": ("attention_probs_dropout_prob", "attn_dropout"),
    "model.head_dropout": ("classifier_dropout",),
    "data.source": ("dataset", "dataset_name", "train_file", "dataset_path"),
    "data.subset": ("dataset_config", "dataset_config_name"),
    "data.validation": ("validation_file", "eval_file", "validation_split"),
    "data.test": ("test_file", "test_split"),
    "data.text": ("text_column", "sentence", "text_field"),
    "data.label": ("label_column", "target_column", "label_field"),
    "data.max_length": ("max_len", "max_seq_length", "max_seq_len", "seq_len", "sequence_length"),
    "data.target": ("problem_type",),
    "data.class_weights": ("class_weight", "loss_weights"),
    "data.label_smoothing": ("label_smoothing_factor", "smoothing"),
    "model.pooling": ("pooling_mode", "pooling_strategy", "classifier_pooling"),
    "run_dir": ("output_dir", "out_dir", "save_dir", "logging_dir"),
    "name": ("run_name", "experiment"),
}
"""Our name -> what other tools and people call it (the last part of the key)."""

ACCELERATE_KEYS = (
    "mixed_precision precision bf16 fp16 dtype num_processes num_machines machine_rank world_size distributed_type "
    "main_process_ip main_process_port main_training_function rdzv_backend same_network compute_environment "
    "zero_stage zero3_init_flag "
    "backend gpu_ids use_cpu gradient_accumulation_steps dispatch_batches split_batches downcast_bf16 "
    "enable_cpu_affinity dynamo_backend offload_optimizer_device offload_param_device"
)
ACCELERATE_PREFIXES = ("fsdp", "deepspeed", "dynamo", "megatron", "tpu", "parallelism_config")


def accelerate_rule(key: str) -> str | None:
    """Rule and fix for a key that the accelerate configuration owns; None for any other key."""
    for part in key.split("."):
        if part in ("gradient_accumulation_steps", "accumulation_steps", "gradient_accumulation"):
            return (
                "accumulation is derived from the batch sizes and belongs to no configuration; "
                "set train.micro_batch_size, and train.global_batch_size stays what it is"
            )
        if part in ACCELERATE_KEYS.split() or part.startswith(ACCELERATE_PREFIXES):
            return (
                "belongs to the accelerate configuration, not to the recipe; "
                "use `samestep run RECIPE --backend fsdp --processes 2 --precision bf16`, or `accelerate launch "
                "--config_file accelerate_configs/fsdp.yaml --num_processes 2 --mixed_precision bf16 RECIPE`"
            )
    return None


def did_you_mean(key: str, names: Iterable[str]) -> list[str]:
    """Up to three existing names that `key` may stand for, the likeliest first; empty when nothing is near."""
    known = list(names)
    last = _last_part(key.lower().replace("-", "_"))
    same_last_part = [name for name in known if _last_part(name) == last]
    if same_last_part and last != "name":
        return same_last_part[:3]
    by_synonym = [name for name, others in SYNONYMS.items() if last in others and name in known]
    return by_synonym or _nearest(key.lower(), last, known)


def nearest_word(word: str, options: Iterable[str]) -> str | None:
    """The option closest to a misspelt word, if one is close."""
    near = get_close_matches(word.lower(), list(options), n=1, cutoff=0.6)
    return near[0] if near else None


def _nearest(key: str, last: str, known: list[str]) -> list[str]:
    def score(name: str) -> float:
        whole = SequenceMatcher(None, key, name).ratio()
        return max(whole, SequenceMatcher(None, last, _last_part(name)).ratio() - 0.02)

    best = max(known, key=score, default=None)
    return [best] if best is not None and score(best) >= 0.65 else []


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
