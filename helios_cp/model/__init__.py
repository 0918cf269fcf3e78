"""The transformer, the VAE and the text encoder. They know no rank and no kind of device."""
