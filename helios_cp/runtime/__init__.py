"""Makes a loaded model faster or smaller: compilation, CUDA graphs, offload."""
