"""Checkpoints: complete and verified, or invisible; one format for all backends; safetensors and JSON only.

manifest (what a folder must hold) and direct (large files past the page cache) <- shards (tensor files), store (folders: publish, list,
verify, prune) <- snapshot (the copy that training waits for), saver (background writing), own (what one rank alone has), state (scalars),
belongs (whether it fits the run) <- checkpointer (what the loop calls). `resume` decides whether a run continues; `export` writes a plain
model.

    RUN/checkpoints/latest                                the newest one's name, for people and scripts
    RUN/checkpoints/step-00000100/manifest.json           sizes and BLAKE3 of all other files, tensors, world, backend
                                 /state.json              counters, position, config
                                 /weights-00001-of-00002.safetensors, optimizer-..., rank-...     one of each per rank
"""
