"""The actors: text encoder, denoiser, decoder, writer."""

from helios_cp.config.imports import without_collection

with without_collection():  # here, before a module of this folder imports it in the usual way
    import torch  # noqa: F401
