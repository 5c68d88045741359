"""Checkpoints: complete and verified, or invisible; one format for all backends; safetensors and JSON only.

manifest (what a folder must hold) <- shards (tensor files), store (folders: publish, list, prune) <- verify, saver (background
writing), restore <- checkpointer (what the loop calls). `resume` decides whether a run continues; `export` writes a plain model.

    RUN/checkpoints/latest                                the newest one's name, for people and scripts
    RUN/checkpoints/step-00000100/manifest.json           sizes and BLAKE3 of all other files, tensors, world, backend
                                 /state.json              counters, position, config
                                 /weights-00001-of-00002.safetensors, optimizer-..., rank-...     one of each per rank
"""
