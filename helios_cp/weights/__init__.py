"""From what `--model` names to loaded parts.

`load` finds a checkpoint and loads its VAE, text encoder and scheduler; `transformer` loads the transformer, with the
part of it that `placement` says, quantised by `quantize`, and with the adapters that `lora` reads merged into it.
`loader` is all of this as one object. `presets` writes tiny checkpoints. `python -m helios_cp.weights` quantises one.
"""
