"""From files, assets and hub datasets to identical global batches."""
