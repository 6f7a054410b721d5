"""Recognisers by CTC as functions: tokens, which transcripts fit, the head on the encoder, its loss, and decoding."""
