"""Generation on token ids: sampling, the engine that decodes in constant memory, decode states as files."""
