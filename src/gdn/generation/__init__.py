"""Generation on token ids: sampling, and the engine that decodes in constant memory."""
