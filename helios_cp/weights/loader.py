"""What a pipeline loads, as one object, so that another can be given in its place."""

from __future__ import annotations

from helios_cp.weights.load import load_scheduler, load_text_encoder, load_vae
from helios_cp.weights.transformer import load_adaptable


class Loader:
    """Loads the parts of a checkpoint from its files. A subclass can make them in another way, as benchmarks do.

    `transformer` may give `None` in place of an `AdapterState`, where adapters cannot be exchanged.
    """

    transformer = staticmethod(load_adaptable)
    text_encoder = staticmethod(load_text_encoder)
    vae = staticmethod(load_vae)
    scheduler = staticmethod(load_scheduler)
