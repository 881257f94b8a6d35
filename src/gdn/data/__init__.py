"""Data: text to tokenizer, documents, token shards, an order that is a pure function, and batches."""
