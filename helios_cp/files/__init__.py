"""Pictures and clips in, MP4 out, files that are whole or absent, tensors in safetensors files."""
