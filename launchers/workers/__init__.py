"""The actors: text encoder, denoiser, decoder, writer."""
