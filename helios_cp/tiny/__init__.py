"""The embedded models: a world of rendered clips, and how its VAE, text encoder and transformers are trained."""
