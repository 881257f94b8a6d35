"""The Gated DeltaNet language model: configuration, modules, decode state, loading."""
