"""What torch runs in: several processes, CUDA graphs, the compiler, Fabric."""
