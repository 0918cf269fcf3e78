"""From what `--model` names to loaded parts: download, read, quantise, merge adapters, shard."""
