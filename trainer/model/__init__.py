"""From a source (asset, folder, hub id) to a model whose method is applied; and back to files that plain transformers and PEFT open."""
