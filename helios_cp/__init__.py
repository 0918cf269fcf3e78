"""Exact, distributed inference for the Helios video diffusion transformer."""

import logging

__version__ = "0.1.0"

# diffusers imports torchao wherever it is installed, which then warns of its binaries for other cards than those here.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
