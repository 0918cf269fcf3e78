"""What the fork server imports once, so that none of its ranks has to; imported nowhere else.

It all stays, so garbage is not looked for meanwhile, nor ever among it: a search copies the memory that ranks share.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

from helios_cp.config.imports import quiet_imports

MODULES = [
    "torch.distributed",
    "helios_cp.generate",
    "helios_cp.generate.run",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_helios",
    "diffusers.schedulers.scheduling_helios_dmd",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.byt5.tokenization_byt5",
    "transformers.models.umt5.modeling_umt5",
]

quiet_imports()
gc.disable()
for name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
gc.enable()
