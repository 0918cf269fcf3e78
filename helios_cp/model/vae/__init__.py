"""The VAE of Helios (Wan 2.1's): pixels to latents and back, equal to diffusers' `AutoencoderKLWan`.

`autoencoder` is the model, made of the two `halves`, which are made of `layers`. All of them hold videos as
`[B, T, H, W, C]`, channels last in memory. `sweep` is one pass over a video, group of frames after group; it carries
what layers keep of the frames before, and says where rows beyond their own come from. `kernels` are the fused
operations, and `config` reads `vae/config.json`.
"""
